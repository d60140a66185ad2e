"""The protocol between a loss and its gradient, and the plain gradient."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tl_jax.errors import UserError


class Gradient(NamedTuple):
    """How a loss becomes a gradient.

    Attributes:
      transform: takes a loss `(params, collections, batch, key) -> (scalar, Aux)` and returns a function of the same
        arguments that gives `(gradients of params, scalar, Aux)`. `params` are the trainable ones of the phase alone; the
        loss closes over the others. What is returned need not be a derivative.
      figures: steps taken -> {name: float}, logged with every evaluation, such as the privacy spent.
    """

    transform: Callable[[Callable], Callable]
    figures: Callable[[int], dict[str, float]] = lambda steps: {}


def plain() -> Gradient:
    """The gradient of the loss over the whole batch."""

    def transform(loss: Callable) -> Callable:
        def gradient(params, collections, batch, key):
            (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, collections, batch, key)
            return grads, value, aux

        return gradient

    return Gradient(transform)


def strided_parts(x: jax.Array, parts: int) -> jax.Array:
    """A batch [B, …] as [parts, B / parts, …]; strided, so that each part takes its share of every device's examples."""
    if parts < 1 or x.shape[0] % parts:
        raise UserError(f'config.gradient.parts: {parts} parts do not divide a batch of {x.shape[0]}')
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
