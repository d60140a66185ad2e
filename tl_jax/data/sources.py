"""`open_source`: from a spec string to a `Source`.

    KIND:PATH[SLICE]        sklearn:digits/train   folder:PATH   npz:FILE.npz/SPLIT   idx:DIR/SPLIT
                            csv:FILE   tsv:FILE   jsonl:FILE   tfds:NAME/SPLIT

A slice, as in TFDS, takes part of any source: `[:80%]`, `[80%:]`, `[100:200]`. It cuts one fixed permutation
of the examples, so that parts are disjoint, mix the classes, and are the same for everyone.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tl_jax.config import call
from tl_jax.data.arrays import open_idx, open_npz, open_sklearn
from tl_jax.data.base import (
    Source,
    check_labels,
    few_shots,
    fixed_permutation,
    predicted_labels,
    select,
    without_labels,
)
from tl_jax.data.episodes import episodes as draw_episodes
from tl_jax.data.images import open_folder
from tl_jax.data.multimnist import open_multimnist
from tl_jax.data.omniglot import open_omniglot
from tl_jax.data.pairs import open_bitext, open_pairs
from tl_jax.data.sinusoid import open_sinusoid
from tl_jax.data.svmlight import open_svmlight
from tl_jax.data.tables import open_table
from tl_jax.data.tfds import open_tfds
from tl_jax.errors import UserError, nearest

KINDS: dict[str, Callable[..., Source]] = {
    'sklearn': open_sklearn,
    'folder': open_folder,
    'npz': open_npz,
    'idx': open_idx,
    'csv': open_table,
    'tsv': open_table,
    'jsonl': open_table,
    'svmlight': open_svmlight,
    'tfds': open_tfds,
    'pairs': open_pairs,
    'multimnist': open_multimnist,
    'bitext': open_bitext,
    'omniglot': open_omniglot,
    'sinusoid': open_sinusoid,
}
COMMON_OPTIONS = ('num_classes', 'shots', 'shots_seed', 'labels', 'unlabelled', 'episodes')


def open_source(
    spec: str,
    *,
    num_classes: int | None = None,
    shots: int | None = None,
    shots_seed: int = 0,
    labels: str | None = None,
    unlabelled: bool = False,
    episodes: Mapping[str, Any] | None = None,
    **options,
) -> Source:
    """Opens `spec`; `options` are those of its kind (see `open_folder`, `open_table`, `open_npz`, … of this
    package).

    Labels must lie in 0 … `num_classes` - 1 where that is given. `shots=k` keeps k labelled examples of every
    class, drawn by `shots_seed` after the slice. `labels` names a run's `predictions/….npz` whose classes take the
    place of the labels; `unlabelled` hides them: no method can look at them. `episodes` makes each
    example a few-shot task of what is left (see `tl_jax.data.episodes`). Anything amiss is a UserError of one line.
    """
    kind, colon, rest = spec.partition(':')
    if not colon or kind not in KINDS:
        raise UserError(f'{spec}: unknown kind of data {kind!r}; {nearest(kind, KINDS)}')
    path, part = _split_slice(rest)
    if not path:
        raise UserError(f'{spec}: names no data after {kind!r}')
    known = [*list(inspect.signature(KINDS[kind]).parameters)[1:], *COMMON_OPTIONS]
    for option in options:
        if option not in known:
            raise UserError(f'{spec}: unknown option {option!r}; {nearest(option, known)}')
    source = KINDS[kind](path, **options)._replace(name=spec)
    check_labels(source, num_classes)
    if part is not None:
        source = select(source, _slice_indices(part, source.length, spec))
    if shots is not None:
        source = few_shots(source, shots, shots_seed)
    if labels is not None:
        source = predicted_labels(source, labels)
    if episodes is not None:
        if unlabelled:
            raise UserError(f'{spec}: episodes are made of labels; take away `unlabelled`')
        source = call(draw_episodes, episodes, f'{spec}: episodes', source)
    return without_labels(source) if unlabelled else source


def _split_slice(rest: str) -> tuple[str, str | None]:
    match = re.fullmatch(r'(.*?)\[([^\[\]]*:[^\[\]]*)\]', rest)
    return (match[1], match[2]) if match else (rest, None)


def _slice_indices(part: str, length: int, spec: str) -> np.ndarray:
    match = re.fullmatch(r'\s*(\d+%?)?\s*:\s*(\d+%?)?\s*', part)
    if not match:
        raise UserError(f'{spec}: [{part}] is no slice; write [:80%], [80%:] or [100:200]')
    start = _bound(match[1] or '0', length, spec)
    stop = _bound(match[2] or str(length), length, spec)
    if start >= stop:
        raise UserError(f'{spec}: [{part}] of {length} examples is empty')
    return np.sort(fixed_permutation(length)[start:stop])


def _bound(text: str, length: int, spec: str) -> int:
    bound = int(text[:-1]) * length // 100 if text.endswith('%') else int(text)
    if bound > length:
        raise UserError(f'{spec}: {text} reaches beyond the {length} examples')
    return bound
