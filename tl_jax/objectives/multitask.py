"""Several tasks on one body, and how their losses are weighed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.gradients.surgery import Normalisation, min_norm_weights, normalized
from tl_jax.objectives.base import Aux, Model, Objective, accuracy, cross_entropy, forward, inputs_of, recast


def multitask(
    model: Model,
    *,
    num_classes: int,
    tasks: Sequence[str] | Mapping[str, int],
    weights: Literal['uniform', 'uncertainty', 'gradnorm', 'mgda_ub'] | Sequence[float] = 'uniform',
    shared_layer: str = '',
    asymmetry: float = 1.5,
    normalize: Normalisation = 'none',
    stream: str = 'train',
) -> Objective:
    """Classifies every example once for each task: shared role `backbone`, and a head in a role named after its task.

    loss = Σ_t w_t CE(logits_t, label_t), nats per example, where w is

      'uniform'      1 for every task, or the numbers given;
      'uncertainty'  exp(-s_t), and s_t / 2 is added: s_t = log σ_t² is the parameter `log_variance/<task>`, from 0
                     (Kendall et al. 2018, arXiv:1705.07115, eq. 10);
      'gradnorm'     T softmax(v), v the parameters `task_weights/<task>`, from 0, moved by `gradnorm_gaps` alone
                     (Chen et al. 2018, arXiv:1711.02257, algorithm 1);
      'mgda_ub'      the least-norm combination of the tasks' gradients of the features
                     (Sener & Koltun 2018, arXiv:1810.04650, sec. 3.3).

    `Aux.losses` are the terms of the sum, for gradients that combine them (`pcgrad`, `mgda`: leave `weights` uniform).
    Expects its stream: image [B, H, W, C], and label_<task> [B] int for every task. A subset of the tasks trains alone.

    Args:
      model: its features feed every head.
      num_classes: of a task that gives no number.
      tasks: their names, or `{name: number of classes}`; the heads are as wide as the model's, and narrower tasks use the
        first logits.
      weights: see above.
      shared_layer: for GradNorm, regex over the parameters of the last layer that the tasks share.
      asymmetry: GradNorm's α, how strongly the tasks' speeds are pulled together.
      normalize: for MGDA-UB, what each gradient is divided by: 'none', 'l2', 'loss' or 'loss+'.
      stream: that it learns from.
    """
    classes = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(tasks, num_classes)
    names = list(classes)
    _check(names, weights, shared_layer)
    networks = {name: recast(model, head=name) for name in names}
    heads = Heads(networks, classes)
    if not isinstance(weights, str):
        weigh = _fixed(weights)
    elif weights == 'uncertainty':
        weigh = _uncertainty(names)
    elif weights == 'gradnorm':
        weigh = _gradnorm(heads, shared_layer, asymmetry)
    else:
        weigh = _mgda_ub(heads, normalize) if weights == 'mgda_ub' else _fixed([1.0] * len(names))

    def init(key, batch):
        inputs, keys = inputs_of(batch[stream]), jax.random.split(key, len(names))
        made = [networks[name].init(k, inputs) for name, k in zip(names, keys, strict=True)]
        zeros = {name: jnp.zeros(()) for name in names}
        extra = {
            'uncertainty': {'params': {'log_variance': zeros}},
            'gradnorm': {'params': {'task_weights': zeros}, 'initial_losses': zeros},
        }
        # Every network brings a body; the first one's stays.
        return trees.merge(*made[::-1], extra.get(weights, {}) if isinstance(weights, str) else {})

    def loss(variables, batch, key):
        fields = batch[stream]
        losses, seen = _losses(heads, variables, fields, key)
        share, terms, changed = weigh(variables, fields, key, losses, seen)
        metrics = {}
        for name, value, right, weight in zip(names, losses, seen.accuracies, share, strict=True):
            metrics |= {f'loss_{name}': value, f'accuracy_{name}': right, f'weight_{name}': weight}
        parts = dict(zip(names, terms, strict=True))
        return jnp.sum(terms), Aux(metrics, {**seen.collections, **changed}, parts)

    def predict(variables, batch):
        features = networks[names[0]].apply(variables, inputs_of(batch), train=False)['features']
        logits = {f'logits_{name}': _logits(heads, name, variables, features, train=False) for name in names}
        return {**logits, **{f'label_{name}': _label(batch, name) for name in names}}

    return Objective(init, loss, predict, figures=lambda p: task_figures(p, names), streams=(stream,))


def uncertainty_terms(losses: Float[Array, 'tasks'], log_variance: Float[Array, 'tasks']) -> Float[Array, 'tasks']:
    """Classification with homoscedastic uncertainty, L / σ² + log σ (Kendall et al. 2018, arXiv:1705.07115, eq. 10)."""
    return jnp.exp(-log_variance) * losses + log_variance / 2


def gradnorm_gaps(
    weights: Float[Array, 'tasks'],
    norms: Float[Array, 'tasks'],
    ratios: Float[Array, 'tasks'],
    asymmetry: float,
) -> Float[Array, 'tasks']:
    """|G_t - mean(G) r_t^α| with G_t = w_t |∇_W L_t|: their sum moves the weights (Chen et al. 2018, arXiv:1711.02257, eq. 2).

    Args:
      weights: w, the only argument that the result is differentiated by; the target is a constant.
      norms: |∇_W L_t| of the last shared layer.
      ratios: L_t / L_t(0); r_t is its share of the mean ratio.
      asymmetry: α.
    """
    sizes = weights * jax.lax.stop_gradient(norms)
    target = jnp.mean(sizes) * (ratios / jnp.mean(ratios)) ** asymmetry
    return jnp.abs(sizes - jax.lax.stop_gradient(target))


def task_figures(predictions: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, float]:
    """`<task>/loss` (nats) and `<task>/accuracy`, and their means over tasks as `loss` and `accuracy`."""
    figures = {}
    for name in names:
        logits, label = predictions[f'logits_{name}'].astype(np.float64), predictions[f'label_{name}']
        chosen = np.take_along_axis(logits, label[:, None], -1)[:, 0]
        figures[f'{name}/loss'] = float(np.mean(np.logaddexp.reduce(logits, -1) - chosen))
        figures[f'{name}/accuracy'] = float(np.mean(np.argmax(logits, -1) == label))
    means = {kind: float(np.mean([figures[f'{name}/{kind}'] for name in names])) for kind in ('loss', 'accuracy')}
    return {**means, **figures}


class Heads(NamedTuple):
    """The tasks: the network of each, which differ in their heads, and the number of its classes."""

    networks: Mapping[str, Model]
    classes: Mapping[str, int]


class Seen(NamedTuple):
    """What a forward pass gives besides the losses; `key` is that of the heads."""

    accuracies: Float[Array, 'tasks']
    collections: dict[str, Any]
    features: Float[Array, 'batch dim']
    key: Array


def _losses(heads: Heads, variables, fields, key) -> tuple[Float[Array, 'tasks'], Seen]:
    body_key, heads_key = jax.random.split(key)
    body = next(iter(heads.networks.values()))
    endpoints, collections = forward(body, variables, inputs_of(fields), body_key)
    losses, accuracies = _head_losses(heads, variables, endpoints['features'], fields, heads_key)
    return losses, Seen(accuracies, collections, endpoints['features'], heads_key)


def _head_losses(heads: Heads, variables, features, fields, key) -> tuple[Float[Array, 'tasks'], Float[Array, 'tasks']]:
    losses, accuracies = [], []
    for name, k in zip(heads.networks, jax.random.split(key, len(heads.networks)), strict=True):
        logits, label = _logits(heads, name, variables, features, train=True, rngs={'dropout': k}), _label(fields, name)
        losses.append(jnp.mean(cross_entropy(logits, label)))
        accuracies.append(accuracy(logits, label))
    return jnp.stack(losses), jnp.stack(accuracies)


# The weights: (variables, fields, key, losses, Seen) -> (weights, terms of the loss, changed collections).


def _fixed(numbers: Sequence[float]) -> Callable:
    share = jnp.asarray(numbers, jnp.float32)
    return lambda variables, fields, key, losses, seen: (share, share * losses, {})


def _uncertainty(names: Sequence[str]) -> Callable:
    def weigh(variables, fields, key, losses, seen):
        log_variance = _vector(variables['params']['log_variance'], names)
        return jnp.exp(-log_variance), uncertainty_terms(losses, log_variance), {}

    return weigh


def _gradnorm(heads: Heads, shared_layer: str, asymmetry: float) -> Callable:
    names = list(heads.networks)

    def weigh(variables, fields, key, losses, seen):
        values, stored = jax.lax.stop_gradient(losses), _vector(variables['initial_losses'], names)
        initial = jnp.where(stored > 0, stored, values)
        norms = _gradient_norms(lambda v: _losses(heads, v, fields, key)[0], variables, shared_layer)
        share = len(names) * nn.softmax(_vector(variables['params']['task_weights'], names))
        terms = jax.lax.stop_gradient(share) * losses + gradnorm_gaps(share, norms, values / initial, asymmetry)
        return share, terms, {'initial_losses': dict(zip(names, initial, strict=True))}

    return weigh


def _mgda_ub(heads: Heads, normalize: Normalisation) -> Callable:
    def weigh(variables, fields, key, losses, seen):
        constants, features, values = jax.lax.stop_gradient((variables, seen.features, losses))
        jacobian = jax.jacrev(lambda z: _head_losses(heads, constants, z, fields, seen.key)[0])(features)
        grads = jacobian.reshape(len(values), -1)
        gram = jnp.matmul(grads, grads.T, precision='highest')
        share = min_norm_weights(normalized(gram, values, normalize))
        return share, share * losses, {}

    return weigh


def _check(names: Sequence[str], weights: Any, shared_layer: str) -> None:
    reserved = {'backbone', 'head', 'log_variance', 'task_weights'} & set(names)
    if not names or reserved:
        what = f"'{reserved.pop()}' is the name of another role" if reserved else 'names no task'
        raise UserError(f'config.objective.tasks: {what}; name the label_<task> fields of the data')
    if not isinstance(weights, str) and len(weights) != len(names):
        raise UserError(f'config.objective.weights: {len(weights)} numbers for {len(names)} tasks')
    if weights == 'gradnorm' and not shared_layer:
        raise UserError(
            "config.objective.shared_layer: GradNorm needs the last layer that the tasks share, such as 'backbone/dense1/kernel'"
        )


def _vector(by_task: Mapping[str, Array], names: Sequence[str]) -> Float[Array, 'tasks']:
    return jnp.stack([by_task[name] for name in names])


def _label(fields: Mapping[str, Any], task: str) -> Any:
    if f'label_{task}' not in fields:
        raise UserError(f"config.objective.tasks: the data have no field 'label_{task}'; they have {', '.join(fields)}")
    return fields[f'label_{task}']


def _logits(heads: Heads, task: str, variables, features, **options) -> Float[Array, 'batch classes']:
    logits, classes = heads.networks[task].classify(variables, features, **options), heads.classes[task]
    if logits.shape[-1] < classes:
        raise UserError(
            f'config.objective.tasks.{task}: {classes} classes, and the heads have {logits.shape[-1]}; raise'
            ' config.model.num_classes'
        )
    return logits[:, :classes]


def _gradient_norms(losses_of, variables, rule: str) -> Float[Array, 'tasks']:
    """Each loss's gradient norm with respect to the parameters that `rule` matches; constants to the outer gradient.

    The forward pass is written twice and, being the same, compiled once.
    """
    variables = jax.lax.stop_gradient(variables)
    pattern = trees.compiled(rule, 'config.objective.shared_layer')
    layer, rest = trees.split(variables['params'], lambda path: bool(pattern.fullmatch(path)))
    if not layer:
        paths = [path for path in trees.flatten(rest) if path.startswith('backbone/')]
        raise UserError(
            f"config.objective.shared_layer: '{rule}' matches no parameter; the last are {', '.join(paths[-2:])}"
        )

    def losses(layer):
        return losses_of({**variables, 'params': trees.merge(rest, layer)})

    values, pullback = jax.vjp(losses, layer)
    grads = [jax.tree.leaves(pullback(row)[0]) for row in jnp.eye(len(values))]
    return jnp.sqrt(jnp.stack([sum(jnp.sum(jnp.square(g)) for g in leaves) for leaves in grads]))
