"""Cross-entropy with smoothed labels and weighted classes, in float64."""

import jax
import numpy as np
import pytest

from tl_jax.objectives import Model, supervised

LABEL = np.array([0, 2, 2, 1, 0])
# As a view mixes them.
TARGET = np.array([[0.7, 0.3, 0], [0, 0.4, 0.6], [0, 0, 1], [0.2, 0.5, 0.3], [1, 0, 0]])


@pytest.mark.parametrize('fields', [{'label': LABEL}, {'target': TARGET.astype(np.float32)}], ids=list)
@pytest.mark.parametrize('weights', [None, [0.5, 1.0, 3.0]])
def test_smoothed_and_weighted_in_float64(weights, fields):
    """Σ w[y] · (-Σ_c ((1 - s) q_c + s / C) log p_c) / Σ w[y]; a mixed example weighs Σ_c w_c q_c."""
    logits = 3 * np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    model = Model(None, lambda variables, inputs, **options: ({'logits': inputs}, {}))
    objective = supervised(model, num_classes=3, label_smoothing=0.2, class_weights=weights)
    value, _ = objective.loss({}, {'train': {'image': logits, **fields}}, jax.random.key(0))

    log_p = logits.astype(np.float64)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    q = fields.get('target', np.eye(3)[LABEL]).astype(np.float64)
    each = -np.sum((0.8 * q + 0.2 / 3) * log_p, 1)
    share = q @ (weights or [1, 1, 1])
    assert float(value) == pytest.approx(np.sum(share * each) / np.sum(share), rel=1e-6)
