"""Exact evaluation: every example of a source counted once, on any number of devices and processes."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tl_jax import mesh as mesh_lib
from tl_jax.metrics import Classification, classification_figures


class Predictions(NamedTuple):
    """A row for each example of a source, in the source's order."""

    index: np.ndarray  # int32 [N]
    label: np.ndarray  # int32 [N]
    probabilities: np.ndarray  # float32 [N, C]
    features: np.ndarray | None  # float16 [N, D]


def create_eval_step(predict: Callable) -> Callable:
    """Returns the compiled `(variables, batch) -> (Classification, outputs)`; `predict` gives at least `logits` [B, C]."""

    def eval_step(variables, batch):
        outputs = predict(variables, batch)
        counted = Classification.single_from_model_output(
            logits=outputs['logits'], label=batch['label'], mask=batch['mask']
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
    predictions: bool = False,
) -> tuple[dict[str, float], Predictions | None]:
    """Returns the figures over all unmasked examples and, where asked for, each example's prediction.

    Args:
      eval_step: from `create_eval_step`.
      variables: of the model, placed on the mesh.
      batches: padded batches with `mask`, this process's rows of each.
      mesh: the devices.
      predictions: whether to bring the outputs of every example to the host.
    """
    total, rows = None, []
    for batch in batches:
        placed = mesh_lib.put_batch(batch, mesh)
        counted, outputs = eval_step(variables, placed)
        total = counted if total is None else total.merge(counted)
        if predictions:
            outputs = {**outputs, **{k: placed[k] for k in ('index', 'label', 'mask')}}
            rows.append(mesh_lib.to_host(outputs))
    figures = classification_figures(total)
    return figures, _collect(rows) if predictions else None


def _collect(rows: list[dict[str, np.ndarray]]) -> Predictions:
    columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    real = np.flatnonzero(columns['mask'] > 0)
    order = real[np.argsort(columns['index'][real], kind='stable')]
    features = columns['features'][order] if 'features' in columns else None
    return Predictions(columns['index'][order], columns['label'][order], columns['probabilities'][order], features)
