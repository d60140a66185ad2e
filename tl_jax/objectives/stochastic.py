"""Regularisers that draw anew in every step: of the weights (mixout), of the pass (R-Drop), of the statistics (StochNorm)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen
from jax import lax, nn
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.models.layers import BatchNorm
from tl_jax.objectives.base import Objective, with_loss
from tl_jax.objectives.penalties import endpoint, select
from tl_jax.objectives.references import with_reference


def mixout(objective: Objective, *, p: float = 0.9, params: str = 'backbone/.*kernel') -> Objective:
    """Mixout (Lee, Cho & Kang 2020, arXiv:1909.11299, eq. 5): the loss at weights that are in part those of the start.

    w̃ = (m w⁰ + (1 - m) w - p w⁰) / (1 - p), m ~ Bernoulli(p) for each number; so that E[w̃] = w, and w⁰ = 0 is dropout.

    Evaluation uses w. Norms and biases are left alone, as in the authors' code.

    Args:
      objective: that is wrapped; each of its passes draws its own masks.
      p: probability of the start's weight, below 1; 0.9 is the paper's for BERT.
      params: regex of the parameters that are mixed.
    """
    _check_share(p, 'mixout')
    if p == 1:
        raise UserError('config.objective.mixout.p: with 1 the network never leaves its start; choose one below 1')
    field = 'config.objective.mixout.params'

    def change(loss):
        def mixed(variables, batch, key):
            drawn, rest = jax.random.split(key)
            at_start = trees.flatten(variables['reference']['params'])
            chosen = select(variables['params'], params, field)
            keys = jax.random.split(drawn, len(chosen))
            mixes = {path: mix(k, at_start[path], w, p) for k, (path, w) in zip(keys, chosen.items(), strict=True)}
            return loss({**variables, 'params': trees.merge(variables['params'], trees.unflatten(mixes))}, batch, rest)

        return mixed

    return with_loss(with_reference(objective, params, field), change)


def mix(key: Array, start: Float[Array, '*shape'], now: Float[Array, '*shape'], p: float) -> Float[Array, '*shape']:
    """w⁰ where a Bernoulli(p) is 1, else w⁰ + (w - w⁰) / (1 - p): the same as mixout's formula, and exactly w⁰ where w = w⁰."""
    moves = jax.random.bernoulli(key, 1 - p, now.shape)
    return start + jnp.where(moves, (now - start) / (1 - p), 0)


def r_drop(objective: Objective, *, weight: float = 1.0, passes: Literal['mean', 'sum'] = 'mean') -> Objective:
    """R-Drop (Liang et al. 2021, arXiv:2106.14448, eq. 4): two passes under different dropout must agree.

    loss = (loss₁ + loss₂) [/ 2] + weight · mean_i ½ (KL(p₁ ‖ p₂) + KL(p₂ ‖ p₁))

    Both passes run the network in training mode, with keys of their own; batch statistics move twice. Without dropout,
    stochastic depth or the like in the model the two are equal, and `r_drop` is logged as 0.

    Args:
      objective: gives `logits` in `Aux.endpoints`.
      weight: α.
      passes: whether the losses of the two passes are averaged, as in the authors' code, or summed, as in the paper.
    """

    def change(loss):
        def twice(variables, batch, key):
            first, second = jax.random.split(key)
            value, aux = loss(variables, batch, first)
            other, also = loss(trees.merge(variables, aux.collections), batch, second)
            term = weight * symmetric_divergence(endpoint(aux, 'logits', 'r_drop'), endpoint(also, 'logits', 'r_drop'))
            share = 0.5 if passes == 'mean' else 1.0
            parts = jax.tree.map(lambda a, b: share * (a + b), aux.losses, also.losses)
            return share * (value + other) + term, aux._replace(
                metrics={**aux.metrics, 'r_drop': term},
                collections=trees.merge(aux.collections, also.collections),
                losses={**parts, 'r_drop': term} if parts else {},
            )

        return twice

    return with_loss(objective, change)


def symmetric_divergence(
    first: Float[Array, 'batch classes'], second: Float[Array, 'batch classes']
) -> Float[Array, '']:
    """mean_i ½ (KL(p ‖ q) + KL(q ‖ p)) = mean_i ½ Σ (p - q) (log p - log q) of two batches of logits, in nats."""
    log_p, log_q = (nn.log_softmax(logits.astype(jnp.float32)) for logits in (first, second))
    return 0.5 * jnp.mean(jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), -1))


def stoch_norm(objective: Objective, *, p: float = 0.5) -> Objective:
    """Stochastic normalisation (Kou et al. 2020, NeurIPS, "Stochastic normalization", eq. 4).

    In training each channel of a batch norm is normalised by the batch's statistics with probability p, else by the moving
    ones: y = s · batch + (1 - s) · moving, s ~ Bernoulli(p) for each channel. The moving statistics follow the batches as
    ever. Evaluation is unchanged. A layer that a stage freezes uses its moving statistics in any case.

    Enters every batch norm of the network from outside, by Linen's method interception.
    """
    _check_share(p, 'stoch_norm')

    def change(loss):
        def stochastic(variables, batch, key):
            seen = []

            def choose(run, args, kwargs, context):
                train = kwargs.get('train', args[1] if len(args) > 1 else False)
                if not isinstance(context.module, BatchNorm) or context.method_name != '__call__':
                    return run(*args, **kwargs)
                seen.append(context.module.path)
                if not train:
                    return run(*args, **kwargs)
                moving = _normalised(context.module, args[0])  # before the batch moves the statistics
                by_batch = run(*args, **kwargs)
                chosen = jax.random.bernoulli(context.module.make_rng('dropout'), p, moving.shape[-1:])
                return jnp.where(chosen, by_batch, moving.astype(by_batch.dtype))

            with linen.intercept_methods(choose):
                outputs = loss(variables, batch, key)
            if not seen:
                raise UserError('config.objective.stoch_norm: the network has no batch norm; choose one that has')
            return outputs

        return stochastic

    return with_loss(objective, change)


def _normalised(layer: BatchNorm, x: Array) -> Array:
    """What the layer would give in evaluation, from its own leaves: Linen lets a call be run but once."""
    mean, var = (layer.get_variable('batch_stats', name) for name in ('mean', 'var'))
    scale, bias = (layer.get_variable('params', name) for name in ('scale', 'bias'))
    return (x.astype(jnp.float32) - mean) * (lax.rsqrt(var + layer.epsilon) * scale) + bias


def _check_share(p: float, name: str) -> None:
    if not 0 <= p <= 1:
        raise UserError(f'config.objective.{name}.p: is a probability, 0 … 1, not {p}')
