"""What the fields of models may be: each check refuses what no network can be built of, by the field's name."""

import numbers
from collections.abc import Sequence
from typing import Any

from flax import linen as nn

from tl_jax.errors import UserError, nearest
from tl_jax.models.transformer import ACTIVATIONS


def check_fields(
    model: nn.Module,
    *,
    sizes: Sequence[str] = (),
    counts: Sequence[str] = (),
    factors: Sequence[str] = (),
    rates: Sequence[str] = (),
) -> None:
    """Checks numbers by the names of their fields; of a sequence each, and None passes.

    Args:
      model: whose fields they are.
      sizes: integers of at least 1.
      counts: integers of at least 0.
      factors: positive numbers.
      rates: numbers of at least 0 and less than 1.

    Raises:
      UserError: one is out of range.
    """
    for names, kind, good, wanted in (
        (sizes, numbers.Integral, lambda x: x >= 1, 'an integer of at least 1'),
        (counts, numbers.Integral, lambda x: x >= 0, 'an integer of at least 0'),
        (factors, numbers.Real, lambda x: x > 0, 'a positive number'),
        (rates, numbers.Real, lambda x: 0 <= x < 1, 'a number of at least 0 and less than 1'),
    ):
        for name in names:
            value = getattr(model, name)
            for one in value if isinstance(value, list | tuple) else (value,):
                if one is not None and not (isinstance(one, kind) and good(one)):
                    raise UserError(f'model.{name}: must be {wanted}, not {one!r}')


def check_heads(heads: int, width: int) -> None:
    """Attention's heads share the width.

    Raises:
      UserError: they do not divide it.
    """
    if heads < 1 or width % heads:
        raise UserError(f'model.heads: {heads} does not divide the width {width}; choose a divisor')


def check_activation(name: str, field: str = 'activation') -> None:
    """An activation is one of `transformer.ACTIVATIONS`.

    Raises:
      UserError: it is not.
    """
    if name not in ACTIVATIONS:
        raise UserError(f'model.{field}: there is no {name!r}; {nearest(str(name), ACTIVATIONS)}')


def check_stages(stage_sizes: Sequence[int], widths: Sequence[Any] | None = None, field: str = 'stage_sizes') -> None:
    """There are stages, each has blocks and, where there are widths, one of them.

    Raises:
      UserError: not so.
    """
    if not stage_sizes or not all(isinstance(size, numbers.Integral) and size >= 1 for size in stage_sizes):
        raise UserError(f'model.{field}: must be integers of at least 1, one for each stage, not {list(stage_sizes)}')
    if widths is not None and len(widths) != len(stage_sizes):
        raise UserError(
            f'model.widths: {len(widths)} widths for {len(stage_sizes)} stages; '
            f'give model.{field} and model.widths the same length'
        )
