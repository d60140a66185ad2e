"""Overhaul of feature distillation: the student follows what the teacher's last ReLU lets through, and little else."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tl_jax.objectives.distillation.base import Pair, Term
from tl_jax.objectives.distillation.layers import (
    Layers,
    aligned,
    at_least_float32,
    each_layer,
    layer_pairs,
    reads,
    require_maps,
)
from tl_jax.objectives.distillation.projectors import project, projector_init


def ofd(*, layers: Layers) -> Term:
    """A comprehensive overhaul of feature distillation (Heo et al. 2019, arXiv:1904.01866, eq. 1 to 5).

    Σ_{l = 1…n} 2^{l - n} Σ_{h, w, c} d_p(max(t, m_c), r(s)),   d_p(t, s) = 0 where s ≤ t ≤ 0, else (t - s)²

    of maps before their ReLU. m_c, the margin, is the mean of channel c of the teacher where it is negative (eq. 5), taken over
    all the data when a stage begins (the authors' code derives it from the batch normalisation before the ReLU, which in a
    residual block is not all that the ReLU sees). r is a 1×1 convolution and batch normalisation. The halving weights of
    earlier layers, the sum over positions and channels and the weight 0.001 are the authors' code's.

    Args:
      layers: maps [B, H, W, C] from the input on; 'stage1_preactivation', … of a residual network with `preactivations=True`.
    """
    names = layer_pairs(layers)
    teachers = reads(names)['teacher']

    def init(key, pair: Pair):
        require_maps('ofd', pair, names)
        return each_layer(key, pair, names, lambda key, s, t: projector_init(key, s, t, norm=True))

    def state(key, pair: Pair):
        del key
        return {name: jnp.zeros(pair.teacher[name].shape[-1]) for name in teachers}

    def refresh(state, pairs):
        del state
        totals = {}
        for pair in pairs:
            sums = {name: negatives(pair.teacher[name], pair.fields['mask']) for name in teachers}
            totals = jax.tree.map(jnp.add, totals, sums) if totals else sums
        return {name: total / jnp.maximum(count, 1) for name, (total, count) in totals.items()}

    def loss(params, state, pair, key):
        value = 0.0
        for place, (student, teacher) in enumerate(names, start=1):
            s, t = aligned(pair, (student, teacher))
            distance = partial_square(project(params[f'layer{place}'], s), jnp.maximum(t, state[teacher]))
            value += 0.5 ** (len(names) - place) * jnp.sum(distance, (1, 2, 3))
        return value, state

    return Term(loss, weight=1e-3, init=init, state=state, refresh=refresh, **reads(names))


def partial_square(s: Float[Array, '*batch'], t: Float[Array, '*batch']) -> Float[Array, '*batch']:
    """(s - t)², but 0 where the teacher's ReLU is closed and the student is below it."""
    return jnp.where((s > t) | (t > 0), jnp.square(s - t), 0.0)


@jax.jit
def negatives(t: Float[Array, 'batch height width channels'], mask: Float[Array, 'batch']) -> tuple[Array, Array]:
    """Of each channel the sum of what is below zero, and how many numbers that are."""
    t = at_least_float32(t)
    below = (t < 0) & (mask > 0)[:, None, None, None]
    return jnp.sum(jnp.where(below, t, 0.0), (0, 1, 2)), jnp.sum(below, (0, 1, 2))
