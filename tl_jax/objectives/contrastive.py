"""Two towers: networks of two views of one thing, trained so that what belongs together lies together."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn
from jaxtyping import Array, Bool, Float, UInt32

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.objectives.base import Aux, Model, Objective, forward, inputs_of, role, unit

MAX_SCALE = 100.0
RANKS = (1, 5, 10)


def contrastive(
    model: Model,
    *,
    text: Model,
    loss: Literal['clip', 'siglip'] = 'clip',
    positives: Literal['pair', 'caption', 'class'] = 'pair',
    stream: str = 'train',
) -> Objective:
    """CLIP (Radford et al. 2021, arXiv:2103.00020, fig. 3) and SigLIP (Zhai et al. 2023, arXiv:2303.15343, alg. 1).

    With x_i and y_j the two towers' outputs as unit vectors, over all B pairs of the batch on all devices, in float32:

      clip     mean over i, and over both directions, of CE(softmax_j(s x_i·y_j), p_ij);   s = exp(log_scale) <= 100
      siglip   -1/B sum_ij log sigmoid(z_ij (s x_i·y_j + b));   z_ij = 1 for what belongs together, else -1

    `positives` says what belongs together: 'pair' only i = j, as published; 'caption' also where the second inputs are equal;
    'class' also where labels are (UniCL: Yang et al. 2022, arXiv:2204.03610, eq. 2-4). p_ij is uniform over them.

    The towers are the roles `backbone`, `head` and `text/…`; each gives its logits, or without a head its features, so that
    heads are the projections: `model.num_classes` and `text.num_classes` are the dimension. `temperature/log_scale` (and
    `temperature/bias`) start at 1/0.07, or for SigLIP at 10 and -10. LiT (Zhai et al. 2022, arXiv:2111.07991) is a stage with
    `train=[('text/.*|temperature/.*', …)]` and a pretrained first tower.

    Expects its stream: image, inputs or tokens; other_tokens [B, L] (or other_image, …); label [B] for 'class'. Nats per example.
    """
    other = role('text', text)
    start = {'clip': {'log_scale': math.log(1 / 0.07)}, 'siglip': {'log_scale': math.log(10.0), 'bias': -10.0}}[loss]

    def init(key, batch):
        fields, keys = _checked(batch[stream], stream, positives), jax.random.split(key)
        inputs, other_inputs = inputs_of(fields), inputs_of(fields, 'other_')
        towers = trees.merge(model.init(keys[0], inputs), other.init(keys[1], other_inputs))
        widths = [
            jax.eval_shape(lambda v, x, t=tower: _output(t.apply(v, x, train=False)), towers, x).shape[-1]
            for tower, x in ((model, inputs), (other, other_inputs))
        ]
        if widths[0] != widths[1]:
            raise UserError(
                f'config.objective.text: its output has width {widths[1]}, the first tower’s {widths[0]}; give '
                'config.model and config.objective.text the same num_classes'
            )
        return trees.merge(towers, {'params': {'temperature': {k: jnp.float32(v) for k, v in start.items()}}})

    def training_loss(variables, batch, key):
        fields, keys = batch[stream], jax.random.split(key)
        endpoints, moved = forward(model, variables, inputs_of(fields), keys[0])
        other_endpoints, other_moved = forward(other, variables, inputs_of(fields, 'other_'), keys[1])
        first, second = unit(_output(endpoints)), unit(_output(other_endpoints))
        together, temperature = positive_pairs(fields, positives), variables['params']['temperature']
        if loss == 'clip':
            scale = jnp.exp(clamp(temperature['log_scale'], math.log(MAX_SCALE)))
            value = clip_loss(first, second, scale, together)
        else:
            scale = jnp.exp(temperature['log_scale'])
            value = siglip_loss(first, second, scale, temperature['bias'], together)
        nearest = jnp.argmax(similarity(first, second), 1)
        accuracy = jnp.mean(jnp.take_along_axis(together, nearest[:, None], 1))
        return value, Aux({'accuracy': accuracy, 'scale': scale}, trees.merge(moved, other_moved))

    def predict(variables, batch):
        outputs = {}
        for prefix, tower in (('', model), ('other_', other)):
            inputs = inputs_of(batch, prefix)
            outputs[f'{prefix}embedding'] = unit(_output(tower.apply(variables, inputs, train=False)))
            outputs[f'{prefix}identity'] = fingerprint(inputs)
        return {**outputs, **{k: batch[k] for k in ('label',) if k in batch}}

    return Objective(
        init,
        training_loss,
        predict,
        figures=functools.partial(retrieval_figures, by_class=positives == 'class'),
        streams=(stream,),
    )


def clip_loss(
    first: Float[Array, 'batch dim'],
    second: Float[Array, 'batch dim'],
    scale: Float[Array, ''],
    together: Bool[Array, 'batch batch'],
) -> Float[Array, '']:
    """The mean of both directions' cross-entropy, with targets uniform over what belongs together."""

    def one_way(logits, together):
        targets = together / jnp.sum(together, 1, keepdims=True)
        return -jnp.mean(jnp.sum(targets * nn.log_softmax(logits), 1))

    logits = scale * similarity(first, second)
    return (one_way(logits, together) + one_way(logits.T, together.T)) / 2


