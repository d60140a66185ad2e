"""Terms that compare what maps say without their channels one by one: where they are active, and what flows between two."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.objectives.distillation.base import Pair, Term, comparing
from tl_jax.objectives.distillation.layers import (
    FIELD,
    Layers,
    aligned,
    at_least_float32,
    averaged,
    layer_pairs,
    reads,
    require_maps,
    require_same_channels,
)


def attention(*, layers: Layers, form: Literal['paper', 'code'] = 'code', power: float = 2.0) -> Term:
    """Attention transfer (Zagoruyko & Komodakis 2017, arXiv:1612.03928, sec. 3.1, eq. 2): Σ_layers d(q_s, q_t).

    q = vec(Σ_c |A_c|^p) / ‖vec(Σ_c |A_c|^p)‖₂ of a map A [H, W, C], and d is
      'paper': ½ ‖q_s - q_t‖₂, whose weight β is "about 0.1" (sec. 4.1); the default weight is that;
      'code': the mean over the H W positions of (q_s - q_t)², in which the authors' code and RepDistiller take β = 1000.
    Where the maps differ in size the larger is averaged to the smaller first, as in RepDistiller.

    Args:
      layers: maps [B, H, W, C] of any channels: 'stage1', or ['stage1', 'stage2'] of student and teacher.
      form: of d.
      power: p; 2 in the paper's experiments.
    """
    if not power > 0:
        raise UserError(f'{FIELD}: attention.power must be above 0, not {power}; 2 is the paper’s')
    names = layer_pairs(layers)

    def distance(q_s, q_t):
        squares = jnp.square(q_s - q_t)
        return jnp.mean(squares, -1) if form == 'code' else 0.5 * length(jnp.sum(squares, -1))

    def compare(pair):
        maps = (aligned(pair, pair_of_names) for pair_of_names in names)
        return sum(distance(attention_map(s, power), attention_map(t, power)) for s, t in maps)

    def init(key, pair: Pair):
        require_maps('attention', pair, names)
        return {}

    return comparing(compare, weight=1000.0 if form == 'code' else 0.1, init=init, **reads(names))


def attention_map(
    x: Float[Array, 'batch height width channels'], power: float = 2.0
) -> Float[Array, 'batch positions']:
    """Where a map is active: Σ_c |x_c|^p by position, of length 1 for each example."""
    # |x|^2 is x²: the gradient of |x| at zero, where a rectified map often is, is left out.
    energy = jnp.square(x) if power == 2 else jnp.abs(x) ** power
    q = jnp.mean(energy, -1).reshape(len(x), -1)
    return q / length(jnp.sum(jnp.square(q), -1, keepdims=True))


def length(square: Array) -> Array:
    """The root of a sum of squares; its gradient at zero is zero, not NaN."""
    return jnp.sqrt(jnp.maximum(square, 1e-24))


def fsp(*, layers: Layers) -> Term:
    """Flow of the solution procedure (Yim et al. 2017, CVPR, "A gift from knowledge distillation", eq. 1 and 2).

    Σ_i mean_{jk} (G_s - G_t)²_jk of each two layers that follow one another in `layers`, where
    G_jk = 1 / (H W) Σ_{h, w} F1[h, w, j] F2[h, w, k] says how two maps of one network go together.

    The paper sums over j and k and learns by this alone in a first stage (`label_weight=0`); the mean, and the weight 50 beside
    the labels, are RepDistiller's. Where a network's two maps differ in size the larger is averaged to the smaller (max
    pooling in the paper).

    Args:
      layers: maps [B, H, W, C], at least two, those of student and teacher of the same channels.
    """
    names = layer_pairs(layers)
    if len(names) < 2:
        raise UserError(f'{FIELD}: fsp compares what flows between two layers; name at least two in layers')

    def compare(pair):
        students = [at_least_float32(pair.student[s]) for s, _ in names]
        teachers = [at_least_float32(pair.teacher[t]) for _, t in names]
        flows = zip(map(flow, students, students[1:]), map(flow, teachers, teachers[1:]), strict=True)
        return sum(jnp.mean(jnp.square(g_s - g_t), (1, 2)) for g_s, g_t in flows)

    def init(key, pair: Pair):
        require_maps('fsp', pair, names)
        require_same_channels('fsp', pair, names)
        return {}

    return comparing(compare, weight=50.0, init=init, **reads(names))


def flow(first: Array, second: Array) -> Float[Array, 'batch channels_of_first channels_of_second']:
    """The mean over positions of the products of two maps' channels, on the positions of the smaller."""
    rows, columns = (min(a, b) for a, b in zip(first.shape[1:3], second.shape[1:3], strict=True))
    first, second = averaged(first, rows, columns), averaged(second, rows, columns)
    return jnp.einsum('bhwj,bhwk->bjk', first, second) / (rows * columns)
