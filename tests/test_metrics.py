"""Exact evaluation, against scikit-learn and against any split over batches and devices."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as reference

from tl_jax import mesh as mesh_lib
from tl_jax.evaluate import create_eval_step, evaluate

N, CLASSES = 101, 7  # a prime number of examples
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(N, CLASSES)).astype(np.float32)
LABELS = RNG.integers(0, CLASSES - 1, N).astype(np.int32)  # the last class never occurs


def batches(size):
    for start in range(0, N, size):
        rows = np.arange(start, min(start + size, N))
        pad = size - len(rows)
        yield {
            'image': np.pad(LOGITS[rows], ((0, pad), (0, 0))),
            'label': np.pad(LABELS[rows], (0, pad)),
            'mask': np.pad(np.ones(len(rows), np.float32), (0, pad)),
            'index': np.pad(rows.astype(np.int32), (0, pad), constant_values=-1),
        }


@pytest.mark.parametrize(('size', 'devices'), [(101, 1), (8, 1), (16, 8), (40, 4)])
def test_every_example_counts_once_however_it_is_split(size, devices):
    step = create_eval_step(lambda variables, batch: {'logits': batch['image'], 'features': batch['image'][:, :2]})
    mesh = mesh_lib.create_mesh(data=devices)
    if size % devices:
        pytest.skip('not a whole share')
    figures, predictions = evaluate(step, {}, batches(size), mesh, predictions=True)
    guess = LOGITS.argmax(1)
    log_p = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(1, keepdims=True))
    assert figures['accuracy'] == np.mean(guess == LABELS)
    assert figures['macro_f1'] == pytest.approx(reference.f1_score(LABELS, guess, average='macro'), rel=1e-12)
    assert figures['balanced_accuracy'] == pytest.approx(reference.balanced_accuracy_score(LABELS, guess), rel=1e-12)
    assert figures['mcc'] == pytest.approx(reference.matthews_corrcoef(LABELS, guess), rel=1e-12)
    assert figures['loss'] == pytest.approx(-log_p[np.arange(N), LABELS].mean(), rel=1e-6)
    assert (predictions.index == np.arange(N)).all() and (predictions.label == LABELS).all()
    np.testing.assert_allclose(predictions.probabilities, np.exp(log_p), rtol=1e-5)
    assert predictions.features.dtype == jnp.float16