def siglip_loss(
    first: Float[Array, 'batch dim'],
    second: Float[Array, 'batch dim'],
    scale: Float[Array, ''],
    bias: Float[Array, ''],
    together: Bool[Array, 'batch batch'],
) -> Float[Array, '']:
    """Every pair by itself a logistic regression of whether it belongs together; summed over all, per example."""
    logits = scale * similarity(first, second) + bias
    return -jnp.sum(nn.log_sigmoid(jnp.where(together, logits, -logits))) / len(first)


def positive_pairs(fields: dict[str, Array], positives: str) -> Bool[Array, 'batch batch']:
    """Which of the first tower's inputs (rows) belong to which of the second's (columns)."""
    if positives == 'class':
        return fields['label'][:, None] == fields['label']
    if positives == 'caption':
        ids = fingerprint(inputs_of(fields, 'other_'))
        return jnp.all(ids[:, None] == ids, -1)
    return jnp.eye(len(inputs_of(fields)), dtype=bool)


def fingerprint(inputs: Array) -> UInt32[Array, 'batch 2']:
    """64 bits that equal inputs share, whatever the batch, and different ones but for chance.

    A multilinear hash (Carter & Wegman 1979) of the values' bits, which are mixed first: those of whole numbers as float32
    end in zeros.
    """
    kind = jnp.int32 if jnp.issubdtype(inputs.dtype, jnp.integer) else jnp.float32
    bits = lax.bitcast_convert_type(inputs.reshape(len(inputs), -1).astype(kind), jnp.uint32)
    bits = (bits ^ bits >> 16) * jnp.uint32(0x9E3779B1)
    bits = bits ^ bits >> 15
    weights = jax.random.bits(jax.random.key(0), (2, bits.shape[1]), jnp.uint32)
    return jnp.sum(bits[:, None] * weights, -1, dtype=jnp.uint32)


