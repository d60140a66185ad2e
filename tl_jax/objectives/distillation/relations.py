"""Terms that compare how examples lie among themselves, or channels, for which widths need not be the same.

A relation of examples is one of the whole batch: gradients by parts (`accumulated`) compare within a part.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.objectives.base import unit
from tl_jax.objectives.distillation.base import Pair, Term, comparing
from tl_jax.objectives.distillation.layers import (
    FIELD,
    Layers,
    aligned,
    each_layer,
    layer_pairs,
    over_layers,
    reads,
    require_maps,
    require_same_channels,
)
from tl_jax.objectives.distillation.projectors import dense, dense_init, project, projector_init


def pkt(*, layers: Layers = ('features',), form: Literal['paper', 'code'] = 'code') -> Term:
    """Probabilistic knowledge transfer (Passalis & Tefas 2018, arXiv:1803.10837, sec. 3), nats.

    Σ_layers Σ_i KL(tᵢ ‖ sᵢ),  s_ij = k_ij / Σ_k k_ik,  k_ij = (1 + cos(xᵢ, xⱼ)) / 2, of the teacher's vectors and the student's

    The paper's sums are over j ≠ i; here a mean over i stands for the first. The authors' code has the mean over i and j, all
    of them, in place of both, and 1e-7 in its logarithms; RepDistiller's weight for it is the default, 30000.

    Args:
      layers: of any shape [B, …], taken as vectors.
      form: whose mean; the default weight of 'paper' is 1.
    """
    by_pairs = form == 'code'

    def compare(s, t):
        p, q = (affinities(x, with_itself=by_pairs) for x in (s, t))
        value = q * jnp.log((q + 1e-7) / (p + 1e-7))
        return jnp.mean(value, -1) if by_pairs else jnp.sum(value, -1)

    return among_examples(layers, compare, weight=3e4 if by_pairs else 1.0)


def rkd(*, layers: Layers = ('features',), distance: float = 25.0, angle: float = 50.0) -> Term:
    """Relational knowledge distillation (Park et al. 2019, arXiv:1904.05068, sec. 3.2), without unit.

    Σ_layers distance · mean_ij h(d_ijˢ - d_ijᵗ) + angle · mean_ijk h(cos ∠ijkˢ - cos ∠ijkᵗ)

    d_ij = ‖xᵢ - xⱼ‖ over the mean of that for i ≠ j, ∠ijk the angle at xⱼ, h Huber's loss with δ = 1. Means, as in the authors'
    code, over all B² pairs and B³ triples; the paper has sums. Weights as in RepDistiller. Memory grows as B² D + B³.

    Args:
      layers: of any shape [B, …], taken as vectors.
      distance: weight of the distances; 0 to leave them out.
      angle: the same of the angles.
    """
    if distance < 0 or angle < 0 or distance + angle == 0:
        raise UserError(f'{FIELD}: rkd has the weights distance={distance}, angle={angle}; give at least one above 0')

    def compare(s, t):
        s, t = differences(s), differences(t)
        value = distance * jnp.mean(optax.huber_loss(relative_lengths(s), relative_lengths(t)), -1) if distance else 0.0
        return value + angle * jnp.mean(optax.huber_loss(cosines(s), cosines(t)), (-2, -1)) if angle else value

    return among_examples(layers, compare)


def similarity(*, layers: Layers) -> Term:
    """Similarity-preserving distillation (Tung & Mori 2019, arXiv:1907.09682, eq. 1 to 3), without unit.

    Σ_layers ‖Gˢ - Gᵗ‖² / B²,  G [B, B] = X Xᵀ with rows of length 1, X [B, …] as vectors. The default weight is the paper's.
    """
    gram = lambda x: unit(x @ x.T)
    return among_examples(layers, lambda s, t: jnp.mean(jnp.square(gram(s) - gram(t)), -1), weight=3e3)


def correlation(*, layers: Layers = ('features',), gamma: float = 0.4, order: int = 2) -> Term:
    """Correlation congruence (Peng et al. 2019, arXiv:1904.01802, sec. 3), without unit.

    Σ_layers mean_ij (κ(sᵢ, sⱼ) - κ(tᵢ, tⱼ))²,  κ(x, y) = exp(-2γ) Σ_{p ≤ order} (2γ xᵀy)ᵖ / p!

    for x, y of length 1: Taylor's approximation to the kernel exp(-γ ‖x - y‖²). RepDistiller's rows named CC are of another
    formula, `correlation_code`.

    Args:
      layers: of any shape [B, …], taken as vectors.
      gamma: γ of the kernel.
      order: of its approximation.
    """
    if not gamma > 0 or order < 1:
        raise UserError(f'{FIELD}: correlation wants gamma above 0 and an order of 1 or more, not {gamma} and {order}')

    def kernel(x):
        cosine = unit(x) @ unit(x).T
        return math.exp(-2 * gamma) * sum((2 * gamma * cosine) ** p / math.factorial(p) for p in range(order + 1))

    return among_examples(layers, lambda s, t: jnp.mean(jnp.square(kernel(s) - kernel(t)), -1))


def correlation_code(*, layers: Layers = ('features',), width: int = 128) -> Term:
    """Correlation congruence as its authors gave it to RepDistiller: Σ_layers mean_i Σ_d |Δᵢd| |Δᵢ₊₁d|, i < B.

    Δ = A s + a - (B t + b): both networks' vectors under maps to `width` that learn with the student. The default weight is
    RepDistiller's. It says nothing of the teacher's relations; a student may lower it by what A and B forget.
    """
    names = layer_pairs(layers)

    def init(key, pair: Pair):
        require_vectors('correlation_code', pair, names)
        maps = lambda key, s, t: {'student': dense_init(key, s, width), 'teacher': dense_init(key, t, width)}
        return each_layer(key, pair, names, maps)

    def loss(params, state, pair, key):
        def neighbours(own, both):
            s, t = vectors(pair.student[both[0]]), vectors(pair.teacher[both[1]])
            gap = dense(own['student'], s) - dense(own['teacher'], t)
            return jnp.mean(jnp.sum(jnp.abs(gap[:-1] * gap[1:]), -1))

        return over_layers(params, names, neighbours), state

    return Term(loss, init=init, weight=0.02, **reads(names))


def ickd(*, layers: Layers, projection: bool = True) -> Term:
    """Inter-channel correlation (ICKD-C: Liu et al. 2021, arXiv:2202.03680, sec. 3), without unit.

    Σ_layers ‖Gˢ - Gᵗ‖² / C of each example,  G [C, C] = F Fᵀ with rows of length 1, F [C, H·W] a map's channels

    As the authors' code, with its weight; the paper's G is not normalised, its divisor C². The student's map first takes the
    teacher's channels by a 1×1 convolution and batch normalisation.

    Args:
      layers: maps [B, H, W, C], of any H and W.
      projection: whether there is that convolution; without it the channels must be as many.
    """
    names = layer_pairs(layers)

    def init(key, pair: Pair):
        require_maps('ickd', pair, names)
        if not projection:
            require_same_channels('ickd without a projection', pair, names)
            return {}
        return each_layer(key, pair, names, lambda key, s, t: projector_init(key, s, t, norm=True))

    def loss(params, state, pair, key):
        def apart(own, both):
            s, t = (
                side[name].astype(jnp.float32) for side, name in zip((pair.student, pair.teacher), both, strict=True)
            )
            s = project(own, s) if projection else s
            gap = unit(products(s, s)) - unit(products(t, t))
            return jnp.sum(jnp.square(gap), (1, 2)) / t.shape[-1]

        return over_layers(params, names, apart), state

    return Term(loss, init=init, weight=2.5, **reads(names))


def nst(*, layers: Layers, degree: int = 2) -> Term:
    """Neuron selectivity transfer (Huang & Wang 2017, arXiv:1707.01219, sec. 4): Σ_layers MMD² of an example's channels.

    mean_cc' k(sᶜ, sᶜ') + mean k(tᶜ, tᶜ') - 2 mean k(sᶜ, tᶜ'),  k(x, y) = (xᵀy)^degree

    xᶜ is a channel over the positions, of length 1; of two maps the larger is averaged to the smaller's positions. Without
    unit. The default weight is RepDistiller's; the paper halves 50.

    Args:
      layers: maps [B, H, W, C].
      degree: 2 in the paper, which also has 1, the linear kernel.
    """
    names = layer_pairs(layers)
    if degree < 1:
        raise UserError(f'{FIELD}: nst.degree must be 1 or more, not {degree}; 2 is the paper’s')

    kernel = lambda x, y: jnp.mean(products(x, y) ** degree, (1, 2))

    def discrepancy(s, t):
        return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)

    def compare(pair):
        return sum(discrepancy(*map(selectivity, aligned(pair, both))) for both in names)

    def init(key, pair: Pair):
        require_maps('nst', pair, names)
        return {}

    return comparing(compare, init=init, weight=50.0, **reads(names))


def among_examples(layers: Layers, compare: Callable[[Array, Array], Array], **attributes: Any) -> Term:
    """A term of the vectors that layers give of a batch: Σ_layers compare(student [B, D], teacher [B, E]) -> [B]."""
    names = layer_pairs(layers)

    def total(pair):
        if len(pair.student[names[0][0]]) < 2:
            raise UserError(
                f'{FIELD}: compares the examples of a batch, and this one has a single example; raise batch_size'
            )
        return sum(compare(vectors(pair.student[s]), vectors(pair.teacher[t])) for s, t in names)

    return comparing(total, **reads(names), **attributes)


def vectors(x: Float[Array, 'batch *rest']) -> Float[Array, 'batch dim']:
    return x.reshape(len(x), -1).astype(jnp.float32)


def affinities(x: Float[Array, 'batch dim'], *, with_itself: bool) -> Float[Array, 'batch batch']:
    """Rows of (1 + cosine) / 2 that sum to 1, an example's with itself among them or zero."""
    near = (1 + unit(x) @ unit(x).T) / 2
    near = near if with_itself else near * (1 - jnp.eye(len(x)))
    return near / jnp.sum(near, -1, keepdims=True)


