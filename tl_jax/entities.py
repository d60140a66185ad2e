"""Entities of tagged words: what a named-entity recogniser is judged by.

A tag is `O`, outside, or `B-TYPE`, `I-TYPE` (also `E-`, `S-`): the beginning, inside, end of an entity, or one by itself.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Entity(NamedTuple):
    """Words first … last of a sentence, and the type that they have together."""

    type: str
    first: int
    last: int


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, as seqeval reads them by default and the script of CoNLL-2000 (conlleval) before it.

    An `I-` that follows nothing of its type begins an entity.
    """
    found, first, before = [], 0, ('O', '_')
    for i, tag in enumerate([*tags, 'O']):
        now = (tag[0], tag[1:].split('-', 1)[-1] or '_')
        if _ends(before, now):
            found.append(Entity(before[1], first, i - 1))
        if _starts(before, now):
            first = i
        before = now
    return found


def _ends(before: tuple[str, str], now: tuple[str, str]) -> bool:
    if before[0] in 'ES':
        return True
    return before[0] != 'O' and (now[0] in 'BSO' or before[1] != now[1])


def _starts(before: tuple[str, str], now: tuple[str, str]) -> bool:
    if now[0] in 'BS':
        return True
    return now[0] != 'O' and (before[0] in 'ESO' or before[1] != now[1])


def entity_figures(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and their harmonic mean over all entities, type and both ends right; 0 where there are none."""
    sets = [
        {(i, *entity) for i, tags in enumerate(group) for entity in entities_of(tags)} for group in (true, predicted)
    ]
    right = len(sets[0] & sets[1])
    precision, recall = right / max(len(sets[1]), 1), right / max(len(sets[0]), 1)
    return {'precision': precision, 'recall': recall, 'f1': 2 * precision * recall / max(precision + recall, 1e-300)}
