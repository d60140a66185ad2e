"""The linear theory's solutions against linear algebra and a gradient descent written out."""

import jax
import numpy as np
import pytest

from experiments import linear_theory


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_a_probe_is_least_squares_on_the_features(monkeypatch):
    monkeypatch.setattr(linear_theory, 'STEPS', 2000)
    drawn = linear_theory.problem(3, 0.3)
    found = jax.jit(lambda p: linear_theory.solve(p, 'LP'))(drawn)
    head = np.linalg.lstsq(drawn.x @ drawn.pretrained.T, drawn.y, rcond=None)[0]
    error = drawn.pretrained.T @ head - drawn.truth
    assert float(found['ood']) == pytest.approx(error @ error, rel=1e-6)
    assert float(found['id']) == pytest.approx(error @ drawn.project @ error, rel=1e-6)


def test_fine_tuning_is_gradient_descent_on_both_layers(monkeypatch):
    monkeypatch.setattr(linear_theory, 'STEPS', 7)
    drawn = linear_theory.problem(1, 0.1)
    found = jax.jit(lambda p: linear_theory.solve(p, 'FT'))(drawn)
    features, head = drawn.pretrained.copy(), drawn.random_head.copy()
    for _ in range(7):
        error = (drawn.x @ features.T @ head - drawn.y) / len(drawn.y)
        by_head, by_features = features @ drawn.x.T @ error, np.outer(head, error @ drawn.x)
        head, features = head - linear_theory.RATE * by_head, features - linear_theory.RATE * by_features
    error = features.T @ head - drawn.truth
    assert float(found['ood']) == pytest.approx(error @ error, rel=1e-9)


def test_a_problem_is_what_the_paper_describes():
    drawn = linear_theory.problem(5, 0.2)
    identity = np.eye(linear_theory.FEATURES)
    np.testing.assert_allclose(drawn.pretrained @ drawn.pretrained.T, identity, atol=1e-12)
    np.testing.assert_allclose(drawn.x @ drawn.project, drawn.x, atol=1e-12)
    assert np.linalg.matrix_rank(drawn.x) == linear_theory.SUBSPACE
    assert np.linalg.norm(drawn.truth) == pytest.approx(1)
    # The true direction lies at the angle from the pretrained features.
    assert np.linalg.norm(drawn.pretrained @ drawn.truth) == pytest.approx(np.cos(0.2))
