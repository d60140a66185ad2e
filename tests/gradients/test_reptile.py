import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import gradients
from tl_jax.errors import UserError
from tl_jax.gradients.reptile import minibatches
from tl_jax.objectives import Aux

A = np.array([[2.0, 0.3], [0.3, 0.7]])
THETA = np.array([1.5, -0.5])
CENTRES = np.random.default_rng(0).normal(size=(3, 6, 2))  # tasks, examples, dimensions


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def loss(params, collections, batch, key):
    """Mean over examples of (θ - c)ᵀ A (θ - c) / 2."""
    error = params['w'] - batch['train']['support_inputs']
    value = jnp.mean(jnp.sum(error @ A * error, -1)) / 2
    return value, Aux({'seen': jnp.sum(batch['train']['support_inputs'])}, {'statistics': value})


def run(**fields):
    gradient = gradients.GRADIENTS['reptile'](**fields).transform(loss)
    batch = {'train': {'support_inputs': CENTRES, 'index': jnp.arange(3)}}
    return jax.jit(gradient)({'w': jnp.asarray(THETA)}, {}, batch, jax.random.key(1))


def test_closed_form_on_a_quadratic():
    """θ - θ_k = (I - (I - αA)ᵏ)(θ - c̄): from the loss' eigenvectors, not by stepping."""
    grads, value, aux = run(inner_steps=4, inner_lr=0.2)
    eigenvalues, vectors = np.linalg.eigh(A)
    shrink = vectors @ np.diag(1 - (1 - 0.2 * eigenvalues) ** 4) @ vectors.T
    expected = np.mean([shrink @ (THETA - task.mean(0)) for task in CENTRES], 0)
    np.testing.assert_allclose(grads['w'], expected, rtol=1e-10)
    assert aux.collections == {}
    assert value.shape == aux.metrics['seen'].shape == ()
    np.testing.assert_allclose(aux.metrics['seen'], CENTRES.sum() / 3, rtol=1e-10)


def test_one_step_is_the_rate_times_the_plain_gradient():
    grads, value, _ = run(inner_steps=1, inner_lr=0.1)
    batch = {'train': {'support_inputs': CENTRES}}
    plain, expected, _ = gradients.plain().transform(loss)({'w': jnp.asarray(THETA)}, {}, batch, None)
    np.testing.assert_allclose(grads['w'], 0.1 * plain['w'], rtol=1e-10)
    np.testing.assert_allclose(value, expected, rtol=1e-10)


@pytest.mark.parametrize('optimizer', ['sgd', 'adam'])
def test_minibatches_step_by_step(optimizer):
    """Against numpy; Adam with b1 = 0 is RMSProp with a corrected second moment (b2 = 0.999, ε = 1e-8)."""
    grads, _, _ = run(inner_steps=5, inner_lr=0.05, inner_batch=4, inner_optimizer=optimizer)
    ways, drawn = [], jax.jit(lambda key: minibatches(key, 6, 5, 4))
    for task, key in zip(CENTRES, jax.random.split(jax.random.key(1), 3), strict=True):
        theta, second = THETA.copy(), np.zeros(2)
        for k, rows in enumerate(np.asarray(drawn(key)), start=1):
            gradient = A @ (theta - task[rows].mean(0))
            second = 0.999 * second + 0.001 * gradient**2
            scale = 1.0 if optimizer == 'sgd' else 1 / (np.sqrt(second / (1 - 0.999**k)) + 1e-8)
            theta = theta - 0.05 * scale * gradient
        ways.append(THETA - theta)
    np.testing.assert_allclose(grads['w'], np.mean(ways, 0), rtol=1e-8)


def test_every_example_comes_once_before_any_comes_twice():
    rows = np.asarray(minibatches(jax.random.key(0), 6, 6, 4)).ravel()
    for start in range(0, 24, 6):
        assert sorted(rows[start : start + 6]) == list(range(6))
    assert list(rows[:6]) != list(rows[6:12])
    assert np.asarray(minibatches(jax.random.key(0), 6, 2, None)).tolist() == [list(range(6))] * 2


def test_it_needs_tasks_and_a_batch():
    gradient = gradients.GRADIENTS['reptile'](inner_steps=1, inner_lr=0.1).transform(loss)
    with pytest.raises(UserError, match="'reptile' needs tasks.*episodes"):
        gradient({'w': jnp.asarray(THETA)}, {}, {'train': {'image': jnp.zeros((2, 3))}}, jax.random.key(0))
    with pytest.raises(UserError, match='config.gradient.inner_batch: must be at least 1, not 0'):
        run(inner_steps=1, inner_lr=0.1, inner_batch=0)
