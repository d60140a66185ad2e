"""Terms by which the student predicts the teacher's features."""

import jax
import jax.numpy as jnp
from jax import nn

from tl_jax.errors import UserError
from tl_jax.objectives.distillation.base import Pair, Term
from tl_jax.objectives.distillation.layers import (
    FIELD,
    Layers,
    aligned,
    at_least_float32,
    each_layer,
    layer_pairs,
    mean_of_example,
    over_layers,
    reads,
    require_joinable,
    require_same_channels,
)
from tl_jax.objectives.distillation.projectors import dense, dense_init, project, projector_init


def hints(*, layers: Layers, projection: bool = True, norm: bool = False) -> Term:
    """FitNets' hints (Romero et al. 2015, arXiv:1412.6550, eq. 3): Σ_layers mean (r(s) - t)², means over all but the batch.

    r is a linear map of channels, at each position of the smaller map of the two; the paper's regressor is a convolution
    without padding, which shrinks the student's map to the teacher's, and its loss ½ Σ in place of the mean. There the hints
    are a stage of their own: `label_weight=0` and rules for `backbone/…` up to the layer and for `projectors/.*`; then
    soft targets. RepDistiller adds them to the labels' loss, with this mean and the weight 100.

    Args:
      layers: maps [B, H, W, C], sequences [B, L, C] or vectors [B, C]; a map meets a vector by its mean over positions.
      projection: whether there is an r; without one the channels must be as many.
      norm: whether batch normalisation follows it.
    """
    names = layer_pairs(layers)
    if norm and not projection:
        raise UserError(
            f'{FIELD}: hints.norm follows the projection, and projection=False leaves none; drop one of the two'
        )

    def init(key, pair: Pair):
        require_joinable('hints', pair, names)
        if not projection:
            require_same_channels('hints without a projection', pair, names)
            return {}
        return each_layer(key, pair, names, lambda key, s, t: projector_init(key, s, t, norm=norm))

    def loss(params, state, pair, key):
        def apart(own, both):
            s, t = aligned(pair, both)
            return mean_of_example(jnp.square((project(own, s) if projection else s) - t))

        return over_layers(params, names, apart), state

    return Term(loss, init=init, **reads(names))


def vid(*, layers: Layers, variance: float = 5.0) -> Term:
    """Variational information distillation (Ahn et al. 2019, arXiv:1904.05835, eq. 3 to 6).

    Σ_layers mean over positions and channels of  (t_c - μ_c(s))² / (2 σ_c²) + ½ log σ_c²,  σ_c² = log(1 + exp(α_c)) + 1e-5

    up to a constant the teacher's negative log-likelihood under a Gaussian of mean μ(s) and a learned variance for each
    channel, in nats per number (the paper's are summed, the authors' code takes the mean). μ has three linear maps of channels
    to the teacher's width without biases, and ReLUs between; the default weight 1 is RepDistiller's.

    Args:
      layers: maps [B, H, W, C], sequences [B, L, C] or vectors [B, C].
      variance: σ² in the beginning.
    """
    names, floor = layer_pairs(layers), 1e-5
    if not variance > floor:
        raise UserError(f'{FIELD}: vid.variance must be above {floor}, not {variance}; 5 is the authors’')

    def regressor(key, channels, width):
        keys = jax.random.split(key, 3)
        widths = ((channels, width), (width, width), (width, width))
        maps = {
            f'linear{i}': dense_init(k, *w, bias=False) for i, (k, w) in enumerate(zip(keys, widths, strict=True), 1)
        }
        return {**maps, 'alpha': jnp.full(width, jnp.log(jnp.expm1(variance - floor)))}

    def init(key, pair: Pair):
        require_joinable('vid', pair, names)
        return each_layer(key, pair, names, regressor)

    def loss(params, state, pair, key):
        def surprise(own, both):
            s, t = aligned(pair, both)
            mu = dense(own['linear3'], nn.relu(dense(own['linear2'], nn.relu(dense(own['linear1'], s)))))
            var = nn.softplus(own['alpha']) + floor
            return 0.5 * mean_of_example(jnp.square(t - mu) / var + jnp.log(var))

        return over_layers(params, names, surprise), state

    return Term(loss, init=init, **reads(names))


def srrl(
    *, student: str, teacher: str = 'features', feature_weight: float = 1.0, prediction_weight: float = 1.0
) -> Term:
    """Softmax regression representation learning (Yang et al. 2021, ICLR, "Knowledge distillation via softmax regression …").

    feature_weight · mean_c (φ_c - h_c)² + prediction_weight · mean_k (W_k φ - W_k h)²    (eq. 3 and 5, as the authors' code)

    h are the teacher's features and W its head, which does not learn; φ is the mean over positions of
    relu(norm(conv1×1(s))). What the teacher's own classifier makes of the student's features shall be what it makes of its own.

    Args:
      student: its endpoint, the last map [B, H, W, C] in the paper ('stage3', say), or a vector.
      teacher: the features [B, D] that its head reads.
      feature_weight: α.
      prediction_weight: β.
    """
    names = (student, teacher)

    def init(key, pair: Pair):
        s, t = pair.student[student].shape, pair.teacher[teacher].shape
        if len(s) not in (2, 4) or len(t) != 2:
            raise UserError(
                f"{FIELD}: srrl puts a map or a vector of the student in the place of the teacher's features [B, D]; "
                f"'{student}' is {list(s)} and '{teacher}' {list(t)}"
            )
        if 'logits' not in pair.teacher:
            raise UserError(
                f'{FIELD}: srrl asks the teacher’s head what it makes of features, and the teacher has none'
            )
        return projector_init(key, s[-1], t[-1], norm=True)

    def loss(params, state, pair, key):
        s, t = (at_least_float32(side[name]) for side, name in zip((pair.student, pair.teacher), names, strict=True))
        phi = nn.relu(project(params, s))
        phi = phi if phi.ndim == 2 else jnp.mean(phi, (1, 2))
        predicted, wanted = pair.teacher_head(phi), pair.teacher_head(t)
        features, logits = (mean_of_example(jnp.square(a - b)) for a, b in ((phi, t), (predicted, wanted)))
        return feature_weight * features + prediction_weight * logits, state

    return Term(loss, init=init, **reads([names]))
