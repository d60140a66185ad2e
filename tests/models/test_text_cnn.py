"""Kim's convolutions against the paper's formula, window by window."""

import jax
import numpy as np

from tl_jax.models import create_model
from tl_jax.trees import flatten

TOKENS = np.array([[3, 9, 4, 1, 5, 7, 2], [8, 6, 0, 0, 0, 0, 0]], np.int32)


def test_features_are_the_most_that_each_filter_finds():
    model = create_model('text_cnn', num_classes=2, vocabulary=10, width=6, kernel_sizes=[2, 3], filters=5)
    variables = model.init(jax.random.key(0), TOKENS)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), variables)
    p = variables['params']['backbone']
    out = model.apply(variables, TOKENS)
    for row, text in enumerate(TOKENS):
        words = p['token']['embedding'][text[text > 0]].astype(np.float64)
        expected = []
        for size in (2, 3):
            around = np.pad(words, ((size - 1, size - 1), (0, 0)))
            kernel = p[f'conv{size}']['kernel'].reshape(size * 6, 5)  # eq. 2: w · x_{i:i+h-1} + b
            windows = np.stack([around[i : i + size].ravel() for i in range(len(around) - size + 1)])
            expected.append(np.maximum(windows @ kernel + p[f'conv{size}']['bias'], 0).max(0))  # eq. 3
        np.testing.assert_allclose(out['features'][row], np.concatenate(expected), rtol=1e-4, atol=1e-5)
    wider = model.apply(variables, np.pad(TOKENS, ((0, 0), (0, 6))))
    np.testing.assert_allclose(wider['logits'], out['logits'], rtol=1e-5, atol=1e-5)
    table = flatten(create_model('text_cnn').init(jax.random.key(0), TOKENS))['params/backbone/token/embedding']
    assert table.shape == (8192, 300) and 0.249 < np.abs(table).max() <= 0.25
