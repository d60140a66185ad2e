"""The projection after a step, against its formula."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tl_jax.errors import UserError
from tl_jax.optimizers import create_optimizer


def test_columns_are_kept_to_the_norm():
    rng = np.random.default_rng(0)
    params = {'kernel': rng.normal(0, 2, (6, 4)), 'bias': rng.normal(0, 9, 4)}
    params['kernel'][:, 1] *= 0.01
    grads = {name: rng.normal(size=p.shape) for name, p in params.items()}
    optimizer, _ = create_optimizer(dict(name='sgd', lr=0.5, max_norm=3.0), steps=5, where='train')
    tree = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
    updates, _ = optimizer.update(grads, optimizer.init(tree), tree)
    after = optax.apply_updates(tree, updates)
    moved = params['kernel'] - 0.5 * grads['kernel']
    norms = np.linalg.norm(moved, axis=0)
    assert (norms > 3).any() and (norms < 3).any()
    np.testing.assert_allclose(after['kernel'], moved * np.minimum(1, 3 / norms), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after['bias'], params['bias'] - 0.5 * grads['bias'], rtol=1e-5)
    with pytest.raises(UserError, match='train.max_norm: must be a norm above 0, not 0'):
        create_optimizer(dict(name='sgd', lr=0.5, max_norm=0), steps=5, where='train')


def test_adadelta_is_zeilers():
    """Zeiler 2012 (arXiv:1212.5701, algorithm 1)."""
    optimizer, _ = create_optimizer(dict(name='adadelta', lr=1.0, rho=0.95), steps=5, where='train')
    x, squares, moves = np.float64(0.7), 0.0, 0.0
    param = {'x': jnp.float32(x)}
    state = optimizer.init(param)
    for g in (0.3, -1.2, 2.0, 0.1):
        squares = 0.95 * squares + 0.05 * g * g
        move = -np.sqrt(moves + 1e-6) / np.sqrt(squares + 1e-6) * g
        moves = 0.95 * moves + 0.05 * move * move
        x += move
        updates, state = optimizer.update({'x': jnp.float32(g)}, state, param)
        param = optax.apply_updates(param, updates)
        assert param['x'] == pytest.approx(x, rel=1e-5)
