"""Penalties for leaving the start: the parameters with which a method begins stay at hand in the collection `reference`.

The copy costs the memory of the parameters it is of, once for all wrappers of one objective, and is stored in every
checkpoint; a leaf that a stage freezes is equal to its copy and adds nothing.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.errors import UserError, nearest
from tl_jax.objectives.base import Model, Objective, cross_entropy, inputs_of, label_of, network_of, refreshed, started
from tl_jax.objectives.penalties import added, endpoint, half_square, select


def with_reference(objective: Objective, rule: str, field: str, *, statistics: bool = False) -> Objective:
    """The objective, whose start also copies the parameters that `rule` matches, and `batch_stats` where asked for."""

    def start(variables):
        variables = started(objective, variables)
        kept = {'params': trees.unflatten(select(variables['params'], rule, field))}
        if statistics and 'batch_stats' in variables:
            kept['batch_stats'] = variables['batch_stats']
        copies = jax.tree.map(jnp.copy, kept)
        return {**variables, 'reference': trees.merge(variables.get('reference', {}), copies)}

    return objective._replace(start=start)


def l2_sp(
    objective: Objective,
    *,
    weight: float = 0.01,
    fresh_weight: float = 0.01,
    shared: str = 'backbone/.*',
    fresh: str = 'head/.*',
) -> Objective:
    """L2-SP (Li, Grandvalet & Davoine 2018, arXiv:1802.01483, eq. 5): decay towards the start, not towards zero.

    loss + weight / 2 · Σ (w - w⁰)² over the parameters `shared` with the source + fresh_weight / 2 · Σ w² over the `fresh`

    Args:
      objective: that is wrapped.
      weight: α.
      fresh_weight: β; 0.01 in the paper, 0 for none.
      shared: regex of parameters that were loaded; w⁰ is what they are when the method begins.
      fresh: regex of those that start at random.
    """

    def penalty(variables, batch, aux, key):
        del batch, aux, key
        at_start = trees.flatten(variables['reference']['params'])
        now = select(variables['params'], shared, 'config.objective.l2_sp.shared')
        value = weight * half_square({path: w - at_start[path] for path, w in now.items()})
        if fresh_weight:
            value += fresh_weight * half_square(select(variables['params'], fresh, 'config.objective.l2_sp.fresh'))
        return value, {}

    return added(with_reference(objective, shared, 'config.objective.l2_sp.shared'), 'l2_sp', penalty)


def delta(
    objective: Objective,
    *,
    model: Model,
    stream: str = '',
    weight: float = 0.01,
    fresh_weight: float = 0.01,
    layers: Sequence[str] = (),
    fresh: str = 'head/.*',
    attention: bool = False,
    attention_batches: int = 0,
) -> Objective:
    """DELTA (Li et al. 2019, arXiv:1901.09229, eq. 5–8): feature maps stay near those of the network at the start.

    loss + weight / B · Σ_layers ½ ‖FM(w, x) - FM(w⁰, x)‖² + fresh_weight / 2 · Σ w² over the `fresh`

    With `attention` (scaled as in the authors' code) a map of H × W positions and C channels counts as
    C / (HW) · Σ_c W_c ½ ‖FM_c - FM⁰_c‖², W = softmax(standardised importance / 5), where a channel's importance is the
    rise of the cross-entropy, with the start's backbone and the present head, when the layer's output has that channel zeroed.
    `refresh` measures it when a stage begins: train the head alone in a first stage, as the paper does. It costs a pass
    over the stream for each channel. tllib sums over the batch where this takes the mean: its weight is B times this one.

    The reference is run in evaluation mode, one more forward pass a step.

    Args:
      objective: gives the layers in `Aux.endpoints`.
      model: the network.
      stream: that the forward pass sees; the objective's first unless given.
      weight: α.
      fresh_weight: β.
      layers: endpoints; all with positions [B, H, W, C] or [B, L, C] unless given. For `attention` each is also the
        name of a module of the backbone.
      fresh: regex of parameters that start at random.
      attention: whether channels are weighed.
      attention_batches: evaluation batches of the stream that are looked at for it; 0 for all.
    """
    stream = stream or objective.streams[0]

    shapes = functools.partial(map_shapes, model, layers)

    def init(key, batch):
        variables, inputs = objective.init(key, batch), inputs_of(batch[stream])
        maps = shapes(variables, inputs)
        if not attention:
            return variables
        for name, shape in maps.items():
            _check_module(model, variables, inputs, name, shape)
        uniform = {name: jnp.full(shape.shape[-1], 1 / shape.shape[-1]) for name, shape in maps.items()}
        return {**variables, 'channel_attention': uniform}

    def penalty(variables, batch, aux, key):
        del key
        inputs, apart = inputs_of(batch[stream]), []
        before = model.apply(reference_of(variables), inputs, train=False)
        for name in shapes(reference_of(variables), inputs):
            difference = endpoint(aux, name, 'delta').astype(jnp.float32) - before[name].astype(jnp.float32)
            channels = variables['channel_attention'][name] if attention else None
            apart.append(map_distance(difference, channels))
        value = weight * sum(apart)
        if fresh_weight:
            value += fresh_weight * half_square(select(variables['params'], fresh, 'config.objective.delta.fresh'))
        return value, {}

    def refresh(variables, batches):
        moved = refreshed(objective, variables, batches)
        sums = None
        for number, batch in enumerate(batches(stream)):
            if attention_batches and number >= attention_batches:
                break
            rises = measure(reference_of(variables), batch)
            sums = rises if sums is None else jax.tree.map(jnp.add, sums, rises)
        return {**moved, 'channel_attention': jax.tree.map(attention_weights, sums)}

    @jax.jit
    def measure(variables, batch):
        names = shapes(variables, inputs_of(batch))
        return {name: importance(model, variables, batch, name, s.shape[-1]) for name, s in names.items()}

    wrapped = with_reference(objective, '(backbone|adapters)/.*', 'config.objective.delta', statistics=True)
    wrapped = wrapped._replace(init=init, refresh=refresh if attention else objective.refresh)
    return added(wrapped, 'delta', penalty)


def map_shapes(model: Model, layers: Sequence[str], variables: Any, inputs: Any) -> dict[str, Any]:
    """Shapes of the endpoints in `layers`, or of all with positions where it is empty."""
    found = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, inputs)
    missing = next((name for name in layers if name not in found), None)
    if missing:
        raise UserError(f"config.objective.delta.layers: the network gives no '{missing}'; {nearest(missing, found)}")
    maps = {name: found[name] for name in (layers or found) if layers or found[name].ndim > 2}
    if not maps:
        raise UserError('config.objective.delta.layers: the network gives no map with positions; name layers')
    return maps


def reference_of(variables: Any) -> dict[str, Any]:
    """The network with the parameters and statistics that it started with, where they were kept, and its present head."""
    return trees.merge(network_of(variables), variables['reference'])


def map_distance(
    difference: Float[Array, 'batch *positions channels'], attention: Float[Array, 'channels'] | None
) -> Float[Array, '']:
    """½ ‖difference‖² for each example, or C / positions · Σ_c W_c ½ ‖difference_c‖² with weights of channels."""
    squares = jnp.square(difference)
    if attention is not None:
        positions = math.prod(difference.shape[1:-1])
        squares = squares * (attention * (difference.shape[-1] / positions))
    return 0.5 * jnp.sum(squares) / len(difference)


def importance(model: Model, variables: Any, batch: Any, layer: str, channels: int) -> Float[Array, 'channels']:
    """By how much the summed cross-entropy of a batch rises when a layer's channel is zero, for each channel."""
    inputs, label, mask = inputs_of(batch), label_of(batch), batch['mask']

    def total(keep):
        with linen.intercept_methods(functools.partial(_ablate, f'backbone/{layer}', keep)):
            logits = model.apply(variables, inputs, train=False)['logits']
        return jnp.sum(mask * cross_entropy(logits, label))

    whole = total(jnp.ones(channels))
    return jax.lax.map(
        lambda channel: total((jnp.arange(channels) != channel).astype(jnp.float32)) - whole, jnp.arange(channels)
    )


def attention_weights(importance: Float[Array, 'channels']) -> Float[Array, 'channels']:
    """softmax(z / 5), z the importance standardised over the layer's channels, as in the authors' code."""
    spread = jnp.std(importance)
    return jax.nn.softmax((importance - jnp.mean(importance)) / jnp.where(spread > 0, spread, 1) / 5)


def _ablate(path, keep, run, args, kwargs, context):
    outputs = run(*args, **kwargs)
    mine = context.method_name == '__call__' and '/'.join(context.module.path) == path
    return outputs * keep.astype(outputs.dtype) if mine else outputs


def _check_module(model: Model, variables: Any, inputs: Any, layer: str, shape: Any) -> None:
    """Refuses an endpoint that no module of its name, with as many channels, stands behind."""
    widths = []

    def look(run, args, kwargs, context):
        outputs = run(*args, **kwargs)
        if context.method_name == '__call__' and '/'.join(context.module.path) == f'backbone/{layer}':
            widths.append(outputs.shape[-1] if hasattr(outputs, 'shape') else None)
        return outputs

    def traced(variables, inputs):
        with linen.intercept_methods(look):
            model.apply(variables, inputs, train=False)

    jax.eval_shape(traced, variables, inputs)
    if shape.shape[-1] not in widths:
        raise UserError(
            f"config.objective.delta.layers: no module backbone/{layer} gives the {shape.shape[-1]} channels of '{layer}', so "
            'that none can be taken away; name others, or leave out attention'
        )
