"""Wide ResNets and the ×4 ResNets of CIFAR: the published counts, and a block written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from tl_jax.errors import UserError
from tl_jax.models import create_model
from tl_jax.models.wide_resnet import Block

# Of the networks with which Tian et al. 2020 compare (github.com/HobbitLong/RepDistiller), 100 classes.
PUBLISHED = {
    'wrn_16_2': 703_284,
    'wrn_40_2': 2_255_156,
    'wrn_40_1': 569_780,
    'resnet8x4': 1_233_540,
    'resnet32x4': 7_433_860,
}


@pytest.mark.parametrize(('name', 'count'), PUBLISHED.items())
def test_as_many_parameters_as_published(name, count):
    model = create_model(name, num_classes=100)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == count


def test_block_is_its_formula():
    rng = np.random.default_rng(0)
    block = Block(width=6, stride=2, dropout=0.0, dtype=jnp.float32)
    x = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    variables = block.init(jax.random.key(0), x, False)
    variables = jax.tree.map(lambda leaf: jnp.abs(jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)), variables)

    def norm(x, name):
        p, s = variables['params'][name], variables['batch_stats'][name]
        return np.maximum((x - s['mean']) / np.sqrt(np.asarray(s['var'], float) + 1e-5) * p['scale'] + p['bias'], 0)

    def conv(x, name, stride):
        kernel = np.asarray(variables['params'][name]['kernel'], float)
        mode = 'same' if kernel.shape[0] == 3 else 'valid'
        out = [
            [
                sum(
                    scipy.signal.correlate2d(image[..., i], kernel[..., i, o], mode=mode)
                    for i in range(image.shape[-1])
                )
                for o in range(kernel.shape[-1])
            ]
            for image in np.asarray(x, float)
        ]
        return np.moveaxis(np.asarray(out), 1, -1)[:, ::stride, ::stride]

    y = norm(x, 'norm1')
    wanted = conv(y, 'shortcut_conv', 2) + conv(norm(conv(y, 'conv1', 2), 'norm2'), 'conv2', 1)
    np.testing.assert_allclose(block.apply(variables, x, False), wanted, rtol=2e-4)


def test_refuses_a_depth_that_is_none():
    with pytest.raises(UserError, match=r'model\.depth: must be 6n \+ 4, such as 16 or 40, not 18'):
        create_model('wrn_16_2', num_classes=10, depth=18)
