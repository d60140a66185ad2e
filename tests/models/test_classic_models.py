"""VGG, Inception v3, SqueezeNet and DenseNet: sizes, pooling, refusals. Values: tests/parity."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.models import create_model, densenet, inception, squeezenet, vgg
from tl_jax.models.layers import avg_pool
from tl_jax.pretrained import export_pretrained, load_pretrained, maps, names, read
from tl_jax.pretrained.account import fill

# torchvision's `num_params`, of 1000 classes; Inception's without the auxiliary head's 3,326,696. The larger DenseNets take
# seconds each to trace; tests/parity/live_sizes.py compares all their shapes.
PARAMETERS = {
    'vgg11': 132_863_336,
    'vgg11_bn': 132_868_840,
    'vgg13': 133_047_848,
    'vgg13_bn': 133_053_736,
    'vgg16': 138_357_544,
    'vgg16_bn': 138_365_992,
    'vgg19': 143_667_240,
    'vgg19_bn': 143_678_248,
    'inception_v3': 27_161_264 - 3_326_696,
    'squeezenet1_0': 1_248_424,
    'squeezenet1_1': 1_235_496,
    'densenet121': 7_978_856,
}
# Comments in torchvision's sources, and table 1 of DenseNet's paper for an image of 32 pixels.
MAPS = {
    'inception_v3': {
        'conv2d_2b_3x3': (147, 147, 64),
        'mixed_5d': (35, 35, 288),
        'mixed_6e': (17, 17, 768),
        'mixed_7c': (8, 8, 2048),
    },
    'densenet121': {'stem': (16, 16, 64), 'block1': (8, 8, 256), 'transition3': (1, 1, 512), 'block4': (1, 1, 1024)},
    'vgg16': {'stage1': (32, 32, 64), 'stage5': (2, 2, 512), 'fc6': (4096,)},
    'squeezenet1_1': {'stem': (15, 15, 64), 'fire3': (7, 7, 128), 'fire9': (1, 1, 512)},
}


def published(name):
    """The network as published, its variables' shapes and its endpoints', of a small image, but of 299 pixels to Inception."""
    size = 299 if name == 'inception_v3' else 32
    image = jnp.zeros((2, size, size, 3))
    classes = dict(classes=1000) if name.startswith('squeezenet') else dict(num_classes=1000)
    model = create_model(name, **classes)
    endpoints, variables = jax.eval_shape(lambda key: model.init_with_output(key, image), jax.random.key(0))
    return model, variables, endpoints


def test_every_model_is_counted_here():
    larger = {'densenet161', 'densenet169', 'densenet201'}
    assert {*PARAMETERS, *larger} == {*vgg.MODELS, *inception.MODELS, *squeezenet.MODELS, *densenet.MODELS}


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameter_count_and_endpoints(name):
    _, variables, endpoints = published(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == PARAMETERS[name]
    assert endpoints['logits'].shape == (2, 1000) and endpoints['features'].ndim == 2
    assert all(value.dtype == jnp.float32 for value in endpoints.values())
    assert all(endpoints[stage].shape[1:] == shape for stage, shape in MAPS.get(name, {}).items())


@pytest.mark.parametrize('size', [5, 6, 7, 8])
def test_the_last_window_of_caffes_pool_may_reach_beyond_the_map(size):
    x = -1.0 - np.arange(size * size, dtype=np.float32).reshape(1, size, size, 1)
    cells = range(0, size - 1, 2)
    expected = [[x[0, i : i + 3, j : j + 3].max() for j in cells] for i in cells]
    np.testing.assert_array_equal(squeezenet.pool(jnp.asarray(x))[0, :, :, 0], expected)


def test_endpoints_of_vgg_are_the_documented_ones():
    endpoints = published('vgg11')[2]
    assert set(endpoints) == {*(f'stage{i}' for i in range(1, 6)), 'fc6', 'features', 'logits'}


def test_means_are_summed_in_float32():
    x = jnp.full((1, 16, 16, 1), 0.1, jnp.bfloat16).at[0, 0, 0].set(256)
    pooled = avg_pool(x, 16, 16)
    assert pooled.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(pooled), np.float32(x).mean(), rtol=4e-3)


def test_inception_turns_colours_alone():
    with pytest.raises(UserError, match='model.transform_input: is of 3 colours'):
        jax.eval_shape(
            create_model('inception_v3', transform_input=True).init, jax.random.key(0), jnp.zeros((1, 75, 75, 1))
        )


def test_zeros_around_the_map_count_in_a_mean():
    pooled = avg_pool(jnp.full((1, 4, 4, 1), 9.0), 3, 1, padding=1)[0, :, :, 0]
    np.testing.assert_allclose(pooled[:2, :2], [[4, 6], [6, 9]])


@pytest.mark.parametrize('size', [2, 7, 10, 14])
def test_averaged_to_a_grid_of_overlapping_cells(size):
    x = np.random.default_rng(0).standard_normal((2, size, 3, 4), np.float32)
    bounds = [(i * size // 7, -(-(i + 1) * size // 7)) for i in range(7)]
    expected = np.stack([x[:, begin:end].mean(1) for begin, end in bounds], 1)
    np.testing.assert_allclose(vgg.averaged(jnp.asarray(x), (7, 3)), expected, rtol=1e-5, atol=1e-6)


def test_a_squeezenet_without_conv10_leaves_the_files_classifier_aside(tmp_path):
    fields = dict(stage_sizes=(1, 1), widths=(4, 8))
    module = create_model('squeezenet1_1', classes=5, **fields)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
    for origin in ('torchvision', 'ncnn'):
        path = tmp_path / f'{origin}.safetensors'
        export_pretrained(path, variables, module, origin)
        whole = load_pretrained('squeezenet1_1', path, classes=5, **fields)
        jax.tree.map(np.testing.assert_array_equal, dict(whole), dict(variables))
        bare = load_pretrained('squeezenet1_1', path, **fields)
        assert 'head' not in bare['params'] and 'conv10' not in bare['params']['backbone']
        probe = create_model('squeezenet1_1', num_classes=5, **fields)
        begun = jax.eval_shape(probe.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        _, account = fill(begun, read(path), backbone=probe.backbone)
        assert set(account.fresh) == {'params/head/kernel', 'params/head/bias'} and len(account.ignored) == 2
        with pytest.raises(UserError, match='ReLU precedes the mean'):
            export_pretrained(path, jax.tree.map(lambda leaf: np.zeros(leaf.shape), begun), probe, origin)


def test_ncnns_stem_is_turned_from_bgr_to_rgb():
    name_map = maps.name_map('ncnn', squeezenet.SqueezeNet())
    theirs = np.arange(3.0).reshape(1, 3, 1, 1)
    layout = names.target(name_map, 'conv1_w').layout
    np.testing.assert_array_equal(layout.read(theirs)[0, 0, :, 0], [2, 1, 0])
    np.testing.assert_array_equal(layout.write(layout.read(theirs)), theirs)


def test_names_of_the_first_densenet_files_are_read():
    assert names.target(
        maps.name_map('torchvision', densenet.DenseNet()), 'features.denseblock1.denselayer2.norm.1.bias'
    ).paths == ('params/backbone/block1/layer2/norm1/bias',)


def test_inceptions_auxiliary_head_is_ignored():
    ignored = maps.name_map('torchvision', inception.InceptionV3()).ignored
    for name in ('AuxLogits.fc.bias', 'AuxLogits.conv0.bn.running_mean', 'Mixed_5b.branch1x1.bn.num_batches_tracked'):
        assert any(re.fullmatch(regex, name) for regex, _ in ignored)
    assert not any(re.fullmatch(regex, 'fc.bias') for regex, _ in ignored)


@pytest.mark.parametrize(
    'name, fields, size, message',
    [
        ('vgg11', dict(widths=(4, 4)), 32, 'model.widths: 2 widths for 5 stages'),
        ('vgg11', dict(norm='layer'), 32, 'model.norm'),
        ('vgg11', {}, 31, 'larger images'),
        ('squeezenet1_1', dict(widths=(4, 4)), 32, 'model.widths: 2 widths for 8 fire modules'),
        ('squeezenet1_1', {}, 8, 'larger images'),
        ('inception_v3', {}, 74, 'at least 75'),
        ('densenet121', dict(stage_sizes=(1, 1, 1, 1)), 16, 'larger images'),
    ],
)
def test_refuses(name, fields, size, message):
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        jax.eval_shape(create_model(name, **fields).init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    assert '\n' not in str(refused.value)
