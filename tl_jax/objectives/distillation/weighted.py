"""The terms of a config in their places: what they are called, what they weigh, what they learn and remember."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.config import asked, call, check_type
from tl_jax.errors import UserError, nearest
from tl_jax.objectives.distillation.base import FIELD, Pair, Term
from tl_jax.objectives.distillation.levels import Level, check_level
from tl_jax.objectives.distillation.terms import TERMS


class Weighted(NamedTuple):
    """A term in its place: `label` is its name in roles and logs, `where` its section, `level` its weight."""

    label: str
    where: str
    term: Term
    level: Level


def terms_from(sections: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[Weighted]:
    """Builds the terms of a config; a constructor gets those facts of the data that its signature asks for."""
    if not sections:
        raise UserError(f"{FIELD}.terms: is empty; add one, such as dict(name='soft_targets', temperature=4.0)")
    made: list[Weighted] = []
    for number, section in enumerate(sections):
        where = f'{FIELD}.terms[{number}]'
        check_type(section, Mapping, where)
        fields = dict(section)
        name, weight = fields.pop('name', None), fields.pop('weight', None)
        if name not in TERMS:
            raise UserError(f'{where}.name: {name!r} is not known; {nearest(str(name), TERMS)}')
        term = call(TERMS[name], fields, where, **asked(TERMS[name], facts))
        if weight is not None:
            check_level(weight, f'{where}.weight')
        before = sum(other.get('name') == name for other in sections[:number])
        label = f'{name}{before + 1}' if before else name
        made.append(Weighted(label, where, term, term.weight if weight is None else weight))
    return made


def begun(terms: Sequence[Weighted], pairs: Mapping[str, Pair], key: Array) -> dict[str, Any]:
    """What the terms learn and remember, by role and label: `params/projectors` and the collection `distillation`."""
    learned, kept = {}, {}
    for role, pair in pairs.items():
        for number, w in enumerate(terms):
            require(w, pair)
            own, remembered = jax.random.split(jax.random.fold_in(key, 1000 + number))
            learned = trees.merge(learned, {role: {w.label: w.term.init(own, pair)}})
            kept = trees.merge(kept, {role: {w.label: w.term.state(remembered, pair)}})
    # A term that learns or keeps nothing leaves no empty subtree: a step would hand back another structure.
    learned, kept = (trees.unflatten(trees.flatten(tree)) for tree in (learned, kept))
    params = {'params': {'projectors': learned}} if learned else {}
    return {**params, 'distillation': kept} if kept else params


def compared(
    terms: Sequence[Weighted],
    pairs: Mapping[str, Pair],
    shares: Float[Array, 'teachers #batch'],
    variables: Mapping[str, Any],
    key: Array,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Each term's value by its label, before its weight and over all teachers, and what the terms now remember."""
    learned, kept = variables['params'].get('projectors', {}), variables.get('distillation', {})
    values, states = {}, {}
    for number, (role, pair) in enumerate(pairs.items()):
        for place, w in enumerate(terms):
            params, state = (tree.get(role, {}).get(w.label, {}) for tree in (learned, kept))
            value, state = w.term.loss(params, state, pair, jax.random.fold_in(key, 1000 * (number + 1) + place))
            values[w.label] = values.get(w.label, 0.0) + jnp.mean(shares[number] * value)
            states = trees.merge(states, {role: {w.label: state}}) if state else states
    return values, states


def require(weighted: Weighted, pair: Pair) -> None:
    """Refuses a term that reads an endpoint which its network does not give."""
    for who, found, names in (
        ('student', pair.student, weighted.term.student),
        ('teacher', pair.teacher, weighted.term.teacher),
    ):
        missing = next((name for name in names if name not in found), None)
        if missing and not found:
            raise UserError(
                f"{weighted.where}: wants the {who}'s '{missing}', and this objective shows no endpoints of it"
            )
        if missing:
            raise UserError(f"{weighted.where}: the {who} gives no '{missing}'; it gives {', '.join(sorted(found))}")
