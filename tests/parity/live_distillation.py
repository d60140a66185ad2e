"""Distillation's terms beside the same formulas in torch: `make parity`, or for some cases

    .venv-parity/bin/python -m pytest tests/parity/live_distillation.py -k dkd

In float64 on both sides, so that what differs is a formula. With GOLDEN=1 in the environment the golden files are written
anew from torch's figures.
"""

import os

import distillation_harness as harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_harness import error

pytest.importorskip('torch')

CASES = [(family, name, case) for family, cases in harness.families().items() for name, case in cases.items()]


@pytest.mark.parametrize(('family', 'name', 'case'), CASES, ids=[name for _, name, _ in CASES])
def test_value_and_gradients(family, name, case, monkeypatch):
    # Our terms compute in float32 whatever they are given; for this comparison they shall not.
    monkeypatch.setattr(jnp, 'float32', jnp.float64)
    with jax.enable_x64(True):
        ask = harness.asking(case)
        for seed in (0, 1):
            asked = harness.question(case, seed, np.float64)
            value, gradients = harness.answer(ask, asked, seed)
            expected, slopes = harness.torch_answer(case, asked)
            assert np.isfinite(expected) and any(np.any(g) for g in slopes.values())
            assert error(np.array(value), np.array(expected)) <= case.tolerance, (value, expected)
            assert set(gradients) == set(slopes)
            for path in slopes:
                assert error(gradients[path], slopes[path]) <= case.tolerance, path
            if seed == 0 and os.environ.get('GOLDEN'):
                harness.write_golden(family, name, expected, slopes)
