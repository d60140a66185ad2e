"""Exact evaluation: every example of a source counted once, on any number of devices and processes."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tl_jax import mesh as mesh_lib
from tl_jax.metrics import Classification, classification_figures
from tl_jax.objectives.base import label_of


class Predictions(NamedTuple):
    """A row for each example of a source, in the source's order."""

    index: np.ndarray  # int32 [N]
    label: np.ndarray  # int32 [N]
    probabilities: np.ndarray  # float32 [N, C]
    features: np.ndarray | None  # float16 [N, D]


def create_eval_step(predict: Callable, *, classification: bool = True) -> Callable:
    """Returns the compiled `(variables, batch) -> (Classification or None, outputs)`.

    Of a classification, `predict` gives at least `logits` [B, C], and its loss and confusions are counted on the device.
    """

    def eval_step(variables, batch):
        outputs = predict(variables, batch)
        if not classification:
            return None, dict(outputs)
        counted = Classification.single_from_model_output(
            logits=outputs['logits'], label=label_of(batch), mask=batch['mask']
        )
        kept = {'probabilities': jax.nn.softmax(outputs['logits'].astype(jnp.float32))}
        if 'features' in outputs:
            kept['features'] = outputs['features'].astype(jnp.float16)
        return counted, kept

    return jax.jit(eval_step)


def evaluate(
    eval_step: Callable,
    variables: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    figures: Callable | None = None,
    predictions: bool = False,
) -> tuple[dict[str, float], Predictions | None]:
    """Returns the figures over all unmasked examples and, where asked for, each example's prediction.

    Args:
      eval_step: from `create_eval_step`.
      variables: of the model, placed on the mesh.
      batches: padded batches with `mask`, this process's rows of each.
      mesh: the devices.
      figures: from the outputs for all examples, numpy [N, …] each, to `{name: float}`; None for a classification.
      predictions: whether to bring the outputs of every example to the host.
    """
    total, rows = None, []
    for batch in batches:
        placed = mesh_lib.put_batch(batch, mesh)
        counted, outputs = eval_step(variables, placed)
        if figures is not None:
            rows.append(mesh_lib.to_host({**outputs, 'index': placed['index'], 'mask': placed['mask']}))
            continue
        total = counted if total is None else total.merge(counted)
        if predictions:
            outputs = {**outputs, **{k: placed[k] for k in ('index', 'label', 'mask')}}
            rows.append(mesh_lib.to_host(outputs))
    if figures is not None:
        columns = _collect(rows)
        return {name: float(value) for name, value in figures(columns).items()}, None
    values = classification_figures(total)
    if not predictions:
        return values, None
    columns = _collect(rows)
    return values, Predictions(columns['index'], columns['label'], columns['probabilities'], columns.get('features'))


def _collect(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The rows of all examples, in the source's order, without padding."""
    columns = {name: np.concatenate(_of_one_width([row[name] for row in rows])) for name in rows[0]}
    real = np.flatnonzero(columns['mask'] > 0)
    order = real[np.argsort(columns['index'][real], kind='stable')]
    return {name: column[order] for name, column in columns.items() if name != 'mask'}


def _of_one_width(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Arrays [rows, width], those of batches of shorter texts filled up with -1."""
    width = max(part.shape[1:2] for part in parts)
    return [
        np.pad(part, ((0, 0), (0, width[0] - part.shape[1])), constant_values=-1) if part.shape[1:2] != width else part
        for part in parts
    ]
