"""Text encoders: a block against numpy in float64, padding that changes nothing, pooling, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.models import create_model
from tl_jax.models.text import pool_tokens
from tl_jax.trees import flatten

SMALL = dict(vocabulary=40, length=9, width=8, depth=2, heads=2, mlp_width=12)
TOKENS = np.array([[5, 7, 5, 0, 0], [1, 39, 2, 8, 3], [4, 0, 0, 0, 0]], np.int32)


def randomised(model, tokens, seed=0):
    """The model's variables, every leaf redrawn, so that no zero bias or unit scale hides a mistake."""
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32) for leaf in leaves])


def reference(params, tokens, heads):
    """A pre-norm transformer's mean over positions, one text and one head at a time, without padding."""

    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * p['scale'] + p['bias']

    def attention(x, p):
        out = p['out']['bias'].copy()
        for head in range(heads):
            q, k, v = (x @ p[n]['kernel'][:, head] + p[n]['bias'][head] for n in ('query', 'key', 'value'))
            weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
            out = out + weights / weights.sum(-1, keepdims=True) @ v @ p['out']['kernel'][head]
        return out

    def mlp(x, p):
        y = x @ p['mlp1']['kernel'] + p['mlp1']['bias']
        y = y * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        return y @ p['mlp2']['kernel'] + p['mlp2']['bias']

    features = []
    for ids in tokens:
        ids = ids[ids != 0]
        x = params['token']['embedding'][ids] + params['position'][: len(ids)]
        for i in (1, 2):
            p = params[f'block{i}']
            x = x + attention(norm(x, p['norm1']), p['attention'])
            x = x + mlp(norm(x, p['norm2']), p)
        features.append(norm(x, params['norm']).mean(0))
    return np.stack(features)


def test_transformer_against_numpy():
    model = create_model('text_transformer', **SMALL)
    variables = randomised(model, TOKENS)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params']['backbone'])
    endpoints = model.apply(variables, TOKENS)
    np.testing.assert_allclose(endpoints['features'], reference(params, TOKENS, 2), rtol=1e-4, atol=1e-5)
    assert endpoints['block1'].shape == endpoints['block2'].shape == (3, 5, 8)


def test_bag_against_numpy():
    model = create_model('text_bag', vocabulary=40, width=6, dense=[5], num_classes=3)
    variables = randomised(model, TOKENS)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params'])
    mean = np.stack([p['backbone']['token']['embedding'][ids[ids != 0]].mean(0) for ids in TOKENS])
    x = mean @ p['backbone']['dense1']['kernel'] + p['backbone']['dense1']['bias']
    x = x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    endpoints = model.apply(variables, TOKENS)
    np.testing.assert_allclose(endpoints['features'], x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(endpoints['logits'], x @ p['head']['kernel'] + p['head']['bias'], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('pool', ['mean', 'first', 'last'])
@pytest.mark.parametrize('name', ['text_transformer', 'text_bag'])
def test_padding_changes_nothing(name, pool):
    fields = {**SMALL, 'pool': pool} if name == 'text_transformer' else dict(vocabulary=40, width=8, dense=[8])
    model = create_model(name, **fields)
    variables = randomised(model, TOKENS)
    features = model.apply(variables, TOKENS)['features']
    longer = model.apply(variables, np.pad(TOKENS, ((0, 0), (0, 4))))['features']
    np.testing.assert_allclose(longer, features, rtol=2e-5, atol=1e-6)
    other = model.apply(variables, np.where(TOKENS == 8, 9, TOKENS))['features']
    assert np.abs(other - features).max(1).tolist() == pytest.approx([0, np.abs(other - features).max(), 0], abs=1e-6)


def test_a_text_of_padding_alone_is_finite_and_so_is_its_gradient():
    for name, fields in (('text_transformer', SMALL), ('text_bag', dict(vocabulary=40))):
        model = create_model(name, **fields)
        blank = np.zeros((2, 5), np.int32)
        variables = randomised(model, blank)
        value, grads = jax.jit(jax.value_and_grad(lambda v, m=model, t=blank: m.apply(v, t)['features'].sum()))(
            variables
        )
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_pooling():
    x = jnp.arange(24.0).reshape(2, 4, 3)
    real = jnp.array([[True, True, False, False], [False, True, True, True]])
    np.testing.assert_array_equal(pool_tokens(x, real, 'first'), [x[0, 0], x[1, 1]])
    np.testing.assert_array_equal(pool_tokens(x, real, 'last'), [x[0, 1], x[1, 3]])
    np.testing.assert_allclose(pool_tokens(x, real, 'mean'), [x[0, :2].mean(0), x[1, 1:].mean(0)])


def test_dropout_acts_in_training_alone():
    for name, fields in (('text_transformer', SMALL), ('text_bag', dict(vocabulary=40))):
        model = create_model(name, dropout=0.5, **fields)
        variables = randomised(model, TOKENS)
        draw = lambda seed, m=model, v=variables: m.apply(v, TOKENS, train=True, rngs={'dropout': jax.random.key(seed)})
        assert not np.allclose(draw(0)['features'], draw(1)['features'])
        np.testing.assert_array_equal(
            model.apply(variables, TOKENS)['features'], model.apply(variables, TOKENS)['features']
        )


def test_parameters_and_types():
    model = create_model('text_transformer', dtype='bfloat16', num_classes=4, **SMALL)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    backbone = {k: v for k, v in flatten(variables['params']).items() if k.startswith('backbone')}
    block = 4 * (8 * 8 + 8) + (8 * 12 + 12) + (12 * 8 + 8) + 4 * 8
    assert sum(v.size for v in backbone.values()) == 40 * 8 + 9 * 8 + 2 * block + 2 * 8
    endpoints = jax.eval_shape(model.apply, variables, TOKENS)
    assert endpoints['features'].dtype == endpoints['logits'].dtype == jnp.float32
    assert endpoints['block1'].dtype == jnp.bfloat16


def test_refusals():
    with pytest.raises(UserError, match='model.length: texts have 10 tokens; raise it from 9'):
        create_model('text_transformer', **SMALL).init(jax.random.key(0), np.ones((1, 10), np.int32))
    with pytest.raises(UserError, match='model.heads: 3 does not divide the width 8'):
        create_model('text_transformer', **{**SMALL, 'heads': 3}).init(jax.random.key(0), TOKENS)
    model = create_model('text_bag', vocabulary=39)
    features = model.apply(model.init(jax.random.key(0), TOKENS), TOKENS)['features']
    assert np.isnan(features).any(1).tolist() == [False, True, False]
