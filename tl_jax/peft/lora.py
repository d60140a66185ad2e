"""Low-rank adapters, y = x W + s x A B: LoRA, and what others start, scale or share differently.

For every kind of layer A B is a product of two thin layers (`tl_jax.peft.products`): of a convolution A has the layer's own
geometry and B is 1×1; of an embedding A is a table. Leaves: `lora_a` [rows, rank], `lora_b` [rank, columns].
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import nn
from jaxtyping import Array, Float

from tl_jax.peft.base import Adapter, Call, Parts, Site
from tl_jax.peft.products import (
    LAYERS,
    added,
    check_dropout,
    check_positive,
    check_rank,
    columns_of,
    low_rank,
    matrix_of,
    matrix_shape,
    projected,
    spread,
)

# Of the authors' code, which torch calls Kaiming uniform of a = √5: uniform within ± 1/√rows.
_start = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def lora(*, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, targets: str | None = None) -> Adapter:
    """LoRA (Hu et al. 2021, arXiv:2106.09685, sec. 4.1): y = x W + (α / r) x A B, with B = 0 at first.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) is the same, trained by two rules: `adapters/.*/lora_b` at 16 times the
    learning rate of the others.

    Args:
      rank: r, at most the smaller side of the layer's matrix.
      alpha: α.
      dropout: of what goes through A, in training.
      targets: regex of module paths; the family's own unless given (`tl_jax.peft.targets`).
    """
    check_positive(rank)
    return low_rank(_from_nothing(rank), _scaled(alpha / rank), dropout=dropout, targets=targets)


def rslora(*, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, targets: str | None = None) -> Adapter:
    """rsLoRA (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2): LoRA scaled by α / √r; fields as `lora`'s."""
    check_positive(rank)
    return low_rank(_from_nothing(rank), _scaled(alpha / math.sqrt(rank)), dropout=dropout, targets=targets)


def pissa(*, rank: int = 8, alpha: float = 8.0, dropout: float = 0.0, targets: str | None = None) -> Adapter:
    """PiSSA (Meng et al. 2024, arXiv:2404.02948, eq. 2-4): LoRA on the r largest singular directions, the rest frozen.

    W = U S Vᵀ; A = U_r √(S_r / s), B = √(S_r / s) V_rᵀ, s = α / r, and the layer keeps W − s A B. So what is left where the
    adapter is switched off is that rest. Fields as `lora`'s.
    """
    check_positive(rank)
    scale = alpha / rank

    def factors(w: Array) -> tuple[Array, Array]:
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
        root = jnp.sqrt(s[:rank] / scale)
        return u[:, :rank] * root, root[:, None] * vt[:rank]

    return low_rank(_out_of_weights(rank, scale, factors), _scaled(scale), dropout=dropout, targets=targets)


def olora(*, rank: int = 8, alpha: float = 8.0, dropout: float = 0.0, targets: str | None = None) -> Adapter:
    """OLoRA (Büyükakyüz 2024, arXiv:2406.01775, algorithm 1): LoRA from a QR factorisation, B with orthonormal rows.

    Wᵀ = Q R; B = Q_rᵀ, A = R_rᵀ, and the layer keeps W − s A B, s = α / r, as with `pissa`. Fields as `lora`'s.
    """
    check_positive(rank)
    scale = alpha / rank

    def factors(w: Array) -> tuple[Array, Array]:
        q, r = jnp.linalg.qr(w.T)
        return r[:rank].T, q[:, :rank].T

    return low_rank(_out_of_weights(rank, scale, factors), _scaled(scale), dropout=dropout, targets=targets)


