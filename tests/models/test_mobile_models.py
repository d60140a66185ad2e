"""MobileNets, EfficientNets and the tiny networks: shapes, published sizes, details."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.models import create_model, efficientnet, mobilenet, mobilenet_v1, mobilenet_v3, tiny
from tl_jax.pretrained.maps import FAMILIES
from tl_jax.trees import flatten

IMAGES = {'ds_cnn': (2, 49, 10, 1), 'doodlenet': (2, 28, 28, 1), 'resnet8_keras': (2, 32, 32, 3)}
# Of the EfficientNets one: tracing all takes half a minute, and tests/parity/live_sizes.py compares every leaf of each.
NAMES = [
    *(name for module in (mobilenet, mobilenet_v1, mobilenet_v3, tiny) for name in module.MODELS),
    'efficientnet_b0',
]
# torchvision's `num_params`, with 1000 classes; of the first, table 4 of the paper has 4.2 million.
PARAMETERS = {
    'mobilenet_v1': 4_231_976,
    'mobilenet_v2': 3_504_872,
    'mobilenet_v3_large': 5_483_032,
    'mobilenet_v3_small': 2_542_856,
    'efficientnet_b0': 5_288_548,
}


@functools.cache
def shapes(name, num_classes=1000, **fields):
    module = create_model(name, num_classes=num_classes, **fields)
    image = jnp.zeros(IMAGES.get(name, (2, 64, 64, 3)))
    endpoints, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), image)
    return module, variables, endpoints


@pytest.mark.parametrize('name', NAMES)
def test_endpoints(name):
    _, _, endpoints = shapes(name)
    assert endpoints['features'].ndim == 2 and endpoints['features'].dtype == jnp.float32
    assert endpoints['logits'].shape == (2, 1000)
    maps = [value for key, value in endpoints.items() if key not in ('features', 'logits')]
    assert maps and all(value.ndim == 4 for value in maps)


@pytest.mark.parametrize('name', PARAMETERS)
def test_published_sizes(name):
    _, variables, _ = shapes(name)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables['params'])) == PARAMETERS[name]


def test_stages_of_a_narrow_network():
    _, _, endpoints = shapes('mobilenet_v1', width=0.25)
    assert endpoints['stem'].shape == (2, 32, 32, 8) and endpoints['block13'].shape == (2, 2, 2, 256)
    _, _, endpoints = shapes('mobilenet_v3_small')
    assert endpoints['block11'].shape == (2, 2, 2, 96) and endpoints['final'].shape == (2, 2, 2, 576)
    assert endpoints['features'].shape == (2, 1024)
    _, _, endpoints = shapes('ds_cnn', num_classes=12)
    assert endpoints['stem'].shape == (2, 25, 5, 64)


def test_folded_weights_have_biases_and_no_statistics():
    _, variables, _ = shapes('mobilenet_v1', norm='none')
    assert 'batch_stats' not in variables
    assert all(path.endswith(('kernel', 'bias')) for path in flatten(variables['params']))


def test_same_padding_is_on_the_right_of_even_images():
    """With 'same' a stride of 2 starts at the image's first pixel, with torch's zeros one before it."""
    image = jnp.zeros((1, 8, 8, 3)).at[0, 0, 0].set(1.0)
    for padding, row in (('same', 0), ('torch', 1)):
        module = create_model('mobilenet_v1', stages=(), padding=padding)
        variables = jax.jit(module.init)(jax.random.key(0), image)
        kernel = variables['params']['backbone']['stem']['conv']['kernel']
        response = jnp.clip(kernel[row, row].sum(0) / np.sqrt(1 + 1e-5), 0, 6)
        np.testing.assert_allclose(module.apply(variables, image)['stem'][0, 0, 0], response, rtol=1e-5)


def test_drop_path_rises_from_zero():
    module = create_model('efficientnet_b0', stages=((1, 3, 1, 16, 1), (1, 3, 1, 16, 1)), width=0.25, drop_path=0.9)
    image = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
    variables = jax.jit(module.init)(jax.random.key(0), image)

    @jax.jit
    def stages(key):
        endpoints, _ = module.apply(variables, image, train=True, mutable=['batch_stats'], rngs={'dropout': key})
        return endpoints['stage1'], endpoints['stage2']

    (first, second), (other_first, other_second) = stages(jax.random.key(2)), stages(jax.random.key(3))
    np.testing.assert_array_equal(first, other_first)
    assert np.abs(second - other_second).max() > 0


def family(module):
    return next(family for family in FAMILIES if family.module is module)


@pytest.mark.parametrize(
    'name, module, architecture, expected',
    [
        ('mobilenet_v2', mobilenet.MobileNetV2, 'mobilenetv2_140', {'width': 1.4}),
        ('mobilenet_v3_large', mobilenet_v3.MobileNetV3, 'mobilenetv3_large_100', {'epsilon': 1e-5}),
        ('mobilenet_v3_small', mobilenet_v3.MobileNetV3, 'tf_mobilenetv3_small_100', {'padding': 'same'}),
        ('efficientnet_b0', efficientnet.EfficientNet, 'tf_efficientnet_b3', {'width': 1.2, 'epsilon': 1e-3}),
        ('efficientnet_b5', efficientnet.EfficientNet, 'efficientnet_b5', {'epsilon': 1e-5, 'padding': None}),
    ],
)
def test_fields_of_timms_config(name, module, architecture, expected):
    fields = family(module).fields({'architecture': architecture})
    assert {key: fields.get(key) for key in expected} == expected
    assert isinstance(create_model(name, **fields).backbone, module)


def test_bad_fields():
    # It has layers that are not among ours.
    assert family(mobilenet.MobileNetV2).fields({'architecture': 'mobilenetv2_110d'}) is None
    assert family(efficientnet.EfficientNet).fields({'architecture': 'resnet50'}) is None
    with pytest.raises(UserError, match=r'model\.padding'):
        create_model('efficientnet_b0', padding='valid')
    with pytest.raises(UserError, match=r'model\.dept: unknown field'):
        create_model('efficientnet_b0', dept=1.1)
