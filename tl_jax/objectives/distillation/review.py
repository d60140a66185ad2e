"""Knowledge review: each level of the student, fused with the deeper ones, follows the teacher's level."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.objectives.distillation.base import Pair, Term
from tl_jax.objectives.distillation.layers import FIELD, Layers, at_least_float32, averaged, layer_pairs, reads
from tl_jax.objectives.distillation.projectors import (
    batch_norm,
    conv,
    conv_init,
    dense,
    dense_init,
    norm_init,
    project,
    projector_init,
)


def reviewkd(*, layers: Layers) -> Term:
    """Distilling knowledge via knowledge review (Chen et al. 2021, arXiv:2104.09044, eq. 8, sec. 3.3 and 3.4).

    Σ_l hcl(o_l, t_l), from the deepest level to the first: (o_l, y_l) = ABF(s_l, y_{l+1}).

    ABF, fusion by attention: x = norm(conv1×1(s_l)), z = sigmoid(conv1×1([x, y])), y_l = z_1 x + z_2 y with y_{l+1} enlarged to
    s_l's positions; o_l = norm(conv3×3(y_l enlarged to t_l's)). The deepest level has no y. HCL: the mean square of o - t,
    and of their means over 4×4, 2×2 and 1 regions as far as these are fewer than the map's, of weights 1, ½, ¼, ⅛ divided by
    their sum. The default weight 1 is grown over the first 20 of 240 epochs by the authors:
    `weight=dict(start=0.0, end=1.0, until=0.083)`; their WRN pairs take 5 and others up to 8.

    Args:
      layers: from the input on, maps [B, H, W, C] and vectors [B, C], which count as maps of one position; in the paper the
        stages and, last, 'features'. The authors take the teacher's maps before their ReLU.
    """
    names = layer_pairs(layers)

    def init(key, pair: Pair):
        shapes = [(pair.student[s].shape, pair.teacher[t].shape) for s, t in names]
        for (student, teacher), (s, t) in zip(names, shapes, strict=True):
            if not {len(s), len(t)} <= {2, 4}:
                raise UserError(
                    f"{FIELD}: reviewkd fuses maps [B, H, W, C] and vectors [B, C], and the student's '{student}' is "
                    f"{list(s)}, the teacher's '{teacher}' {list(t)}"
                )
        middle = min(512, shapes[-1][0][-1])
        return {
            f'layer{i}': fusion_init(jax.random.fold_in(key, i), s[-1], middle, t[-1], fused=i < len(names))
            for i, (s, t) in enumerate(shapes, start=1)
        }

    def loss(params, state, pair, key):
        value, deeper = 0.0, None
        for place, (student, teacher) in reversed(list(enumerate(names, start=1))):
            s, t = as_map(pair.student[student]), as_map(pair.teacher[teacher])
            own = params[f'layer{place}']
            deeper = fused(own, s, deeper)
            out = batch_norm(own['out_norm'], conv(own['out'], enlarged(deeper, *t.shape[1:3])))
            value += hierarchical(out, t)
        return value, state

    return Term(loss, init=init, **reads(names))


def fusion_init(key: Array, channels: int, middle: int, width: int, *, fused: bool) -> dict:
    inner, outer, gate = jax.random.split(key, 3)
    made = {
        'in': projector_init(inner, channels, middle, norm=True),
        'out': conv_init(outer, middle, width, bias=False),
        'out_norm': norm_init(width),
    }
    return {**made, 'gate': dense_init(gate, 2 * middle, 2)} if fused else made


def fused(params, s: Array, deeper: Array | None) -> Float[Array, 'batch height width middle']:
    """A level's channels, beside the deeper levels' and weighed with them at every position."""
    x = project(params['in'], s)
    if deeper is None:
        return x
    y = enlarged(deeper, *x.shape[1:3])
    z = nn.sigmoid(dense(params['gate'], jnp.concatenate([x, y], -1)))
    return x * z[..., :1] + y * z[..., 1:]


def hierarchical(s: Float[Array, 'batch height width channels'], t: Array) -> Float[Array, 'batch']:
    """The hierarchical context loss: mean squares over positions, and over ever fewer regions."""
    distance = lambda s, t: jnp.mean(jnp.square(s - t), (1, 2, 3))
    value, weight, total = distance(s, t), 1.0, 1.0
    for regions in (4, 2, 1):
        if regions < min(s.shape[1:3]):
            weight /= 2
            total += weight
            value += weight * distance(averaged(s, regions, regions), averaged(t, regions, regions))
    return value / total


def enlarged(x: Float[Array, 'batch height width channels'], rows: int, columns: int) -> Array:
    """The nearest position's numbers at rows × columns, as torch's 'nearest' finds it; also where the map is the larger."""
    row, column = (np.arange(new) * old // new for new, old in zip((rows, columns), x.shape[1:3], strict=True))
    return x[:, row][:, :, column]


def as_map(x: Array) -> Float[Array, 'batch height width channels']:
    x = at_least_float32(x)
    return x if x.ndim == 4 else x[:, None, None]