def vera(
    *, rank: int = 256, start: float = 0.1, dropout: float = 0.0, seed: int = 0, targets: str | None = None
) -> Adapter:
    """VeRA (Kopiczko et al. 2023, arXiv:2310.11454, eq. 2): y = x W + (x A · d) B · b; A and B random, frozen and shared.

    One A [most rows, r] and one B [r, most columns] serve all layers, each with as much of them as it needs. Learns
    `lambda_d` [r] and `lambda_b` [columns], which starts at 0.

    Args:
      rank: r.
      start: of d.
      dropout: of what goes through A, in training.
      seed: of A and B.
      targets: regex of module paths; the family's own unless given.
    """
    check_positive(rank)

    def init(key, site: Site, weights) -> Parts:
        del key, weights
        return Parts({'lambda_d': jnp.full((rank,), start), 'lambda_b': jnp.zeros(matrix_shape(site)[1])})

    def share(key, sites) -> dict[str, Array]:
        del key  # the same in every run, so that adapters of several runs can share them too
        rows, columns = (max(sizes) for sizes in zip(*map(matrix_shape, sites), strict=True))
        for_a, for_b = jax.random.split(jax.random.key(seed))
        draw = nn.initializers.he_uniform()
        return {'vera_a': draw(for_a, (rows, rank)), 'vera_b': draw(for_b, (rank, columns))}

    def factors(parts: Parts, site: Site):
        rows, columns = matrix_shape(site)
        a, b = parts.constants['vera_a'][:rows], parts.constants['vera_b'][:, :columns]
        return a * parts.params['lambda_d'], b * parts.params['lambda_b']

    return low_rank(init, factors, dropout=dropout, share=share, targets=targets)


def dora(*, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, targets: str | None = None) -> Adapter:
    """DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5): the layer's matrix as m · (W + s A B) / ‖W + s A B‖, norms by column.

    s = α / r. The norm is a constant to the gradient (sec. 4.3), so y = m / ‖·‖ · (x W + s x A B) + bias, and no gradient
    of W's size is formed. No unmerging: the merged matrix has lost ‖W + s A B‖. Learns `lora_a`, `lora_b`, and `magnitude`
    m [columns], at first the norms of W's columns. Fields as `lora`'s.
    """
    check_positive(rank)
    check_dropout(dropout)
    factors = _scaled(alpha / rank)
    fresh = _from_nothing(rank)

    def init(key, site: Site, weights) -> Parts:
        plain = fresh(key, site, weights)
        norms = _column_norms(matrix_of(weights, site), *factors(plain, site))
        return Parts({**plain.params, 'magnitude': norms})

    def ratio(parts: Parts, w: Array, site: Site):
        return parts.params['magnitude'] / jax.lax.stop_gradient(_column_norms(w, *factors(parts, site)))

    def call(parts: Parts, call: Call, site: Site):
        a, b = factors(parts, site)
        y = call.run(call.inputs)
        bias = call.weights.get('bias', 0)
        change = spread(projected(call, a, site, dropout), b, site)
        by_column = ratio(parts, matrix_of(call.weights, site), site).reshape(columns_of(site))
        return (by_column * (y - bias + change) + bias).astype(y.dtype)

    def merge(parts: Parts, weights, site: Site):
        w = matrix_of(weights, site)
        a, b = factors(parts, site)
        return added(weights, ratio(parts, w, site) * (w + a @ b) - w, site)

    return Adapter(init, call, merge, kinds=LAYERS, targets=targets)


def _from_nothing(rank: int) -> Callable:
    """A random, B zero; of an embedding the other way round, so that only the rows that are looked up learn."""

    def init(key, site: Site, weights) -> Parts:
        del weights
        check_rank(rank, site)
        rows, columns = matrix_shape(site)
        if site.kind == 'embed':
            return Parts({'lora_a': jnp.zeros((rows, rank)), 'lora_b': jax.random.normal(key, (rank, columns))})
        return Parts({'lora_a': _start(key, (rows, rank)), 'lora_b': jnp.zeros((rank, columns))})

    return init


def _out_of_weights(rank: int, scale: float, factors: Callable[[Array], tuple[Array, Array]]) -> Callable:
    """A and B from the layer's matrix, which keeps the rest."""

    def init(key, site: Site, weights) -> Parts:
        del key
        check_rank(rank, site)
        a, b = factors(matrix_of(weights, site))
        return Parts({'lora_a': a, 'lora_b': b}, weights=added(weights, -scale * (a @ b), site))

    return init


def _scaled(scale: float) -> Callable[[Parts, Site], tuple[Array, Array]]:
    return lambda parts, site: (parts.params['lora_a'], scale * parts.params['lora_b'])


def _column_norms(w: Array, a: Array, b: Array) -> Float[Array, 'columns']:
    """‖W + A B‖ of each column, without forming the sum."""
    squares = jnp.sum(w * w, 0) + 2 * jnp.sum((a.T @ w) * b, 0) + jnp.sum(b * (a.T @ a @ b), 0)
    return jnp.sqrt(jnp.maximum(squares, 1e-24))
