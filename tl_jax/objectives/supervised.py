"""Supervised learning: cross-entropy on the labels of one stream; and no loss at all, for the wrappers that give one."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax

from tl_jax.errors import UserError, nearest
from tl_jax.objectives.base import Aux, Model, Objective, forward, inputs_of, targets_of


def supervised(
    model: Model,
    *,
    num_classes: int,
    stream: str = 'train',
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    logits: str = 'logits',
) -> Objective:
    """Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv:1512.00567, sec. 7) and class weights.

    loss = sum_i w[y_i] CE(logits_i, (1 - s) onehot(y_i) + s / C) / sum_i w[y_i]

    Expects its stream: image [B, H, W, C]; label [B] int, or target [B, C], rows summing to 1, where a view has mixed
    them (its weight is then its classes' weights in its proportions). `logits` names the endpoint [B, C] that the labels judge,
    'class_logits' of a DeiT with two heads; the prediction is `logits` in any case. Returns nats per example.
    """
    weights = None if class_weights is None else jnp.asarray(class_weights, jnp.float32)

    def init(key, batch):
        return model.init(key, inputs_of(batch[stream]))

    def loss(variables, batch, key):
        fields = batch[stream]
        outputs, collections = forward(model, variables, inputs_of(fields), key)
        if logits not in outputs:
            raise UserError(f"config.objective.logits: the network gives no '{logits}'; {nearest(logits, outputs)}")
        found = outputs[logits].astype(jnp.float32)
        target = targets_of(fields, num_classes)
        smooth = optax.smooth_labels(target, label_smoothing)
        share = jnp.ones(found.shape[0]) if weights is None else target @ weights
        value = jnp.sum(share * optax.softmax_cross_entropy(found, smooth)) / jnp.sum(share)
        accuracy = jnp.mean(jnp.argmax(found, -1) == jnp.argmax(target, -1))
        return value, Aux({'accuracy': accuracy}, collections, endpoints=outputs)

    def predict(variables, batch):
        return model.apply(variables, inputs_of(batch), train=False)

    return Objective(init, loss, predict, streams=(stream,))


def unsupervised(model: Model, *, stream: str = 'train') -> Objective:
    """No loss of its own: the network's pass over a stream, whose labels it does not ask for, for wrappers to judge."""

    def init(key, batch):
        return model.init(key, inputs_of(batch[stream]))

    def loss(variables, batch, key):
        outputs, collections = forward(model, variables, inputs_of(batch[stream]), key)
        return jnp.zeros(()), Aux({}, collections, endpoints=outputs)

    def predict(variables, batch):
        return model.apply(variables, inputs_of(batch), train=False)

    return Objective(init, loss, predict, streams=(stream,))
