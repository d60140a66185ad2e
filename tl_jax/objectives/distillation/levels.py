"""What a term, a teacher or a label counts: weights that may change over a stage, and shares of several teachers."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import nn
from jaxtyping import Array, Float

from tl_jax.config import call, check_type
from tl_jax.errors import UserError
from tl_jax.objectives.base import targets_of
from tl_jax.objectives.distillation.base import FIELD

# A number, or dict(start=…, end=…, until=…).
Level = float | Mapping[str, float]


def level(value: Level, fraction: Any) -> Any:
    """A weight at a place of the stage."""
    return ramp(fraction=fraction, **value) if isinstance(value, Mapping) else value


def ramp(*, fraction: Any, start: float, end: float, until: float = 1.0) -> Any:
    """From `start` to `end` in proportion to the stage's progress, there from the share `until` on."""
    return start + (end - start) * jnp.minimum(fraction / until, 1)


def check_level(value: Level, where: str) -> None:
    """Refuses a weight that is neither a number nor `dict(start=…, end=…, until=…)`."""
    check_type(value, float | Mapping, where)
    if not isinstance(value, Mapping):
        return
    until = value.get('until', 1.0)
    check_type(until, float, f'{where}.until')
    if not 0 < until <= 1:
        raise UserError(f'{where}.until: is a share of the stage, above 0 and at most 1, not {until}')
    call(ramp, value, where, fraction=0.0)


def teacher_shares(
    how: str | Sequence[float], teachers: Mapping[str, Mapping[str, Array]], fields: Mapping[str, Array]
) -> Float[Array, 'teachers #batch']:
    """w_ki: what each teacher counts for each example; a column sums to 1."""
    count = len(teachers)
    if not isinstance(how, str):
        shares = jnp.asarray(how, jnp.float32)
        return (shares / jnp.sum(shares))[:, None]
    if how == 'mean' or count == 1:
        return jnp.full((count, 1), 1 / count)
    missing = next((name for name, found in teachers.items() if 'logits' not in found), None)
    if missing:
        raise UserError(f"{FIELD}.teacher_weights: '{how}' needs a term that reads logits of the {missing}")
    log_p = jnp.stack([nn.log_softmax(found['logits'].astype(jnp.float32)) for found in teachers.values()])
    if how == 'entropy':
        return nn.softmax(jnp.sum(jnp.exp(log_p) * log_p, -1), 0)
    target = targets_of(fields, log_p.shape[-1])
    return (1 - nn.softmax(-jnp.sum(target * log_p, -1), 0)) / (count - 1)


def check_weights(weights: str | Sequence[float], count: int) -> None:
    """Refuses numbers that are no weights of so many teachers."""
    if isinstance(weights, str):
        return
    if len(weights) != count:
        raise UserError(f'{FIELD}.teacher_weights: {len(weights)} numbers for {count} teachers; give as many')
    if min(weights) < 0 or not sum(weights) > 0:
        raise UserError(f'{FIELD}.teacher_weights: must be 0 or more, and one above 0, not {list(weights)}')