def similarity(first: Float[Array, 'a dim'], second: Float[Array, 'b dim']) -> Float[Array, 'a b']:
    # By default an accelerator would round the operands, and a scale of 100 multiplies that error.
    return jnp.matmul(first, second.T, precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def clamp(value: Float[Array, ''], highest: float) -> Float[Array, '']:
    """min(value, highest), whose gradient at the bound is dropped only where descent would leave it.

    It acts as clipping the parameter after every step, as CLIP's authors do; the gradient of `minimum` itself would hold a
    parameter beyond the bound for ever.
    """
    return jnp.minimum(value, highest)


def _clamp_forward(value, highest):
    return clamp(value, highest), value >= highest


def _clamp_backward(at_bound, gradient):
    return jnp.where(at_bound & (gradient < 0), 0.0, gradient), None


clamp.defvjp(_clamp_forward, _clamp_backward)


def retrieval_figures(predictions: dict[str, np.ndarray], *, by_class: bool = False) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways and, where there are labels, zero-shot accuracy; from `predict` over a whole split.

    `to_text_recall@k`: the share of the first tower's inputs for which one of its texts is among the k texts most similar to
    it; `from_text_recall@k` the other way. Equal inputs are one: queries and candidates are the distinct inputs, and all that
    occurred with a query belong to it (`by_class`: all that occurred with its class). A candidate exactly as similar as the
    best that belongs stands before it.

    `zero_shot_accuracy`: the share of examples whose class's text embedding is more similar than that of every other class
    of the split; it is the mean over the class's distinct texts, at unit length (Radford et al. 2021, sec. 3.1.4).
    """
    _, first, row = np.unique(predictions['identity'], axis=0, return_index=True, return_inverse=True)
    _, second, column = np.unique(predictions['other_identity'], axis=0, return_index=True, return_inverse=True)
    row, column = row.ravel(), column.ravel()
    embedding, other = predictions['embedding'].astype(np.float32), predictions['other_embedding'].astype(np.float32)
    group = predictions['label'] if by_class else None
    to_text = best_ranks(embedding[first], other[second], partners(row, column, group))
    from_text = best_ranks(other[second], embedding[first], partners(column, row, group))
    figures = {
        f'{way}_recall@{k}': float(np.mean(ranks <= k))
        for way, ranks in (('to_text', to_text), ('from_text', from_text))
        for k in RANKS
    }
    if 'label' in predictions:
        figures['zero_shot_accuracy'] = _zero_shot_accuracy(embedding, other[second], predictions['label'], column)
    return figures


def partners(query: np.ndarray, candidate: np.ndarray, group: np.ndarray | None = None) -> list[np.ndarray]:
    """The candidates that occurred with each query, or in its group, where the n-th pair is `query[n]`, `candidate[n]`."""
    key = query if group is None else np.unique(group, return_inverse=True)[1].ravel()
    order = np.argsort(key, kind='stable')
    members = np.split(candidate[order], np.searchsorted(key[order], np.arange(1, key.max() + 1)))
    members = [np.unique(found) for found in members]
    return [members[key[n]] for n in np.unique(query, return_index=True)[1]]


def best_ranks(queries: np.ndarray, candidates: np.ndarray, belongs: list[np.ndarray]) -> np.ndarray:
    """The rank (from 1) of the best candidate that belongs to each query, int [Q]; ties stand before it."""
    ranks = np.empty(len(queries), int)
    for start in range(0, len(queries), 1024):  # the whole matrix of similarities need not fit into memory
        scores = queries[start : start + 1024] @ candidates.T
        for i, row in enumerate(scores, start):
            best = row[belongs[i]].max()
            ranks[i] = 1 + np.sum(row >= best) - np.sum(row[belongs[i]] >= best)
    return ranks


def _zero_shot_accuracy(embedding: np.ndarray, texts: np.ndarray, label: np.ndarray, column: np.ndarray) -> float:
    classes, own = np.unique(label, return_inverse=True)
    means = np.stack([texts[np.unique(column[label == c])].mean(0) for c in classes])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-6)
    scores, examples = embedding @ means.T, np.arange(len(label))
    right = scores[examples, own].copy()
    scores[examples, own] = -np.inf
    return float(np.mean(right > scores.max(1)))


def _output(endpoints: dict[str, Array]) -> Array:
    return endpoints['logits'] if 'logits' in endpoints else endpoints['features']


def _checked(fields: dict[str, Any], stream: str, positives: str) -> dict[str, Any]:
    if not any(f'other_{kind}' in fields for kind in ('image', 'inputs', 'tokens')):
        raise UserError(
            f"config.objective: stream '{stream}' has no second view (other_tokens); its source must be of pairs, such as "
            'pairs:… or bitext:…'
        )
    if positives == 'class' and 'label' not in fields:
        raise UserError(
            f"config.objective.positives: 'class' needs labels, and stream '{stream}' has none; use 'caption' or 'pair'"
        )
    return fields
