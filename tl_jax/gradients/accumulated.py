"""Gradients of large batches in little memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tl_jax import trees
from tl_jax.gradients.base import Gradient, plain, strided_parts


def accumulated(*, parts: int) -> Gradient:
    """The mean of the gradients of `parts` equal parts of the batch, one after the other in a scan.

    Holds the activations of one part at a time. Collections (batch statistics) are handed from part to part. Equal to
    `plain` for losses that are means over examples; batch normalisation sees parts, not the batch.
    """

    return Gradient(lambda loss: in_parts(plain().transform(loss), parts))


def in_parts(compute: Callable, parts: int) -> Callable:
    """The mean of what a gradient function `(params, collections, batch, key) -> (grads, value, aux)` gives for each part."""

    def gradient(params, collections, batch, key):
        def part(carry, inputs):
            sums, moving = carry
            examples, number = inputs
            grads, value, aux = compute(params, moving, examples, jax.random.fold_in(key, number))
            sums = jax.tree.map(jnp.add, sums, (grads, value, aux.metrics))
            return (sums, trees.merge(moving, aux.collections)), None

        split = jax.tree.map(lambda x: strided_parts(x, parts), batch)
        shapes = jax.eval_shape(compute, params, collections, jax.tree.map(lambda x: x[0], split), key)
        grads, value, aux = shapes
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, value, aux.metrics))
        (sums, moved), _ = jax.lax.scan(part, (zeros, collections), (split, jnp.arange(parts)))
        grads, value, metrics = jax.tree.map(lambda s: s / parts, sums)
        return grads, value, aux._replace(metrics=metrics, collections=moved)

    return gradient
