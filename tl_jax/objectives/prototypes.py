"""Prototypes: classes of an episode as means in a space of features."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from tl_jax.metrics import half_interval
from tl_jax.objectives.base import Aux, Model, Objective, forward, inputs_of, unit


def protonet(
    model: Model, *, distance: Literal['euclidean', 'cosine'] = 'euclidean', scale: float = 1.0, stream: str = 'train'
) -> Objective:
    """Prototypical networks (Snell et al. 2017, arXiv:1703.05175, eq. 1 and 2).

    c_k = mean of f(x) over the support of class k;  loss = -log softmax_k(-scale · d(f(x), c_k))[y], mean over queries.

    d is the squared Euclidean distance, or 1 - cosine. One pass of the network takes support and queries of all
    episodes of the batch, as the authors' takes those of its one, and batch normalisation sees them together.

    Expects episodes: `support_image` [B, S, H, W, C], `support_label` [B, S] of 0 … N - 1, and the same of `query`, any
    N and any number of shots. The network has no head. Nats per query. Figures: mean accuracy over episodes, its 95%
    interval (± 1.96 standard errors) and the mean loss.
    """

    def init(key, batch):
        return model.init(key, inputs_of(batch[stream], 'support_')[0])

    def loss(variables, batch, key):
        fields = batch[stream]
        endpoints, collections = forward(model, variables, _pool(fields), key)
        logits = jax.vmap(_logits(distance, scale))(*_unpool(endpoints['features'], fields), fields['support_label'])
        value, accuracy = _scores(logits, fields['query_label'])
        return jnp.mean(value), Aux({'accuracy': jnp.mean(accuracy)}, collections)

    def predict(variables, batch):
        features = model.apply(variables, _pool(batch), train=False)['features']
        logits = jax.vmap(_logits(distance, scale))(*_unpool(features, batch), batch['support_label'])
        value, accuracy = _scores(logits, batch['query_label'])
        return {'accuracy': accuracy, 'loss': value}

    return Objective(init, loss, predict, figures=_figures, streams=(stream,))


def prototypes(
    features: Float[Array, 'support dim'], label: Int[Array, 'support']
) -> tuple[Float[Array, 'support dim'], Int[Array, 'support']]:
    """The mean of each class's features, and the number of examples that it is of.

    There are as many rows as examples, since no more classes can occur, and shapes then say nothing of ways and shots;
    those beyond the number of classes are zero, of 0 examples.
    """
    members = jax.nn.one_hot(label, label.shape[0])
    counts = jnp.sum(members, 0)
    return (members.T @ features) / jnp.maximum(counts, 1)[:, None], counts.astype(jnp.int32)


def _logits(distance: str, scale: float):
    def of_episode(support, query, label):
        centres, counts = prototypes(support, label)
        if distance == 'euclidean':
            # |q - c|² without the three-dimensional array of differences. It is not negative but for rounding.
            far = jnp.sum(query**2, 1)[:, None] - 2 * query @ centres.T + jnp.sum(centres**2, 1)
        else:
            far = 1 - unit(query) @ unit(centres).T
        return jnp.where(counts > 0, -scale * far, -jnp.inf)

    return of_episode


def _scores(logits, label) -> tuple[Float[Array, 'episodes'], Float[Array, 'episodes']]:
    """Mean loss and accuracy of each episode's queries."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return jnp.mean(losses, -1), jnp.mean(jnp.argmax(logits, -1) == label, -1)


def _pool(fields: dict[str, Any]) -> Array:
    """Support and queries of all episodes as one batch [B · (S + Q), …]."""
    both = jnp.concatenate([inputs_of(fields, part) for part in ('support_', 'query_')], 1)
    return both.reshape(-1, *both.shape[2:])


def _unpool(features: Float[Array, 'images dim'], fields: dict[str, Any]) -> tuple[Array, Array]:
    """The inverse of `_pool`: features [B, S, D] and [B, Q, D]."""
    episodes, supports = fields['support_label'].shape
    features = features.astype(jnp.float32).reshape(episodes, -1, features.shape[-1])
    return features[:, :supports], features[:, supports:]


def _figures(predictions: dict[str, np.ndarray]) -> dict[str, float]:
    accuracy = predictions['accuracy'].astype(np.float64)
    interval = half_interval(accuracy)
    return {'accuracy': accuracy.mean(), 'accuracy_ci95': interval, 'loss': predictions['loss'].mean()}
