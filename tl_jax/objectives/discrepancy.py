"""Classifier discrepancy: two classifiers that disagree on target examples show where the features are wrong."""

import jax
import jax.numpy as jnp
from jax import nn
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.objectives.adversarial import STREAMS, both_domains
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
)


def discrepancy(one: Float[Array, 'batch classes'], two: Float[Array, 'batch classes']) -> Float[Array, '']:
    """The mean over examples and classes of |softmax(one) - softmax(two)| (Saito et al. 2018, sec. 3.2)."""
    return jnp.mean(jnp.abs(nn.softmax(one.astype(jnp.float32)) - nn.softmax(two.astype(jnp.float32))))


def mcd(model: Model, *, repeats: int = 4, weight: float = 1.0) -> Objective:
    """Maximum classifier discrepancy (Saito et al. 2018, arXiv:1712.02560, sec. 3.3).

    fit:      min_{G, F1, F2} CE(F1(G(x_s)), y_s) + CE(F2(G(x_s)), y_s)
    maximise: min_{F1, F2}    the same - weight · discrepancy(F1(G(x_t)), F2(G(x_t)))
    minimise: min_G           weight · discrepancy(F1(G(x_t)), F2(G(x_t))),   `repeats` times

    Predictions average both classifiers' logits; the network that a run stores has the first classifier alone.

    Roles: `backbone` G, `head` F1 and `head2` F2, which starts from another key. Both start alike, and then never disagree,
    where a loaded head fills both; so give pretrained weights with model.fresh=['head/.*']. As in the authors' code, each
    domain passes through G by itself, G's running statistics move in every phase, weight is 1, and the prediction is the
    ensemble: `logits` are the mean of both heads'.

    Expects streams `source` (with label [B]) and `target`. Returns nats; the discrepancy is within [0, 2 / C].
    """
    if repeats < 1:
        raise UserError(f'config.objective.repeats: must be at least 1, not {repeats}')
    second = recast(model, head='head2')

    def init(key, batch):
        inputs = inputs_of(batch['source'])
        other, _ = trees.split(
            second.init(jax.random.fold_in(key, 1), inputs), lambda path: path.split('/')[1] == 'head2'
        )
        return trees.merge(model.init(key, inputs), other)

    def classified(variables, features, key):
        keys = jax.random.split(key)
        return [
            player.classify(variables, features, train=True, rngs={'dropout': k})
            for player, k in zip((model, second), keys, strict=True)
        ]

    def fit_to(logits, label):
        return sum(jnp.mean(cross_entropy(player, label)) for player in logits)

    def fit(variables, batch, key):
        network_key, head_key = jax.random.split(key)
        outputs, moved = forward(model, variables, inputs_of(batch['source']), network_key)
        logits, label = classified(variables, outputs['features'], head_key), label_of(batch['source'])
        return fit_to(logits, label), Aux({'accuracy': accuracy(sum(logits), label)}, moved)

    def maximise(variables, batch, key):
        network_key, source_key, target_key = jax.random.split(key, 3)
        source, target, moved = both_domains(model, variables, batch, network_key, joint=False)
        value = fit_to(classified(variables, source['features'], source_key), label_of(batch['source']))
        distance = discrepancy(*classified(variables, target['features'], target_key))
        return value - weight * distance, Aux({'discrepancy': distance}, moved)

    def minimise(variables, batch, key):
        network_key, head_key = jax.random.split(key)
        outputs, moved = forward(model, variables, inputs_of(batch['target']), network_key)
        distance = discrepancy(*classified(variables, outputs['features'], head_key))
        return weight * distance, Aux({'discrepancy': distance}, moved)

    def predict(variables, batch):
        outputs = model.apply(variables, inputs_of(batch), train=False)
        logits = [player.classify(variables, outputs['features'], train=False) for player in (model, second)]
        return {**outputs, 'logits': sum(logits) / 2}

    phases = (
        Phase('fit', fit, r'(backbone|head|head2)/.*'),
        Phase('maximise', maximise, r'(head|head2)/.*'),
        *(Phase('minimise', minimise, r'backbone/.*'),) * repeats,
    )
    return Objective(init, fit, predict, phases, streams=STREAMS)
