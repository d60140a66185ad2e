"""A layer's weight as one matrix [rows, columns], and a product of two thin ones beside it, for any kind of layer.

Rows are what an output is summed over: inputs of a dense layer, positions × channels of a convolution's kernel (in one
group), ids of an embedding. Nothing here forms a matrix of that size but `delta` of a merge.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.peft.base import Adapter, Call, Parts, Site, contracted, reparametrized

LAYERS = ('dense', 'conv', 'embed')


def leaf_of(site: Site) -> str:
    """Name of the leaf that is the layer's matrix."""
    return 'embedding' if site.kind == 'embed' else 'kernel'


def matrix_shape(site: Site) -> tuple[int, int]:
    """Rows and columns of the layer's matrix."""
    kernel = site.weights[leaf_of(site)]
    axes = summed_axes(site) if site.kind == 'dense' else len(kernel.shape) - 1
    return math.prod(kernel.shape[:axes]), math.prod(kernel.shape[axes:])


def summed_axes(site: Site) -> int:
    """How many of the input's last axes an output is summed over."""
    return contracted(site.weights['kernel'], site.inputs, site.outputs) if site.kind == 'dense' else 1


def columns_of(site: Site) -> tuple[int, ...]:
    """The output's last axes that the matrix's columns make."""
    return site.weights['kernel'].shape[summed_axes(site) :] if site.kind == 'dense' else matrix_shape(site)[1:]


def groups_of(site: Site) -> int:
    """Groups of a convolution; 1 for every other layer."""
    return site.inputs.shape[-1] // site.weights['kernel'].shape[-2] if site.kind == 'conv' else 1


def matrix_of(weights: dict[str, Any], site: Site) -> Float[Array, 'rows columns']:
    """The layer's matrix, in float32.

    Raises:
      UserError: the layer does not use it as it is stored.
    """
    if reparametrized(site):
        raise UserError(
            f"config.model.peft: '{site.path}' standardises its kernel, which this method cannot start from; use lora"
        )
    return weights[leaf_of(site)].astype(jnp.float32).reshape(matrix_shape(site))


def added(weights: dict[str, Any], change: Float[Array, 'rows columns'], site: Site) -> dict[str, Any]:
    """The leaves of the layer with the change added to its matrix."""
    name = leaf_of(site)
    return {**weights, name: weights[name] + change.reshape(weights[name].shape).astype(weights[name].dtype)}


def project(x: Array, a: Float[Array, 'rows rank'], site: Site) -> Array:
    """What the layer, were `a` its matrix and no bias there, gives: [..., rank], or [..., groups, rank] in several groups.

    A convolution has the geometry of the layer's own.
    """
    rank = a.shape[-1]
    if site.kind == 'embed':
        return jnp.take(a, x, axis=0)
    if site.kind == 'dense':
        return x.reshape(*x.shape[: x.ndim - summed_axes(site)], a.shape[0]) @ a.astype(x.dtype)
    groups = groups_of(site)
    y = convolved(x, jnp.tile(a.reshape(*site.weights['kernel'].shape[:-1], rank), groups), site)
    return y if groups == 1 else y.reshape(*y.shape[:-1], groups, rank)


def convolved(x: Array, kernel: Array, site: Site) -> Array:
    """What a convolution of the layer's geometry gives with another kernel, without a bias."""
    plain = {'reparametrize': None} if reparametrized(site) else {}
    layer = site.module.clone(features=kernel.shape[-1], use_bias=False, **plain)
    return layer.apply({'params': {'kernel': kernel}}, x)


def spread(z: Array, b: Float[Array, 'rank columns'], site: Site) -> Array:
    """`z @ b` of a projected `z`, in the shape of the layer's outputs."""
    b = b.astype(z.dtype)
    if site.kind == 'dense':
        return (z @ b).reshape(*z.shape[:-1], *columns_of(site))
    groups = groups_of(site)
    if groups == 1:
        return z @ b
    y = jnp.einsum('...gr,rgo->...go', z, b.reshape(b.shape[0], groups, -1))
    return y.reshape(*z.shape[:-2], -1)


def check_dropout(rate: float) -> None:
    """Refuses what is no share that dropout leaves something of."""
    if not 0 <= rate < 1:
        raise UserError(f'config.model.peft.dropout: must be at least 0 and less than 1, not {rate}')


def check_positive(rank: int) -> None:
    """Refuses a rank that no layer's matrix can have, ahead of the first division by it."""
    if rank < 1:
        raise UserError(f'config.model.peft.rank: must be at least 1, not {rank}')


def check_rank(rank: int, site: Site) -> None:
    """Refuses a rank that the layer's matrix cannot have."""
    rows, columns = matrix_shape(site)
    if not 1 <= rank <= min(rows, columns):
        raise UserError(
            f"config.model.peft.rank: {rank} is not within 1 … {min(rows, columns)}, the smaller side of '{site.path}', "
            f'{rows} × {columns}'
        )


def low_rank(
    init: Callable,
    factors: Callable[[Parts, Site], tuple[Array, Array]],
    *,
    dropout: float = 0.0,
    share: Callable | None = None,
    targets: str | None = None,
) -> Adapter:
    """The adapter y = layer(x) + dropout(x) A B.

    Args:
      init: as `Adapter.init`.
      factors: (Parts, Site) -> A [rows, rank], B [rank, columns].
      dropout: of what goes through A, in training; of the rows that are looked up, where that is an embedding.
      share: as `Adapter.share`.
      targets: regex of module paths.
    """
    check_dropout(dropout)

    def call(parts: Parts, call: Call, site: Site):
        a, b = factors(parts, site)
        y = call.run(call.inputs)
        return (y + spread(projected(call, a, site, dropout), b, site)).astype(y.dtype)

    def merge(parts: Parts, weights, site: Site):
        a, b = factors(parts, site)
        return added(weights, a @ b, site)

    def unmerge(parts: Parts, weights, site: Site):
        a, b = factors(parts, site)
        return added(weights, -(a @ b), site)

    return Adapter(init, call, merge, unmerge, share=share, kinds=LAYERS, targets=targets)


def projected(call: Call, a: Float[Array, 'rows rank'], site: Site, dropout: float) -> Array:
    """`project` of a call's inputs, dropped out in training."""
    if site.kind == 'embed':  # ids cannot be dropped, but what stands for them can
        return call.drop(dropout, project(call.inputs, a, site))
    return project(call.drop(dropout, call.inputs), a, site)
