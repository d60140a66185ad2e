"""Moment matching: source and target features drawn together by a distance between their distributions."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

from tl_jax.errors import UserError, nearest
from tl_jax.objectives.adversarial import STREAMS, both_domains, ramp
from tl_jax.objectives.base import Aux, Model, Objective, accuracy, cross_entropy, inputs_of, label_of

# Around the mean squared distance by factors of 2, five of them, as in the authors' code.
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def covariance(x: Float[Array, 'batch dim']) -> Float[Array, 'dim dim']:
    """The unbiased one: (XᵀX - (1ᵀX)ᵀ(1ᵀX) / n) / (n - 1)."""
    centred = x - jnp.mean(x, 0)
    return jnp.matmul(centred.T, centred, precision=Precision.HIGHEST) / (x.shape[0] - 1)


def coral_distance(source: Float[Array, 'source dim'], target: Float[Array, 'target dim']) -> Float[Array, '']:
    """‖C_s - C_t‖²_F / (4 d²) of two covariances (Sun & Saenko 2016, arXiv:1607.01719, eq. 1-3)."""
    return jnp.sum((covariance(source) - covariance(target)) ** 2) / (4 * source.shape[-1] ** 2)


def mmd(
    source: Float[Array, 'batch dim'],
    target: Float[Array, 'batch dim'],
    *,
    bandwidths: Sequence[float] = BANDWIDTHS,
    estimator: Literal['unbiased', 'biased', 'linear'] = 'unbiased',
) -> Float[Array, '']:
    """Squared maximum mean discrepancy under k(x, y) = sum_u exp(-‖x - y‖² / (b_u m)).

    Args:
      source: n examples.
      target: n examples.
      bandwidths: b_u, in units of m, the mean squared distance of two of the 2n examples. m is a constant to the gradient.
      estimator: of E k(s, s') + E k(t, t') - 2 E k(s, t), over all pairs (Gretton et al. 2012, JMLR 13, eq. 3 and 5):
        'unbiased' without those of an example with itself, so it may be negative; 'biased' with them, never negative.
        'linear' is the mean over the quadruples of neighbours (s1, s2, t1, t2) of k(s1, s2) + k(t1, t2) - k(s1, t2)
        - k(s2, t1), unbiased, in time O(n) (Long et al. 2015, sec. 3.2).
    """
    source, target = source.astype(jnp.float32), target.astype(jnp.float32)
    both = jnp.concatenate([source, target])
    centred = both - jax.lax.stop_gradient(jnp.mean(both, 0))
    # The mean over pairs of distinct examples, without looking at pairs.
    scale = jax.lax.stop_gradient(2 * jnp.sum(centred**2) / (both.shape[0] - 1))
    scale = jnp.maximum(scale, 1e-12)

    def kernel(squared_distance):
        return sum(jnp.exp(-squared_distance / (b * scale)) for b in bandwidths)

    count = source.shape[0]
    if estimator == 'linear':
        s1, s2, t1, t2 = (x[i : count - count % 2 : 2] for x in (source, target) for i in (0, 1))
        near = [kernel(jnp.sum((a - b) ** 2, -1)) for a, b in ((s1, s2), (t1, t2), (s1, t2), (s2, t1))]
        return jnp.mean(near[0] + near[1] - near[2] - near[3])
    squares = jnp.sum(centred**2, -1)
    products = jnp.matmul(centred, centred.T, precision=Precision.HIGHEST)
    k = kernel(jnp.maximum(squares[:, None] + squares[None, :] - 2 * products, 0))
    own = jnp.sum(k[:count, :count]) + jnp.sum(k[count:, count:])
    across = 2 * jnp.mean(k[:count, count:])
    if estimator == 'biased':
        return own / count**2 - across
    return (own - jnp.trace(k)) / (count * (count - 1)) - across


def coral(
    model: Model,
    *,
    weight: float = 1.0,
    gamma: float = 0.0,
    layers: Sequence[str] = ('logits',),
    joint: bool = True,
) -> Objective:
    """Deep CORAL (Sun & Saenko 2016, arXiv:1607.01719, eq. 6).

    loss = CE(source) + weight · ramp · sum_layers ‖C_s - C_t‖²_F / (4 d²)

    The paper aligns the last layer, with the weight for which both terms are about equal when training ends. `layers` are
    endpoints of the network, flattened to [B, d]. See `ramp` for gamma, `both_domains` for joint.

    Expects streams `source` (with label [B]) and `target`. Returns nats.
    """
    return _matching(model, coral_distance, weight=weight, gamma=gamma, layers=layers, joint=joint)


def dan(
    model: Model,
    *,
    weight: float = 1.0,
    gamma: float = 0.0,
    layers: Sequence[str] = ('features', 'logits'),
    bandwidths: Sequence[float] = BANDWIDTHS,
    estimator: Literal['unbiased', 'biased', 'linear'] = 'unbiased',
    joint: bool = True,
) -> Objective:
    """Deep adaptation network (Long et al. 2015, arXiv:1502.02791, eq. 4): multi-kernel MMD of several layers.

    loss = CE(source) + weight · ramp · sum_layers MMD²(source, target)

    The kernels are added up with equal weights, as in the authors' released code and tllib, where the paper learns them; see
    `mmd` for bandwidths and estimators. `layers` are endpoints, flattened to [B, d]; one layer and one kernel is DDC (Tzeng
    et al. 2014, arXiv:1412.3474). See `ramp` for gamma, `both_domains` for joint.

    Expects streams `source` (with label [B]) and `target`. Returns nats.
    """
    if not bandwidths or min(bandwidths) <= 0:
        raise UserError(f'config.objective.bandwidths: must be positive numbers, not {list(bandwidths)}')

    def distance(source, target):
        return mmd(source, target, bandwidths=bandwidths, estimator=estimator)

    return _matching(model, distance, weight=weight, gamma=gamma, layers=layers, joint=joint)


def _matching(
    model: Model, distance: Callable, *, weight: float, gamma: float, layers: Sequence[str], joint: bool
) -> Objective:
    if not layers:
        raise UserError("config.objective.layers: names no endpoint; the usual one is ['features']")

    def init(key, batch):
        return model.init(key, inputs_of(batch['source']))

    def loss(variables, batch, key):
        source, target, moved = both_domains(model, variables, batch, key, joint=joint)
        distances = {}
        for layer in layers:
            if layer not in source:
                raise UserError(f"config.objective.layers: there is no endpoint '{layer}'; {nearest(layer, source)}")
            flat = (x[layer].astype(jnp.float32).reshape(x[layer].shape[0], -1) for x in (source, target))
            distances[layer] = distance(*flat)
        label = label_of(batch['source'])
        value = jnp.mean(cross_entropy(source['logits'], label))
        value += weight * ramp(variables, gamma) * sum(distances.values())
        metrics = {'accuracy': accuracy(source['logits'], label), **{f'distance_{n}': d for n, d in distances.items()}}
        return value, Aux(metrics, moved)

    def predict(variables, batch):
        return model.apply(variables, inputs_of(batch), train=False)

    return Objective(init, loss, predict, streams=STREAMS)
