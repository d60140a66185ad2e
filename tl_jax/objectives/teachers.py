"""Teachers that follow their student: the moving average of its weights labels what has no labels."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax, nn
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.config import call
from tl_jax.errors import UserError
from tl_jax.objectives.base import (
    Aux,
    Model,
    Objective,
    accuracy,
    cross_entropy,
    forward,
    inputs_of,
    label_of,
    network_of,
)
from tl_jax.objectives.perturb import random_view


def self_ensembling(
    model: Model,
    *,
    source: str = 'source',
    target: str = 'target',
    weight: float = 3.0,
    decay: float = 0.99,
    consistency: Literal['squared', 'binary'] = 'squared',
    confidence: float = 0.96837722,
    rampup: float = 0.0,
    class_balance: float = 0.005,
    view: Mapping[str, Any] | None = None,
    source_view: Mapping[str, Any] | None = None,
    average_statistics: bool = False,
) -> Objective:
    """Self-ensembling for domain adaptation (French, Mackiewicz & Fisher 2018, arXiv:1706.05208), as the authors' code.

    loss = mean_i CE(s(x_i), y_i) + weight · r · (mean_j m_j d(p_j, q_j) + class_balance · mean_j m_j · b(mean_j p_j))

    Source x, y; target z; p_j = softmax s(view of z_j) of the student, q_j = softmax t(another view of z_j) of the teacher,
    which no gradient enters. d(p, q) = mean_c (p_c - q_c)², or the binary cross-entropy of each class. m_j = 1 where
    max q_j > confidence (sec. 3.3), else 0. b(p) = sum_c BCE(p_c, 1/C), the class balance loss (sec. 3.4).
    r = exp(-5 (1 - fraction / rampup)²) until `fraction` of the stage reaches `rampup`, then 1 (sec. 3.1).

    Teacher: weights t ← decay · t + (1 - decay) · s after every update of the student, from t = s; its batch norm normalises
    by its own batches and keeps its own running statistics, of target views alone. Source and target pass through the
    student one after the other, so that batch norm sees each domain alone (sec. 3.2). `predict` is the teacher. The average
    is taken once a call of the loss: with `accumulated` gradients, once a part.

    With `confidence=0, class_balance=0, rampup=0.3` on a labelled and an unlabelled stream of one data set this is the mean
    teacher (Tarvainen & Valpola 2017, arXiv:1703.01780).

    Args:
      model: the student.
      source: name of the labelled stream: image [B, H, W, C], label [B] int.
      target: name of the unlabelled one.
      weight: of the unsupervised part.
      decay: share of the old teacher that stays at an update.
      consistency: what compares the two predictions.
      confidence: what the teacher's highest probability must exceed; 0 for all examples, as with a ramp in the paper.
      rampup: share of the stage during which the unsupervised weight grows; 0 for none, as with a threshold in the paper.
      class_balance: weight of the class balance loss.
      view: fields of `perturb.random_view`; translation 2 and noise 0.1 unless given.
      source_view: the same for the source; as `view` unless given.
      average_statistics: whether the teacher's running statistics are averaged with the student's too (their --fix_ema).

    Returns nats per example (the squared difference has no unit).
    """
    if not 0 <= decay < 1:
        raise UserError(f'config.objective.decay: must lie in 0 … 1, below 1, not {decay}; 0.99 is the paper’s')
    if not 0 <= confidence < 1:
        raise UserError(
            f'config.objective.confidence: must lie in 0 … 1, below 1, not {confidence}; 0 takes all examples'
        )
    if not 0 <= rampup <= 1:
        raise UserError(f'config.objective.rampup: is a share of the stage, 0 … 1, not {rampup}')
    given = {'translation': 2.0, 'noise': 0.1} if view is None else view
    seen = call(random_view, given, 'config.objective.view')
    shown = call(random_view, given if source_view is None else source_view, 'config.objective.source_view')
    compare = {'squared': squared, 'binary': binary_cross_entropy}[consistency]

    def init(key, batch):
        return start(model.init(key, inputs_of(batch[source])))

    def start(variables):
        kept = network_of(variables)
        return {**variables, 'teacher': jax.tree.map(jnp.copy, kept)}

    def loss(variables, batch, key):
        keys = jax.random.split(key, 6)
        teacher = lax.stop_gradient(teacher_of(variables, decay, average_statistics))
        labelled, moved = forward(model, variables, shown(keys[0], inputs_of(batch[source])), keys[1])
        variables = trees.merge(variables, moved)
        student, moved = forward(model, variables, seen(keys[2], inputs_of(batch[target])), keys[3])
        markers, _ = trees.split(moved.get('batch_stats', {}), _is_marker)
        views = seen(keys[4], inputs_of(batch[target]))
        teaching, teacher = teach(model, teacher, markers, views, keys[5])

        p, q = (nn.softmax(x['logits'].astype(jnp.float32)) for x in (student, teaching))
        unsupervised, metrics = disagreement(p, lax.stop_gradient(q), compare, confidence, class_balance)
        ramp = gaussian_ramp(variables['progress']['fraction'], rampup) if rampup else 1.0
        supervised = jnp.mean(cross_entropy(labelled['logits'], label_of(batch[source])))
        metrics |= {'accuracy': accuracy(labelled['logits'], label_of(batch[source])), 'supervised': supervised}
        return supervised + weight * ramp * unsupervised, Aux(metrics, {**moved, 'teacher': teacher})

    def predict(variables, batch):
        return model.apply(teacher_of(variables, decay, average_statistics), inputs_of(batch), train=False)

    def export(variables):
        return {**variables, **teacher_of(variables, decay, average_statistics)}

    return Objective(init, loss, predict, start=start, export=export, streams=(source, target))


def teacher_of(variables: Any, decay: float, average_statistics: bool = False) -> dict[str, Any]:
    """The teacher after the student's last update, from the collection `teacher`, which is the one before it.

    A loss sees the student before its update; so the collection runs one average behind, and each reader takes that average.
    """
    old = variables['teacher']
    averaged = ('params', 'batch_stats') if average_statistics else ('params',)
    return {
        name: trees.unflatten(_average(trees.flatten(tree), trees.flatten(variables[name]), decay))
        if name in averaged
        else tree
        for name, tree in old.items()
    }


def teach(
    model: Model, teacher: Mapping[str, Any], markers: Mapping[str, Any], inputs: Array, key: Array
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The teacher's endpoints in training mode, and the teacher with its own statistics moved.

    `markers` are those of the student's batch norms that a stage freezes; the teacher's are then frozen with them.
    """
    endpoints, moved = forward(model, trees.merge(teacher, {'batch_stats': markers}), inputs, key)
    return endpoints, trees.merge(teacher, trees.split(moved, lambda path: not _is_marker(path))[0])


