"""The bidirectional LSTM against its equations in float64, step by step."""

import jax
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.models import create_model

TOKENS = np.array([[3, 9, 4, 1, 5], [8, 6, 0, 0, 0], [0, 2, 7, 0, 0]], np.int32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def states(x, p):
    """h of each step, one text in the order given."""
    h = c = np.zeros(p['recurrent'].shape[0])
    for now in x:
        i, f, g, o = np.split(now @ p['input']['kernel'] + h @ p['recurrent'] + p['bias'], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        yield h


def test_features_are_the_last_states_of_both_directions():
    model = create_model('text_lstm', num_classes=2, vocabulary=10, width=6, hidden=3, depth=2, dense=[5])
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    np.testing.assert_array_equal(variables['params']['backbone']['forward1']['bias'], [0] * 3 + [1] * 3 + [0] * 6)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), variables)
    p = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables['params']['backbone'])
    apply = jax.jit(model.apply)
    out = apply(variables, TOKENS)
    for row, text in enumerate(TOKENS):
        x = p['token']['embedding'][text[text > 0]]
        for layer in '12':
            there = np.stack(list(states(x, p[f'forward{layer}'])))
            back = np.stack(list(states(x[::-1], p[f'backward{layer}'])))[::-1]
            x = np.concatenate([there, back], -1)
            np.testing.assert_allclose(out[f'lstm{layer}'][row][text > 0], x, rtol=1e-4, atol=1e-5)
        expected = np.concatenate([there[-1], back[0]]) @ p['dense1']['kernel'] + p['dense1']['bias']
        np.testing.assert_allclose(out['features'][row], np.maximum(expected, 0), rtol=1e-4, atol=1e-5)
    wider = apply(variables, np.pad(TOKENS, ((0, 0), (2, 6))))
    np.testing.assert_allclose(wider['logits'], out['logits'], rtol=1e-5, atol=1e-5)


def test_bad_fields_are_named():
    with pytest.raises(UserError, match=r'model\.hidden: must be an integer of at least 1, not 0'):
        create_model('text_lstm', hidden=0)
