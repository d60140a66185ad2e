import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.models import create_model

# LeNetBase, feat_bottleneck('bn') and feat_classifier('wn') of github.com/tim-learn/SHOT digit/network.py @f7d555a.
SHOT = dict(
    name='lenet',
    conv_dropout=[0.0, 0.5],
    dense=[256],
    dense_norm='batch',
    dense_activation='none',
    dropout=0.5,
    head='weight_norm',
)
# MNIST_BN_32_64_256 of github.com/Britefury/self-ensemble-visual-domain-adapt network_architectures.py.
SELF_ENSEMBLING = dict(
    name='convnet',
    widths=[32, 64, 64],
    kernel_size=[5, 3, 3],
    padding=0,
    pool=[2, 1, 2],
    norm='batch',
    vector_dropout=0.5,
    dense=[256],
)


def shapes_of(fields):
    module = create_model(num_classes=10, **fields)
    shapes = jax.eval_shape(lambda key: module.init(key, jnp.zeros((2, 28, 28, 1)), train=False), jax.random.key(0))
    return trees.flatten(shapes['params'])


def test_networks_of_the_papers_have_their_shapes():
    shot = {path: leaf.shape for path, leaf in shapes_of(SHOT).items()}
    assert shot['backbone/conv2/kernel'] == (5, 5, 20, 50) and shot['backbone/dense1/kernel'] == (50 * 4 * 4, 256)
    assert (
        shot['backbone/dense_norm1/scale'] == (256,)
        and shot['head/kernel'] == (256, 10)
        and shot['head/scale'] == (10,)
    )
    ensembling = {path: leaf.shape for path, leaf in shapes_of(SELF_ENSEMBLING).items()}
    assert ensembling['backbone/conv1/kernel'] == (5, 5, 1, 32) and ensembling['backbone/conv3/kernel'] == (
        3,
        3,
        64,
        64,
    )
    assert ensembling['backbone/dense1/kernel'] == (1024, 256) and ensembling['head/kernel'] == (256, 10)


def test_bottleneck_is_linear_and_normalised():
    module = create_model('mlp', num_classes=3, dense=[6], dense_norm='batch', dense_activation='none')
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    variables = module.init(jax.random.key(0), x, train=False)
    endpoints, moved = module.apply(variables, x, train=True, mutable=['batch_stats'])
    dense = jax.tree.map(np.float64, variables['params']['backbone']['dense1'])
    hidden = x @ dense['kernel'] + dense['bias']
    expected = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    np.testing.assert_allclose(endpoints['features'], expected, atol=2e-5)
    assert (expected < -0.5).any()
    np.testing.assert_allclose(moved['batch_stats']['backbone']['dense_norm1']['mean'], 0.1 * hidden.mean(0), atol=1e-5)


def test_conv_dropout_drops_whole_channels_in_their_share():
    module = create_model('convnet', widths=[4, 200], conv_dropout=[0.0, 0.25])
    x = np.random.default_rng(0).normal(size=(8, 12, 12, 1)).astype(np.float32)
    variables = module.init(jax.random.key(0), x, train=False)
    still = module.apply(variables, x, train=False)
    moved = module.apply(variables, x, train=True, rngs={'dropout': jax.random.key(1)})
    np.testing.assert_array_equal(moved['conv1'], still['conv1'])
    alive = (np.asarray(moved['conv2']) != 0).any((1, 2))
    expected = np.where(alive[:, None, None], np.asarray(still['conv2']) / 0.75, 0)
    np.testing.assert_allclose(moved['conv2'], expected, rtol=1e-6)
    was = (np.asarray(still['conv2']) != 0).any((1, 2))
    assert abs(alive[was].mean() - 0.75) < 0.05


def test_vector_dropout_stands_before_the_hidden_layers():
    module = create_model('mlp', dense=[], vector_dropout=0.5)
    x = np.ones((4, 500), np.float32)
    out = module.apply({}, x, train=True, rngs={'dropout': jax.random.key(0)})['features']
    assert set(np.unique(out)) == {0.0, 2.0} and abs(np.mean(out == 0) - 0.5) < 0.05


def test_one_value_for_each_convolution_is_needed():
    module = create_model('convnet', kernel_size=[5, 3, 3])
    with pytest.raises(UserError, match=r'model.kernel_size: \[5, 3, 3\] has not one for each of the 2 convolutions'):
        module.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)
