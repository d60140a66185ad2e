"""What raising one bias mends, on predictions made by hand."""

import json

import numpy as np
import pytest

from experiments import omitted_digit
from tl_jax.errors import UserError


def test_the_best_bias_mends_the_threes_and_no_more(tmp_path, monkeypatch):
    # Four 3s that lack 1, 1.95, 1.95 and 6 in their logit, and two 8s that become 3s beyond 2.5 and 5.
    lacking, label = np.array([1.0, 1.95, 1.95, 6.0]), np.array([3, 3, 3, 3, 8, 8])
    logits = np.zeros((6, 10))
    logits[np.arange(4), 5], logits[4:, 8] = lacking, (2.55, 5.05)
    assert omitted_digit.mistakes(logits, label) == (4, 4)
    bias = omitted_digit.best_bias(logits, label)
    assert bias == 2.0 and omitted_digit.mistakes(logits, label, bias) == (1, 1)
    (tmp_path / 'run/predictions').mkdir(parents=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.savez(tmp_path / 'run/predictions/test.npz', probabilities=probabilities, label=label)
    (tmp_path / 'run/summary.json').write_text(json.dumps({'seed': 0}))
    monkeypatch.setattr(omitted_digit, 'RESULT', tmp_path / 'result.json')
    assert omitted_digit.main([str(tmp_path / 'run')]) == 0
    ours = json.loads((tmp_path / 'result.json').read_text())['ours']
    assert ours == {
        'mistakes': 4,
        'mistakes_on_3s': 4,
        'bias': 2.0,
        'mistakes_after': 1,
        'mistakes_on_3s_after': 1,
        'right_of_3s_after_%': 75.0,
    }
    with pytest.raises(UserError, match='finish the run first'):
        omitted_digit.main([str(tmp_path)])
