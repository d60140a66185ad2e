"""SAM and ASAM on a quadratic, whose gradient is known everywhere, by finite differences, and in a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.gradients import plain, sam
from tl_jax.objectives import Aux
from tl_jax.train import train_and_evaluate

RNG = np.random.default_rng(0)
ROOT = RNG.normal(size=(5, 5))
HESSIAN, CENTRE = ROOT @ ROOT.T, RNG.normal(size=5)
START = RNG.normal(size=5)
PARAMS = {'head': {'kernel': jnp.asarray(START[:3], jnp.float32), 'bias': jnp.asarray(START[3:], jnp.float32)}}


def quadratic(params, collections, batch, key):
    """½ (θ - c)' H (θ - c), and a collection that counts."""
    del batch, key
    way = jnp.concatenate([params['head']['kernel'], params['head']['bias']]) - CENTRE
    return 0.5 * way @ jnp.asarray(HESSIAN, jnp.float32) @ way, Aux({}, {'seen': collections['seen'] + way})


def expected(rho, scale):
    """The paper's two steps in float64."""
    slope = HESSIAN @ (START - CENTRE)
    epsilon = rho * scale**2 * slope / np.linalg.norm(scale * slope)
    return HESSIAN @ (START + epsilon - CENTRE)


@pytest.mark.parametrize('adaptive', [False, True])
def test_the_gradient_of_a_quadratic(adaptive):
    scale = np.concatenate([abs(START[:3]) + 0.02, np.ones(2)]) if adaptive else np.ones(5)
    gradient = sam(rho=0.7, adaptive=adaptive, eta=0.02).transform(quadratic)
    grads, value, aux = jax.jit(gradient)(PARAMS, {'seen': jnp.ones(5)}, {}, jax.random.key(0))
    found = np.concatenate([grads['head']['kernel'], grads['head']['bias']])
    np.testing.assert_allclose(found, expected(0.7, scale), rtol=1e-4)
    way = START - CENTRE
    assert float(value) == pytest.approx(0.5 * way @ HESSIAN @ way, rel=1e-5)
    np.testing.assert_allclose(aux.collections['seen'], 1 + way, rtol=1e-5)


def test_the_gradient_is_that_of_the_loss_at_the_perturbed_point():
    """Finite differences of a network's loss in float64, in random directions."""
    x, y, w = RNG.normal(size=(6, 4)), RNG.normal(size=6), RNG.normal(size=(4, 3)) / 2
    out = RNG.normal(size=3)

    def loss(params, collections, batch, key):
        return jnp.mean((jnp.tanh(batch['x'] @ params['w']) @ out - batch['y']) ** 2), Aux({}, {})

    with jax.enable_x64(True):
        batch, params = {'x': jnp.asarray(x), 'y': jnp.asarray(y)}, {'w': jnp.asarray(w)}
        value = lambda w: float(loss({'w': w}, {}, batch, None)[0])
        slope = plain().transform(loss)(params, {}, batch, None)[0]['w']
        worst = w + 0.3 * np.asarray(slope) / np.linalg.norm(slope)
        grads = sam(rho=0.3).transform(loss)(params, {}, batch, None)[0]['w']
        for _ in range(5):
            direction = RNG.normal(size=w.shape)
            slow = (value(worst + 1e-5 * direction) - value(worst - 1e-5 * direction)) / 2e-5
            assert float(jnp.sum(grads * direction)) == pytest.approx(slow, rel=1e-5)


def test_parts_have_perturbations_of_their_own():
    def loss(params, collections, batch, key):
        return jnp.mean((batch['x'] @ params['w']) ** 4), Aux({'size': jnp.mean(batch['x'])}, {})

    x, params = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32), {'w': jnp.asarray(RNG.normal(size=4), jnp.float32)}
    key = jax.random.key(0)
    grads, value, aux = sam(rho=0.5, parts=2).transform(loss)(params, {}, {'x': x}, key)
    one = sam(rho=0.5).transform(loss)
    halves = [one(params, {}, {'x': x[i::2]}, key) for i in range(2)]
    np.testing.assert_allclose(grads['w'], (halves[0][0]['w'] + halves[1][0]['w']) / 2, rtol=1e-5)
    assert float(value) == pytest.approx(float(halves[0][1] + halves[1][1]) / 2, rel=1e-5)
    assert float(aux.metrics['size']) == pytest.approx(float(x.mean()), rel=1e-4)
    whole = one(params, {}, {'x': x}, key)[0]['w']
    assert not np.allclose(whole, grads['w'], rtol=1e-3)


def test_at_a_minimum_nothing_is_perturbed():
    def loss(params, collections, batch, key):
        return jnp.sum(params['w'] ** 2), Aux({}, {})

    grads, _, _ = sam(rho=1.0).transform(loss)({'w': jnp.zeros(3)}, {}, {}, None)
    np.testing.assert_array_equal(grads['w'], jnp.zeros(3))


def test_frozen_leaves_stay_and_statistics_move_once(digits_config, tmp_path):
    model = {'name': 'convnet', 'widths': [4], 'norm': 'batch'}
    stages = [{'steps': 1, 'train': [['head/.*', None], ['.*', {'name': 'sgd', 'lr': 1e-9}]]}]
    runs = {
        name: train_and_evaluate(
            digits_config(model=model, stages=stages, gradient={'name': name, **fields}), tmp_path / name
        )
        for name, fields in (('plain', {}), ('sam', {'rho': 5.0}))
    }
    for collection in ('params', 'collections'):
        same = jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            *(getattr(runs[name], collection) for name in runs),
        )
        assert jax.tree.structure(same)
