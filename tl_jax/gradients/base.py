"""The protocol between a loss and its gradient, and the plain gradient."""

from collections.abc import Callable
from typing import NamedTuple

import jax


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