def differences(x: Float[Array, 'batch dim']) -> Float[Array, 'batch batch dim']:
    return x[None] - x[:, None]


def relative_lengths(gaps: Float[Array, 'batch batch dim']) -> Float[Array, 'batch batch']:
    """Lengths over their mean, an example's distance to itself, zero, not counted."""
    others = 1 - jnp.eye(len(gaps))
    # The floor, the authors', keeps the root's gradient at zero from being infinite.
    lengths = jnp.sqrt(jnp.maximum(jnp.sum(gaps * gaps, -1), 1e-12)) * others
    return lengths * jnp.sum(others) / jnp.sum(lengths)


def cosines(gaps: Float[Array, 'batch batch dim']) -> Float[Array, 'batch batch batch']:
    """Of the angle at the first of three examples, between the ways to the second and to the third."""
    ways = unit(gaps)
    return jnp.einsum('jid,jkd->jik', ways, ways)


def products(
    x: Float[Array, 'batch height width channels'], y: Float[Array, 'batch height width others']
) -> Float[Array, 'batch channels others']:
    """Inner products over the positions, of each channel of one map with each of another."""
    return jnp.einsum('bhwc,bhwd->bcd', x, y)


def selectivity(x: Float[Array, 'batch height width channels']) -> Float[Array, 'batch height width channels']:
    """Each channel over the positions, to length 1."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, (1, 2), keepdims=True), 1e-12))


def require_vectors(term: str, pair: Pair, pairs: Sequence[tuple[str, str]]) -> None:
    for side, place in ((pair.student, 0), (pair.teacher, 1)):
        shape = next((list(side[names[place]].shape) for names in pairs if len(side[names[place]].shape) != 2), None)
        if shape:
            raise UserError(f"{FIELD}: {term} takes vectors [B, D], not {shape}; name such an endpoint, as 'features'")
