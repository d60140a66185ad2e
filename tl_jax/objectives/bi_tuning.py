"""Bi-tuning: contrastive learning of a labelled target, at the classifier and at a projection."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, nn
from jaxtyping import Array, Float, Int

from tl_jax import trees
from tl_jax.config import call
from tl_jax.errors import UserError
from tl_jax.models.heads import uniform
from tl_jax.objectives.base import Model, Objective, inputs_of, label_of, network_of, started, unit
from tl_jax.objectives.penalties import added, endpoint
from tl_jax.objectives.perturb import random_view
from tl_jax.objectives.teachers import teach


def bi_tuning(
    objective: Objective,
    *,
    model: Model,
    num_classes: int,
    stream: str = '',
    weight: float = 1.0,
    keys: int = 40,
    momentum: float = 0.999,
    temperature: float = 0.07,
    dim: int = 128,
    view: Mapping[str, Any] | None = None,
) -> Objective:
    """Bi-tuning (Zhong et al. 2020, arXiv:2011.06182, eq. 3 and 6): what is of one class attracts, the rest repels.

    loss + weight · (CCE + CCL); for an example of class y, with K queued keys of each class and its own key (or query) k₀,

      CCE = -1/(K+1) Σ_{h of class y} log( exp(w_y·h / τ) / Σ_{all h} exp(w_y·h / τ) ),  h = unit([features, 1])
      CCL = -1/(K+1) Σ_{k of class y} log( exp(z·k / τ) / Σ_{all k} exp(z·k / τ) ),      z = unit(projector(features))

    w_y = unit([kernel, bias]) of the class, a constant here as in tllib's code. k₀ of CCE is the query's own h. Keys come from
    an encoder whose weights follow the network's, ξ ← m ξ + (1 - m) θ, on another view of the example; its batch norm uses
    its own batches. No gradient enters a key. The queue starts at random, and takes a step's keys after they were used (tllib's
    CCE already sees them). The key encoder costs the memory of the backbone again and one more forward pass a step; the
    queue classes · keys · (D + 1 + dim) numbers. They stand in the collection `bi_tuning`, the projector in the role `projector`.

    Args:
      objective: gives `features` in `Aux.endpoints`.
      model: the network, with a linear head.
      num_classes: of the data.
      stream: labelled; the objective's first unless given.
      weight: of both terms; 1 in the paper.
      keys: K, of each class.
      momentum: m.
      temperature: τ.
      dim: of the projection.
      view: fields of `perturb.random_view` for the key encoder's inputs; `{}` for the same inputs.
    """
    stream = stream or objective.streams[0]
    if not 0 <= momentum < 1:
        raise UserError(f'config.objective.bi_tuning.momentum: must lie in 0 … 1, below 1, not {momentum}')
    if keys < 1:
        raise UserError(f'config.objective.bi_tuning.keys: must be at least 1, not {keys}')
    seen = call(random_view, {'translation': 2.0} if view is None else view, 'config.objective.bi_tuning.view')

    def init(key, batch):
        variables, inputs = objective.init(key, batch), inputs_of(batch[stream])
        found = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, inputs)
        width = found['features'].shape[-1]
        names = jax.random.split(jax.random.fold_in(key, 1), 3)
        projector = {'kernel': uniform(names[0], (width, dim)), 'bias': jnp.zeros(dim)}
        queue = {
            'features': _random_keys(names[1], num_classes, keys, width + 1),
            'projections': _random_keys(names[2], num_classes, keys, dim),
            'place': jnp.zeros(num_classes, jnp.int32),
        }
        params = {**variables['params'], 'projector': projector}
        return {**variables, 'params': params, 'bi_tuning': {'queue': queue}}

    def start(variables):
        variables = started(objective, variables)
        kept = network_of(variables).items()
        encoder = {name: {r: tree[r] for r in ('backbone', 'projector') if r in tree} for name, tree in kept}
        queue = variables['bi_tuning']['queue']
        return {**variables, 'bi_tuning': {'queue': queue, 'encoder': jax.tree.map(jnp.copy, encoder)}}

    def penalty(variables, batch, aux, key):
        if 'target' in batch[stream]:
            raise UserError(
                'config.objective.mixed: leaves an example no one class, by which bi_tuning compares; take one away'
            )
        drawn, dropped = jax.random.split(key)
        label, held = label_of(batch[stream]), variables['bi_tuning']
        encoder = _followed(held['encoder'], lax.stop_gradient(variables['params']), momentum)
        markers = _markers(variables.get('batch_stats', {}))
        head = {'params': {'head': variables['params']['head']}}
        views = seen(drawn, inputs_of(batch[stream]))
        outputs, encoder = teach(model, trees.merge(encoder, head), markers, views, dropped)
        encoder['params'] = {role: tree for role, tree in encoder['params'].items() if role != 'head'}
        key_h, key_z = lax.stop_gradient(embedded(outputs['features'], encoder['params']['projector']))
        h, z = embedded(endpoint(aux, 'features', 'bi_tuning'), variables['params']['projector'])
        classes = lax.stop_gradient(class_vectors(variables['params']['head']))[label]
        queue = held['queue']
        at_classes = contrast(classes, h, queue['features'], label, temperature)
        at_projections = contrast(z, key_z, queue['projections'], label, temperature)
        queue = enqueued(queue, {'features': key_h, 'projections': key_z}, label)
        return weight * (at_classes + at_projections), {'bi_tuning': {'queue': queue, 'encoder': encoder}}

    return added(objective._replace(init=init, start=start), 'bi_tuning', penalty)


def contrast(
    anchors: Float[Array, 'batch dim'],
    own: Float[Array, 'batch dim'],
    queue: Float[Array, 'classes keys dim'],
    label: Int[Array, 'batch'],
    temperature: float,
) -> Float[Array, '']:
    """mean_i -1/(K+1) Σ log softmax(anchor_i · [own_i, queue] / τ) over own_i and the queue's keys of the example's class."""
    among = jnp.einsum('bd,ckd->bck', anchors, queue, precision='highest') / temperature
    alone = jnp.sum(anchors * own, -1) / temperature
    total = jnp.logaddexp(alone, nn.logsumexp(among, (1, 2)))
    mine = jnp.take_along_axis(among, label[:, None, None], 1)[:, 0]
    return jnp.mean(total - (alone + jnp.sum(mine, -1)) / (queue.shape[1] + 1))


def enqueued(queue: Mapping[str, Any], found: Mapping[str, Array], label: Int[Array, 'batch']) -> dict[str, Any]:
    """The queue with each example's keys in place of the oldest of its class; of too many the last stay."""
    length, classes = queue['features'].shape[1], len(queue['place'])
    member = nn.one_hot(label, classes, dtype=jnp.int32)
    before = jnp.take_along_axis(jnp.cumsum(member, 0) - member, label[:, None], 1)[:, 0]
    count = jnp.sum(member, 0)
    row = jnp.where(before >= count[label] - length, label, classes)  # out of range: dropped
    slot = (queue['place'][label] + before) % length
    filled = {name: queue[name].at[row, slot].set(keys, mode='drop') for name, keys in found.items()}
    return {**filled, 'place': (queue['place'] + count) % length}


