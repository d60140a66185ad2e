"""Domain adversarial methods: features that a discriminator cannot tell source from target by.

Everywhere the source's domain is 0 and the target's 1, as in DANN's paper and ADDA's code (CDAN and tllib have it the other
way round, which by symmetry is the same game). A discriminator ends in one logit, or in two as ADDA's, of which only the
difference counts.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import nn
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.objectives.base import (
    Aux,
    Model,
    Objective,
    Phase,
    accuracy,
    cross_entropy,
    forward,
    inputs_of,
    label_of,
    recast,
    role,
)

STREAMS = ('source', 'target')
# The size of features x classes above which Long et al. 2018 (sec. 3) replace the product by its random sketch.
MULTILINEAR_LIMIT = 4096


@jax.custom_vjp
def reverse_gradient(x: Array, coefficient: Float[Array, '']) -> Array:
    """The identity, whose gradient is -coefficient · identity (Ganin & Lempitsky 2015, arXiv:1409.7495, sec. 3.2)."""
    del coefficient
    return x


def _reversed_forward(x, coefficient):
    return x, coefficient


def _reversed_backward(coefficient, gradient):
    return (-coefficient * gradient).astype(gradient.dtype), jnp.zeros_like(coefficient)


reverse_gradient.defvjp(_reversed_forward, _reversed_backward)


def ramp(variables: Any, gamma: float) -> Float[Array, '']:
    """2 / (1 + exp(-gamma p)) - 1 for p the fraction of the stage that is done (Ganin et al. 2016, sec. 5.2.2).

    It climbs from 0 towards 1. A gamma of 0 stands for no ramp: 1 throughout.
    """
    if not gamma:
        return jnp.ones(())
    return jnp.tanh(gamma * variables['progress']['fraction'] / 2)


def both_domains(
    model: Model, variables: Any, batch: Any, key: Array, *, joint: bool
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Any]]:
    """Applies a network to source and target in training mode: their endpoints, and the collections that moved.

    Args:
      model: the network.
      variables: its variables.
      batch: `{'source': …, 'target': …}`, examples of one shape.
      key: for dropout.
      joint: one pass over both, side by side, so that batch norm sees their mixture; otherwise one pass each, the source
        first, so that it sees each domain by itself and its running statistics move twice.
    """
    source, target = (inputs_of(batch[stream]) for stream in STREAMS)
    if source.shape[1:] != target.shape[1:]:
        raise UserError(
            f'config.data: one network cannot take examples of shape {list(source.shape[1:])} (source) and '
            f'{list(target.shape[1:])} (target); resize or pad them alike in config.data.train_transform'
        )
    if joint:
        outputs, moved = forward(model, variables, jnp.concatenate([source, target]), key)
        count = source.shape[0]
        return (
            {name: x[:count] for name, x in outputs.items()},
            {name: x[count:] for name, x in outputs.items()},
            moved,
        )
    of_source, moved = forward(model, variables, source, jax.random.fold_in(key, 0))
    of_target, moved = forward(model, trees.merge(variables, moved), target, jax.random.fold_in(key, 1))
    return of_source, of_target, moved


def domain_logit(logits: Float[Array, 'batch outputs']) -> Float[Array, 'batch']:
    """The log odds of the target: of a sigmoid, or of a softmax over (source, target)."""
    if logits.shape[-1] not in (1, 2):
        raise UserError(
            f'config.objective.discriminator.num_classes: must be 1 (a sigmoid) or 2 (a softmax), not {logits.shape[-1]}'
        )
    logits = logits.astype(jnp.float32)
    return logits[:, 0] if logits.shape[-1] == 1 else logits[:, 1] - logits[:, 0]


def domain_loss(
    of_source: Float[Array, 'source'],
    of_target: Float[Array, 'target'],
    source_weight: Any = 1.0,
    target_weight: Any = 1.0,
) -> Float[Array, '']:
    """mean_s -log(1 - D) + mean_t -log D of the log odds of the target; the means weighted, in nats."""

    def mean(losses, weight):
        weight = jnp.broadcast_to(weight, losses.shape)
        # The weights' sum only fixes the scale, so nothing is to be gained by moving it.
        return jnp.sum(weight * losses) / jax.lax.stop_gradient(jnp.sum(weight))

    return mean(nn.softplus(of_source), source_weight) + mean(nn.softplus(-of_target), target_weight)


def dann(
    model: Model, *, discriminator: Model, weight: float = 1.0, gamma: float = 10.0, joint: bool = True
) -> Objective:
    """Domain-adversarial training (Ganin et al. 2016, arXiv:1505.07818, eq. 9).

    loss = CE(C(F(x_s)), y_s) + weight · (mean_s -log(1 - D(R(F(x_s)))) + mean_t -log D(R(F(x_t))))

    R reverses the gradient and multiplies it by `ramp`, so that the ramp holds back the features alone and the discriminator
    learns at full rate from the start (sec. 5.2.2). `weight` multiplies both players' gradients, as lambda does in the
    shallow network (algorithm 1); that one has no ramp, gamma=0. tllib averages where eq. 9 adds the two domains:
    weight=0.5.

    Expects streams `source` (image [B, H, W, C] or inputs [B, F]; label [B]) and `target`. The discriminator maps features
    [B, D] to one or two logits. See `both_domains` for joint. Returns nats.
    """

    def shown(variables, outputs, reverse):
        return reverse(outputs['features']), jnp.ones(outputs['features'].shape[0])

    return _adversarial(model, discriminator, shown, weight=weight, gamma=gamma, joint=joint)


def cdan(
    model: Model,
    *,
    discriminator: Model,
    weight: float = 1.0,
    gamma: float = 10.0,
    entropy: bool = True,
    product: Literal['auto', 'multilinear', 'randomized'] = 'auto',
    random_dim: int = 1024,
    joint: bool = True,
) -> Objective:
    """Conditional adversarial adaptation, CDAN and CDAN+E (Long et al. 2018, arXiv:1705.10667, sec. 3).

    loss = CE(C(F(x_s)), y_s) + weight · (mean_s -w log(1 - D(R(T(f, g)))) + mean_t -w log D(R(T(f, g))))

    T(f, g) = g ⊗ f [B, C·D] of features and softmax predictions or, where C·D is above 4096, its random sketch
    (R_f f) ⊙ (R_g g) / √d [B, d] with fixed Gaussian matrices, the collection `random_map`. g is a constant to T, as in the
    authors' code. With `entropy` (CDAN+E) w = 1 + exp(-H(g)), through whose reversed gradient the predictions become
    certain (tllib cuts it off); the means are weighted ones, within each domain. The authors' code averages where the
    paper adds the two domains: weight=0.5.

    Args:
      model: the network.
      discriminator: from [B, C·D] or [B, random_dim] to one or two logits.
      weight: lambda, of both players' gradients.
      gamma: of the ramp of the reversal, as in `dann`; 0 for none.
      entropy: whether to weight by certainty.
      product: which T; 'auto' goes by the size.
      random_dim: d.
      joint: see `both_domains`.
    """

    def maps(key, outputs):
        sizes = {name: outputs[name].shape[-1] for name in ('features', 'logits')}
        large = sizes['features'] * sizes['logits'] > MULTILINEAR_LIMIT
        if product == 'multilinear' or (product == 'auto' and not large):
            return {}
        keys = dict(zip(sizes, jax.random.split(key), strict=True))
        return {'random_map': {name: jax.random.normal(keys[name], (sizes[name], random_dim)) for name in sizes}}

    def shown(variables, outputs, reverse):
        features = outputs['features'].astype(jnp.float32)
        logs = nn.log_softmax(outputs['logits'].astype(jnp.float32))
        certain = jax.lax.stop_gradient(jnp.exp(logs))
        if 'random_map' in variables:
            matrices = variables['random_map']
            mapped = (features @ matrices['features']) * (certain @ matrices['logits']) / jnp.sqrt(random_dim)
        else:
            mapped = (certain[:, :, None] * features[:, None, :]).reshape(features.shape[0], -1)
        if not entropy:
            return reverse(mapped), jnp.ones(features.shape[0])
        return reverse(mapped), 1 + jnp.exp(-reverse(-jnp.sum(jnp.exp(logs) * logs, -1)))

    return _adversarial(model, discriminator, shown, weight=weight, gamma=gamma, joint=joint, collections=maps)


def _adversarial(
    model: Model,
    discriminator: Model,
    shown: Callable,
    *,
    weight: float,
    gamma: float,
    joint: bool,
    collections: Callable = lambda key, outputs: {},
) -> Objective:
    """A classifier of the source whose endpoints a discriminator is shown, with the gradient reversed.

    Args:
      model: the network.
      discriminator: from what it is shown to one or two logits.
      shown: (variables, endpoints, reverse) -> what the discriminator sees [B, E], the examples' weights [B].
      weight: of the domain loss.
      gamma: of the ramp of the reversal.
      joint: see `both_domains`.
      collections: (key, endpoints) -> those that `shown` reads.
    """
    judge = role('discriminator', discriminator)

    def init(key, batch):
        inputs = inputs_of(batch['source'])
        variables = model.init(key, inputs)
        outputs = _zeros_like_outputs(model, variables, inputs)
        variables = trees.merge(variables, collections(jax.random.fold_in(key, 2), outputs))
        seen, _ = shown(variables, outputs, lambda x: x)
        return trees.merge(variables, judge.init(jax.random.fold_in(key, 1), seen))

    def loss(variables, batch, key):
        network_key, judge_key = jax.random.split(key)
        source, target, moved = both_domains(model, variables, batch, network_key, joint=joint)
        label, count, coefficient = label_of(batch['source']), source['logits'].shape[0], ramp(variables, gamma)
        outputs = {name: jnp.concatenate([source[name], target[name]]) for name in ('features', 'logits')}
        seen, weights = shown(variables, outputs, lambda x: reverse_gradient(x, coefficient))
        judged, judge_moved = forward(judge, variables, seen, judge_key)
        of_source, of_target = jnp.split(domain_logit(judged['logits']), [count])
        adversarial = domain_loss(of_source, of_target, weights[:count], weights[count:])
        metrics = {
            'accuracy': accuracy(source['logits'], label),
            'domain_loss': adversarial,
            'domain_accuracy': _domain_accuracy(of_source, of_target),
            'reversal': coefficient,
        }
        value = jnp.mean(cross_entropy(source['logits'], label)) + weight * adversarial
        return value, Aux(metrics, trees.merge(moved, judge_moved))

    def predict(variables, batch):
        return model.apply(variables, inputs_of(batch), train=False)

    return Objective(init, loss, predict, streams=STREAMS)


def adda(model: Model, *, discriminator: Model) -> Objective:
    """Adversarial discriminative adaptation, its second stage (Tzeng et al. 2017, arXiv:1702.05464, eq. 9).

    discriminator: min_D  mean_s -log(1 - D(M_s(x_s))) + mean_t -log D(M_t(x_t))
    target:        min_Mt mean_t -log(1 - D(M_t(x_t)))          the labels inverted

    The first stage is `supervised` on the stream `source`. Its encoder M_s, the role `backbone`, and its classifier, `head`,
    belong to no phase and stay; the role `target`, M_t, starts as a copy of `backbone` with its statistics, and prediction
    is `head` on it. M_s is applied as in evaluation. The authors' code takes both gradients at the same point; here, as in a
    GAN, the encoder answers the discriminator's move.

    Expects streams `source` and `target`. The discriminator maps features [B, D] to one or two logits. Returns nats.
    """
    judge, adapted = role('discriminator', discriminator), recast(model, backbone='target')

    def start(variables):
        copied = {
            collection: {'target': jax.tree.map(jnp.copy, tree['backbone'])}
            for collection, tree in variables.items()
            if collection in ('params', 'batch_stats') and 'backbone' in tree
        }
        return trees.merge(variables, copied)

    def init(key, batch):
        inputs = inputs_of(batch['source'])
        variables = model.init(key, inputs)
        features = _zeros_like_outputs(model, variables, inputs)['features']
        return start(trees.merge(variables, judge.init(jax.random.fold_in(key, 1), features)))

    def features_of_target(variables, batch, key):
        outputs, moved = forward(adapted, variables, inputs_of(batch['target']), key)
        return outputs['features'], moved

    def discriminator_loss(variables, batch, key):
        target_key, judge_key = jax.random.split(key)
        source = model.apply(variables, inputs_of(batch['source']), train=False)['features']
        target, _ = features_of_target(variables, batch, target_key)
        judged, moved = forward(judge, variables, jnp.concatenate([source, target]), judge_key)
        of_source, of_target = jnp.split(domain_logit(judged['logits']), [source.shape[0]])
        metrics = {'domain_accuracy': _domain_accuracy(of_source, of_target)}
        return domain_loss(of_source, of_target), Aux(metrics, moved)

    def target_loss(variables, batch, key):
        target_key, judge_key = jax.random.split(key)
        target, moved = features_of_target(variables, batch, target_key)
        judged, _ = forward(judge, variables, target, judge_key)
        return jnp.mean(nn.softplus(domain_logit(judged['logits']))), Aux({}, moved)

    def predict(variables, batch):
        return adapted.apply(variables, inputs_of(batch), train=False)

    phases = (
        Phase('discriminator', discriminator_loss, 'discriminator/.*'),
        Phase('target', target_loss, 'target/.*'),
    )

    def export(variables):
        played = {
            c: tree['target'] for c, tree in variables.items() if c in ('params', 'batch_stats') and 'target' in tree
        }
        return {**variables, **{c: {**variables[c], 'backbone': target} for c, target in played.items()}}

    return Objective(init, target_loss, predict, phases, start=start, export=export, streams=STREAMS)


def _domain_accuracy(of_source, of_target):
    return (jnp.mean(of_source < 0) + jnp.mean(of_target >= 0)) / 2


def _zeros_like_outputs(model, variables, inputs):
    outputs = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, inputs)
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in outputs.items()}