def disagreement(
    p: Float[Array, 'batch classes'],
    q: Float[Array, 'batch classes'],
    compare: Callable,
    confidence: float,
    class_balance: float,
) -> tuple[Float[Array, ''], dict[str, Array]]:
    """The unsupervised loss of `self_ensembling` before its weight and ramp, and its parts for the log."""
    confident = (jnp.max(q, -1) > confidence).astype(jnp.float32)
    apart = jnp.mean(confident * jnp.mean(compare(p, q), -1))
    imbalance = jnp.mean(confident) * class_imbalance(p)
    parts = {'consistency': apart, 'imbalance': imbalance, 'confident': jnp.mean(confident)}
    return apart + class_balance * imbalance, parts


def squared(p: Float[Array, '*shape'], q: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """(p - q)²."""
    return jnp.square(p - q)


def binary_cross_entropy(p: Float[Array, '*shape'], q: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """-(q log(p + ε) + (1 - q) log(1 - p + ε)), ε = 1e-6, as the authors' `robust_binary_crossentropy`."""
    return -(q * jnp.log(p + 1e-6) + (1 - q) * jnp.log(1 - p + 1e-6))


def class_imbalance(p: Float[Array, 'batch classes']) -> Float[Array, '']:
    """sum_c BCE(mean_j p_jc, 1/C): least where the predictions spread evenly over the classes."""
    mean = jnp.mean(p, 0)
    return jnp.sum(binary_cross_entropy(mean, jnp.full_like(mean, 1 / mean.size)))


def gaussian_ramp(fraction: Float[Array, ''], length: float) -> Float[Array, '']:
    """exp(-5 (1 - fraction / length)²), 1 from `length` on (Laine & Aila 2017, arXiv:1610.02242)."""
    return jnp.exp(-5 * jnp.square(jnp.maximum(1 - fraction / length, 0)))


def _average(old: Mapping[str, Array], new: Mapping[str, Array], decay: float) -> dict[str, Array]:
    return {path: decay * leaf + (1 - decay) * new[path] for path, leaf in old.items()}


def _is_marker(path: str) -> bool:
    return path.endswith('/frozen')
