"""Distillation's terms against the golden files that `make parity` wrote from torch's, and against finite differences."""

import distillation_harness as harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.objectives.distillation.terms import TERMS
from tl_jax.trees import unflatten

CASES = [(family, name, case) for family, cases in harness.families().items() for name, case in cases.items()]


def over(cases):
    return pytest.mark.parametrize(('family', 'name', 'case'), cases, ids=[name for _, name, _ in cases])


# It draws examples at random, and has a test of its own beside its memory.
ELSEWHERE = {'crd'}


def test_every_term_has_a_case():
    assert {case.section['name'] for _, _, case in CASES} == set(TERMS) - ELSEWHERE


@over(CASES)
def test_equals_torch(family, name, case):
    expected = harness.golden(family)[name]
    value, gradients = harness.answer(harness.asking(case), harness.question(case, 0, np.float32))
    np.testing.assert_allclose(value, expected['value'], rtol=case.single)
    assert set(gradients) == set(expected['gradients'])
    for path, slopes in expected['gradients'].items():
        scale = max(np.max(np.abs(gradients[path])), 1e-12)
        np.testing.assert_allclose(harness.sample(gradients[path]), slopes, atol=case.single * scale, err_msg=path)


@over([found for found in CASES if found[2].slopes])
def test_gradient_is_the_slope(family, name, case, monkeypatch):
    # Our terms compute in float32 whatever they are given; differences of float32 numbers would show nothing.
    monkeypatch.setattr(jnp, 'float32', jnp.float64)
    with jax.enable_x64(True):
        asked, ask = harness.question(case, 2, np.float64), harness.asking(case)
        value = lambda learned: harness.answer(ask, asked._replace(learned=learned), 2)
        gradients = unflatten(value(asked.learned)[1])
        rng, step = np.random.default_rng(3), 1e-6
        direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), asked.learned)
        slope = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True))
        shifted = lambda way: jax.tree.map(lambda x, d: x + way * step * d, asked.learned, direction)
        ahead, behind = (value(shifted(way))[0] for way in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-8)
