"""Products of another structure than LoRA's: Hadamard (LoHa) and Kronecker (LoKr), each without the matrix itself."""

import math

import jax
import jax.numpy as jnp
from jax import nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.peft.base import Adapter, Call, Parts, Site
from tl_jax.peft.products import (
    LAYERS,
    added,
    check_dropout,
    check_rank,
    convolved,
    groups_of,
    low_rank,
    matrix_shape,
    summed_axes,
)

_draw = nn.initializers.he_uniform()


def loha(*, rank: int = 8, alpha: float = 8.0, dropout: float = 0.0, targets: str | None = None) -> Adapter:
    """LoHa (FedPara: Hyeon-Woo et al. 2021, arXiv:2108.06098, prop. 1): ΔW = (α / r) (A₁ B₁) ⊙ (A₂ B₂), of rank up to r².

    As (A₁ B₁) ⊙ (A₂ B₂) = (A₁ • A₂)(B₁ ∗ B₂), products of each row's (column's) pairs of entries, it costs what LoRA of rank
    r² does. Learns `hada_a1`, `hada_a2` [rows, r] and `hada_b1`, `hada_b2` [r, columns], the last 0 at first.

    Args:
      rank: r, at most the smaller side of the layer's matrix.
      alpha: α.
      dropout: of what goes through A, in training.
      targets: regex of module paths; the family's own unless given.
    """

    def init(key, site: Site, weights) -> Parts:
        del weights
        check_rank(rank, site)
        rows, columns = matrix_shape(site)
        keys = jax.random.split(key, 3)
        return Parts(
            {
                'hada_a1': _draw(keys[0], (rows, rank)),
                'hada_a2': _draw(keys[1], (rows, rank)),
                'hada_b1': _draw(keys[2], (rank, columns)),
                'hada_b2': jnp.zeros((rank, columns)),
            }
        )

    def factors(parts: Parts, site: Site):
        p = parts.params
        a = jnp.einsum('ip,iq->ipq', p['hada_a1'], p['hada_a2'])
        b = jnp.einsum('pj,qj->pqj', p['hada_b1'], p['hada_b2'])
        return a.reshape(a.shape[0], -1), alpha / rank * b.reshape(-1, b.shape[-1])

    return low_rank(init, factors, dropout=dropout, targets=targets)


def lokr(
    *, rank: int = 8, alpha: float = 8.0, factor: int | None = None, dropout: float = 0.0, targets: str | None = None
) -> Adapter:
    """LoKr (Yeh et al. 2023, arXiv:2309.14859, sec. 3.2): ΔW = (α / r) C ⊗ (A B), C of about √rows × √columns, 0 at first.

    Of a convolution C mixes channels, and A holds the kernel's positions. The product is of x's two axes one after the
    other, so nothing of W's size is formed. Learns `lokr_c`, `lokr_a`, `lokr_b`, or where r is no less than the smaller side
    of A B `lokr_w` in place of these two.

    Args:
      rank: r, at most the smaller side of the layer's matrix.
      alpha: α.
      factor: rows and columns of C, where they divide the layer's; else, and unless given, their largest divisors up to
        the root.
      dropout: of the layer's inputs, or of what is looked up, in training.
      targets: regex of module paths; the family's own unless given.
    """
    check_dropout(dropout)
    if factor is not None and factor < 1:
        raise UserError(f"config.model.peft.factor: must be at least 1, or None for the layer's own, not {factor}")

    def init(key, site: Site, weights) -> Parts:
        del weights
        check_rank(rank, site)
        taps, (c_rows, rows), (c_columns, columns) = _kronecker_sizes(site, factor)
        c, keys = jnp.zeros((c_rows, c_columns)), jax.random.split(key)
        if rank >= min(taps * rows, columns):
            return Parts({'lokr_c': c, 'lokr_w': _draw(key, (taps * rows, columns))})
        a, b = _draw(keys[0], (taps * rows, rank)), _draw(keys[1], (rank, columns))
        return Parts({'lokr_c': c, 'lokr_a': a, 'lokr_b': b})

    def block(parts: Parts) -> Float[Array, 'rows columns']:
        p = parts.params
        return alpha / rank * (p['lokr_w'] if 'lokr_w' in p else p['lokr_a'] @ p['lokr_b'])

    def call(parts: Parts, call: Call, site: Site):
        y, c, w = call.run(call.inputs), parts.params['lokr_c'], block(parts)
        if site.kind == 'embed':
            rows = w.shape[0]
            z = jnp.take(c, call.inputs // rows, axis=0)[..., :, None] * w[call.inputs % rows][..., None, :]
            change = call.drop(dropout, z)
        else:
            x = call.drop(dropout, call.inputs)
            z = _by_block(x.reshape(*x.shape[: x.ndim - summed_axes(site)], c.shape[0], -1), w, site)
            change = jnp.einsum('...aj,ab->...bj', z, c.astype(z.dtype))
        return (y + change.reshape(y.shape)).astype(y.dtype)

    def delta(parts: Parts, site: Site) -> Float[Array, 'rows columns']:
        taps = _kronecker_sizes(site, factor)[0]
        w = block(parts)
        whole = jnp.einsum('ab,tij->taibj', parts.params['lokr_c'], w.reshape(taps, -1, w.shape[1]))
        return whole.reshape(matrix_shape(site))

    def merge(parts: Parts, weights, site: Site):
        return added(weights, delta(parts, site), site)

    def unmerge(parts: Parts, weights, site: Site):
        return added(weights, -delta(parts, site), site)

    return Adapter(init, call, merge, unmerge, kinds=LAYERS, targets=targets)


def _by_block(x: Float[Array, '*where blocks rows'], w: Float[Array, 'taps_rows columns'], site: Site) -> Array:
    """Each block of the input through the same small layer: [..., blocks, columns]."""
    if site.kind == 'dense':
        return x @ w.astype(x.dtype)
    kernel = w.reshape(*site.weights['kernel'].shape[:-2], x.shape[-1], w.shape[1])
    return jax.vmap(lambda block: convolved(block, kernel, site), -2, -2)(x)


def _kronecker_sizes(site: Site, factor: int | None) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Positions of the kernel, and of rows and columns: how many C has, and how many A B."""
    if groups_of(site) > 1:
        raise UserError(
            f"config.model.peft: '{site.path}' is a convolution in groups, which lokr does not know; use lora"
        )
    rows, columns = matrix_shape(site)
    taps = math.prod(site.weights['kernel'].shape[:-2]) if site.kind == 'conv' else 1
    return taps, _divided(rows // taps, factor), _divided(columns, factor)


def _divided(size: int, factor: int | None) -> tuple[int, int]:
    """(factor, size / factor), the factor the largest up to the root unless it is given and divides."""
    if factor is None or size % factor:
        factor = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    return factor, size // factor
