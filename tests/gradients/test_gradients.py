import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import gradients
from tl_jax.errors import UserError
from tl_jax.objectives import Aux

PARAMS = {'w': jnp.linspace(-1, 1, 12).reshape(4, 3)}
BATCH = {'train': {'x': jnp.sin(jnp.arange(32.0)).reshape(8, 4), 'y': jnp.arange(24.0).reshape(8, 3) / 24}}


def loss(params, collections, batch, key):
    error = batch['train']['x'] @ params['w'] - batch['train']['y']
    seen = {'count': collections['count'] + batch['train']['x'].shape[0]}
    return jnp.mean(error**2), Aux({'absolute': jnp.mean(jnp.abs(error))}, seen)


@pytest.mark.parametrize('parts', [1, 2, 4, 8])
def test_accumulated_is_plain_for_a_mean_over_examples(parts):
    collections, key = {'count': jnp.zeros(())}, jax.random.key(0)
    expected, value, aux = gradients.plain().transform(loss)(PARAMS, collections, BATCH, key)
    grads, mean, parts_aux = jax.jit(gradients.accumulated(parts=parts).transform(loss))(
        PARAMS, collections, BATCH, key
    )
    np.testing.assert_allclose(grads['w'], expected['w'], rtol=1e-5)
    np.testing.assert_allclose(mean, value, rtol=1e-6)
    np.testing.assert_allclose(parts_aux.metrics['absolute'], aux.metrics['absolute'], rtol=1e-6)
    assert parts_aux.collections['count'] == aux.collections['count'] == 8


def test_plain_is_the_closed_form():
    x, y = BATCH['train']['x'], BATCH['train']['y']
    grads, _, _ = gradients.plain().transform(loss)(PARAMS, {'count': 0}, BATCH, None)
    np.testing.assert_allclose(grads['w'], 2 * x.T @ (x @ PARAMS['w'] - y) / y.size, rtol=1e-5)


def test_parts_must_divide_the_batch():
    with pytest.raises(UserError, match='3 parts do not divide a batch of 8'):
        gradients.accumulated(parts=3).transform(loss)(PARAMS, {'count': jnp.zeros(())}, BATCH, jax.random.key(0))