def embedded(features: Float[Array, 'batch dim'], projector: Mapping[str, Array]) -> tuple[Array, Array]:
    """(unit([features, 1]), unit(projector(features))), rows of length 1."""
    features = features.astype(jnp.float32)
    extended = jnp.pad(features, ((0, 0), (0, 1)), constant_values=1)
    return unit(extended), unit(features @ projector['kernel'] + projector['bias'])


def class_vectors(head: Mapping[str, Array]) -> Float[Array, 'classes extended']:
    """unit([kernel, bias]) of each class of a linear head; bias 0 where it has none."""
    if 'kernel' not in head or head['kernel'].ndim != 2 or set(head) - {'kernel', 'bias'}:
        raise UserError("config.model.head: bi_tuning compares the columns of a linear head; set it to 'linear'")
    bias = head.get('bias', jnp.zeros(head['kernel'].shape[-1]))
    return unit(jnp.concatenate([head['kernel'], bias[None]]).T)


def _random_keys(key: Array, classes: int, keys: int, dim: int) -> Float[Array, 'classes keys dim']:
    return unit(jax.random.normal(key, (classes * keys, dim))).reshape(classes, keys, dim)


def _followed(encoder: Mapping[str, Any], params: trees.Tree, momentum: float) -> dict[str, Any]:
    now = trees.flatten(params)
    moved = {p: momentum * w + (1 - momentum) * now[p] for p, w in trees.flatten(encoder['params']).items()}
    return {**encoder, 'params': trees.unflatten(moved)}


def _markers(batch_stats: trees.Tree) -> dict[str, Any]:
    """The marks of batch norms that the stage freezes; the encoder's are frozen with them."""
    return trees.split(batch_stats, lambda path: path.endswith('/frozen'))[0]
