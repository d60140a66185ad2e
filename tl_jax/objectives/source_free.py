"""Adaptation without the source data: a trained model and unlabelled target examples are all there is."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import nn
from jaxtyping import Array, Float, Int

from tl_jax.errors import UserError
from tl_jax.objectives.base import Aux, Model, Objective, Phase, cross_entropy, forward, inputs_of, network_of


def shot(
    model: Model,
    *,
    num_examples: Mapping[str, int],
    stream: str = 'target',
    pseudo_weight: float = 0.1,
    information_weight: float = 1.0,
    diversity: bool = True,
) -> Objective:
    """Source hypothesis transfer (Liang, Hu & Feng 2020, arXiv:2002.08546), as the authors' code for digits.

    loss = information_weight · (mean_i H(p_i) - H(mean_i p_i)) + pseudo_weight · mean_i CE(logits_i, ŷ_i)     (eq. 3, 7)

    p = softmax(logits) and H(p) = -sum_c p_c log(p_c + 1e-5). The pseudo-labels ŷ are `cluster_labels` of the whole stream,
    made anew by each `refresh` (the authors': once an epoch; `config.refresh_every` in steps). The head, which is the source
    hypothesis, never moves, whatever the stage's rules say. `pseudo_weight=0` is SHOT-IM: no pass over the whole stream.

    It starts from a source model: a stage before with the objective `supervised`, or `config.model.source`.

    Args:
      model: with a head; trained on the source.
      num_examples: of each stream; given by the data.
      stream: the unlabelled target: image [B, H, W, C], index [B].
      pseudo_weight: of the cross-entropy against pseudo-labels (β; 0.1 for digits, 0.3 for objects).
      information_weight: of the entropy terms.
      diversity: whether the entropy of the mean prediction is in the loss.

    Returns nats per example.
    """
    clusters = pseudo_weight > 0

    def init(key, batch):
        variables = model.init(key, inputs_of(batch[stream]))
        if 'head' not in variables['params']:
            raise UserError(
                'config.model: SHOT keeps the source model’s head, and this network has none; set config.model.num_classes'
            )
        # No example has a pseudo-label before the first pass.
        unknown = {'pseudo_labels': {stream: jnp.full(num_examples[stream], -1, jnp.int32)}}
        return {**variables, **(unknown if clusters else {})}

    def loss(variables, batch, key):
        endpoints, collections = forward(model, variables, inputs_of(batch[stream]), key)
        logits = model.classify(variables, endpoints['features']).astype(jnp.float32)
        p = nn.softmax(logits)
        certainty, spread = jnp.mean(entropy(p)), entropy(jnp.mean(p, 0))
        value = information_weight * (certainty - spread if diversity else certainty)
        metrics = {'entropy': certainty, 'diversity': spread}
        if clusters:
            label = variables['pseudo_labels'][stream][batch[stream]['index']]
            value += pseudo_weight * jnp.mean(cross_entropy(logits, label))
            metrics['pseudo_agreement'] = jnp.mean(jnp.argmax(logits, -1) == label)
        return value, Aux(metrics, collections)

    @jax.jit
    def embed(variables, batch):
        endpoints = model.apply(variables, inputs_of(batch), train=False)
        return endpoints['features'], endpoints['logits'], batch['mask'], batch['index']

    @jax.jit
    def label_all(rows):
        features, logits, mask, index = (jnp.concatenate(column) for column in zip(*rows, strict=True))
        label = cluster_labels(features, nn.softmax(logits.astype(jnp.float32)), mask)
        length = num_examples[stream]
        return jnp.full(length, -1, jnp.int32).at[jnp.where(mask > 0, index, length)].set(label, mode='drop')

    def refresh(variables, batches):
        seen = network_of(variables)
        return {'pseudo_labels': {stream: label_all([embed(seen, batch) for batch in batches(stream)])}}

    def predict(variables, batch):
        return model.apply(variables, inputs_of(batch), train=False)

    phases = (Phase('adapt', loss, '(?!head/).*'),)
    return Objective(init, loss, predict, phases, refresh if clusters else None, streams=(stream,))


def cluster_labels(
    features: Float[Array, 'examples dim'],
    probabilities: Float[Array, 'examples classes'],
    mask: Float[Array, 'examples'],
    rounds: int = 1,
) -> Int[Array, 'examples']:
    """The nearest centroid by cosine (eq. 4–6 of Liang et al.), each example's features with a 1 appended, at unit length.

    The first centroids are means weighted by the probabilities; each further round takes the means of the examples that the
    round before gave to a class. `mask` 0 leaves an example out of the means. A class that no example is given to is out of
    the next round; in the authors' code its distance would be NaN, and their argmin would give it every example.
    """
    unit = jnp.pad(features.astype(jnp.float32), ((0, 0), (0, 1)), constant_values=1)
    unit = unit / jnp.linalg.norm(unit, axis=1, keepdims=True)
    share = probabilities
    for _ in range(rounds + 1):
        # The cosine does not change with a centroid's length, so the sum serves as the mean.
        centroid = jnp.einsum('nk,nd->kd', share * mask[:, None], unit, precision='highest')
        length = jnp.linalg.norm(centroid, axis=1)
        cosine = jnp.einsum('nd,kd->nk', unit, centroid, precision='highest') / jnp.where(length > 0, length, 1)
        label = jnp.argmax(jnp.where(length > 0, cosine, -jnp.inf), 1)
        share = nn.one_hot(label, probabilities.shape[1])
    return label


def entropy(p: Float[Array, '*batch classes']) -> Float[Array, '*batch']:
    """-sum_c p_c log(p_c + 1e-5) in nats, as in the authors' code."""
    return -jnp.sum(p * jnp.log(p + 1e-5), -1)
