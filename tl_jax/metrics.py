"""What an evaluation counts: clu metrics on the device, and the figures derived from them on the host."""

from typing import Any

import clu.metrics
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, 'batch classes'],
    label: Int[Array, 'batch'],
    mask: Float[Array, 'batch'] | None = None,
    **_,
) -> Float[Array, 'batch']:
    """Nats per example."""
    del mask
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), label)


@flax.struct.dataclass
class Confusion(clu.metrics.Metric):
    """Counts of (true class, predicted class); integers, so that any split over devices gives the same."""

    counts: Int[Array, 'classes classes']

    @classmethod
    def from_model_output(cls, logits, label, mask, **_):
        classes = logits.shape[-1]
        predicted = jnp.argmax(logits, axis=-1)
        counted = jnp.zeros((classes, classes), jnp.int32).at[label, predicted].add((mask > 0).astype(jnp.int32))
        return cls(counted)

    def merge(self, other):
        return type(self)(self.counts + other.counts)

    def compute(self):
        return self.counts


@flax.struct.dataclass
class Classification(clu.metrics.Collection):
    """Loss and confusion counts of outputs with `logits` [B, C], for batches with `label` [B] and `mask` [B]."""

    loss: clu.metrics.Average.from_fun(cross_entropy)
    confusion: Confusion


def classification_figures(collection: Classification) -> dict[str, float]:
    """Returns loss (nats), accuracy, macro_f1 and balanced_accuracy (each in 0…1), and mcc (-1…1) of a finished collection."""
    values = jax.tree.map(np.asarray, collection.compute())
    counts = values['confusion'].astype(np.float64)
    hits, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    seen, present, total = (true + predicted) > 0, true > 0, counts.sum()
    spread = np.sqrt((total**2 - predicted @ predicted) * (total**2 - true @ true))
    return {
        'loss': float(values['loss']),
        'accuracy': float(hits.sum() / counts.sum()),
        # As scikit-learn: the mean over the classes that occur, in truth or prediction.
        'macro_f1': float(np.mean(2 * hits[seen] / (true + predicted)[seen])),
        'balanced_accuracy': float(np.mean(hits[present] / true[present])),
        # Matthews' correlation for any number of classes (Gorodkin 2004, eq. 8); 0 where one class is all.
        'mcc': float((hits.sum() * total - true @ predicted) / spread) if spread > 0 else 0.0,
    }


def half_interval(values: np.ndarray) -> np.ndarray:
    """Half the 95 % interval of the mean over the first axis: 1.96 standard errors."""
    return 1.96 * values.std(0) / np.sqrt(len(values))


def figures_of(records: list[dict[str, Any]]) -> dict[str, float]:
    """Averages the training metrics of several steps, already on the host."""
    return {name: float(np.mean([r[name] for r in records])) for name in records[0]}
