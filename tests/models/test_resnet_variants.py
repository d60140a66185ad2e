"""ResNeXt, Wide ResNet, ResNet-D and SE-ResNet, BiT and ConvNeXt: shapes, counts, and their special parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tl_jax.errors import UserError
from tl_jax.models import bit, convnext, create_model, resnet
from tl_jax.models.convnext import GlobalResponseNorm
from tl_jax.models.layers import SqueezeExcite
from tl_jax.models.transformer import DropPath
from tl_jax.pretrained import maps
from tl_jax.pretrained.export import foreign_tensors
from tl_jax.pretrained.names import target
from tl_jax.trees import flatten

# Of timm's networks with 1000 classes; live_sizes.py compares every size by name and shape.
PARAMETERS = {
    'resnet26d': 16_014_408,
    'wide_resnet50_2': 68_883_240,
    'seresnext50_32x4d': 27_559_896,
    'bit_50x1': 25_549_352,
    'convnextv2_atto': 3_708_400,
}
TINY = dict(stage_sizes=(1, 2, 1), widths=(8, 16, 24))
VARIANTS = {
    'resnet26d': dict(**TINY, stem_width=16),
    'resnet14t': dict(**TINY, stem_width=16),
    'seresnext26t_32x4d': dict(**TINY, stem_width=16, groups=2, base_width=16),
    'resnet20': TINY | dict(stem_width=8),
    'bit_50x1': dict(**TINY, stem_width=16, groups=8),
    'convnext_tiny': TINY,
    'convnext_atto_ols': TINY | dict(hidden=5),
    'convnextv2_tiny': TINY,
}


def shapes_of(name, image=(2, 64, 64, 3), num_classes=None, **fields):
    model = create_model(name, num_classes=num_classes, **fields)
    return jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), jnp.zeros(image)))


def of_one_kind():
    """A name for each set of fields that differ in more than numbers."""
    kinds = {}
    for name, constructor in {**resnet.MODELS, **bit.MODELS, **convnext.MODELS}.items():
        fields = {key: value for key, value in constructor.keywords.items() if isinstance(value, str | bool)}
        fields |= {key: bool(constructor.keywords.get(key)) for key in ('groups', 'squeeze', 'hidden')}
        kinds.setdefault((constructor.func, *sorted(map(str, fields.items()))), name)
    return kinds.values()


@pytest.mark.parametrize('name', of_one_kind())
def test_endpoints_of_every_kind(name):
    """Every stage but the first halves the map; the depth is of no account here."""
    constructor = {**resnet.MODELS, **bit.MODELS, **convnext.MODELS}[name]
    stages = len(constructor.keywords['stage_sizes'])
    endpoints, _ = shapes_of(name, stage_sizes=(1,) * stages)
    assert set(endpoints) == {'stem', *(f'stage{i}' for i in range(1, stages + 1)), 'features'}
    first = 64 if constructor.keywords.get('stem') == 'small' else 16
    for i in range(stages):
        assert endpoints[f'stage{i + 1}'].shape[:3] == (2, first >> i, first >> i)
    assert endpoints['features'].dtype == jnp.float32
    assert constructor.keywords.get('hidden') or endpoints['features'].shape == (
        2,
        endpoints[f'stage{stages}'].shape[3],
    )


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameter_count(name):
    _, variables = shapes_of(name, num_classes=1000)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == PARAMETERS[name]


@pytest.mark.parametrize('name', ['resnet26d', 'bit_50x1', 'convnext_tiny'])
def test_drop_path_grows_with_depth(name):
    rates = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, DropPath):
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes_of(name, drop_path=0.3, **VARIANTS[name])
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3])


def test_halved_takes_the_mean_of_what_there_is_at_an_odd_edge():
    x = jnp.arange(15.0).reshape(1, 5, 3, 1)
    expected = [[(0 + 1 + 3 + 4) / 4, (2 + 5) / 2], [(6 + 7 + 9 + 10) / 4, (8 + 11) / 2], [(12 + 13) / 2, 14]]
    np.testing.assert_allclose(resnet.halved(x)[0, :, :, 0], expected)


def test_standardized_kernels_have_zero_mean_and_unit_variance():
    kernel = 3 + 5 * np.random.default_rng(0).standard_normal((3, 3, 8, 4), np.float32)
    standard = np.asarray(bit.standardized(jnp.asarray(kernel)))
    np.testing.assert_allclose(standard.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(standard.var((0, 1, 2)), 1, rtol=1e-5)


def test_squeeze_excite_by_hand():
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 4), np.float32)
    for gate, shape in (
        ('sigmoid', lambda y: 1 / (1 + np.exp(-y))),
        ('hard_sigmoid', lambda y: np.clip(y / 6 + 0.5, 0, 1)),
    ):
        module = SqueezeExcite(2, gate=gate)
        variables = jax.jit(module.init)(jax.random.key(0), x)
        kernels = {name: variables['params'][name]['kernel'][0, 0] for name in ('reduce', 'expand')}
        weights = shape(np.maximum(x.mean((1, 2)) @ kernels['reduce'], 0) @ kernels['expand'])
        np.testing.assert_allclose(jax.jit(module.apply)(variables, x), x * weights[:, None, None], rtol=1e-5)


def test_response_norm_starts_as_the_identity_and_has_a_gradient_at_zero():
    module = GlobalResponseNorm(jnp.float32)
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 4), np.float32)
    variables = {'params': dict(scale=jnp.zeros(4), bias=jnp.zeros(4))}
    np.testing.assert_array_equal(jax.jit(module.apply)(variables, x), x)
    ones = {'params': dict(scale=jnp.ones(4), bias=jnp.ones(4))}
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda x: module.apply(ones, x).sum()))(jnp.zeros((1, 2, 2, 4)))))


def test_google_names_units_by_two_digits_and_norms_have_one_axis_or_four():
    fields = dict(stage_sizes=(1, 11), widths=(8, 8), stem_width=8, groups=4)
    _, variables = shapes_of('bit_50x1', num_classes=3, **fields)
    leaves = {path: np.zeros(leaf.shape, np.int8) for path, leaf in flatten(variables).items()}
    name_map = maps.name_map('google', create_model('bit_50x1', **fields).backbone)
    tensors = foreign_tensors(leaves, name_map)
    assert {'resnet/block1/unit01/a/proj/standardized_conv2d/kernel', 'resnet/block2/unit11/c/group_norm/gamma'} <= set(
        tensors
    )
    assert tensors['resnet/head/conv2d/kernel'].shape == (1, 1, 32, 3)
    for name, tensor in tensors.items():
        goal = target(name_map, name)
        for stored in (tensor, tensor.reshape(1, 1, 1, -1) if name.endswith(('gamma', 'beta')) else tensor):
            assert goal.layout.read(stored).shape == leaves.pop(goal.paths[0], goal.layout.read(tensor)).shape
    assert not leaves


def test_fields_from_hugging_face():
    family = maps.family_of(create_model('convnext_tiny').backbone)
    config = dict(model_type='convnextv2', depths=[1, 2], hidden_sizes=[8, 16], layer_norm_eps=1e-12, hidden_act='gelu')
    fields = family.fields(config)
    assert fields['stage_sizes'] == (1, 2) and fields['grn'] and not fields['layer_scale']
    create_model('convnext_tiny', **fields)
    assert family.fields(dict(model_type='convnext', layer_scale_init_value=1e-6))['layer_scale'] == 1e-6
    assert family.fields(dict(model_type='resnet')) is None
    with pytest.raises(UserError, match='patch_size = 8'):
        family.fields(config | dict(patch_size=8))


@pytest.mark.parametrize(
    ('name', 'fields', 'message'),
    [
        ('resnet18', dict(groups=2), 'basic blocks have neither groups'),
        ('resnext50_32x4d', dict(widths=(8, 16)), '2 widths for 4 stages'),
        ('bit_50x1', dict(stem_width=24), '32 groups do not divide 24 channels'),
        ('convnext_tiny', dict(activation='swish'), "there is no 'swish'"),
        ('convnext_tiny', dict(stage_sizes=(1,)), '4 widths for 1 stages'),
    ],
)
def test_refuses(name, fields, message):
    with pytest.raises(UserError, match=message) as raised:
        create_model(name, **fields)
    assert '\n' not in str(raised.value)


def test_catalogue_names_models_that_there_are():
    for module in (maps.resnet, maps.bit, maps.convnext):
        assert module.CATALOGUE
        for name, entry in module.CATALOGUE.items():
            assert entry.source == f'hf://{name}' and entry.preprocessing
            create_model(entry.model, **entry.fields)


def test_preactivations_are_what_the_stages_last_relu_sees():
    fields = dict(**TINY, stem_width=8)
    plain, shown = (create_model('resnet20', preactivations=given, **fields) for given in (False, True))
    image = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3), np.float32))
    variables = plain.init(jax.random.key(0), image)
    without, endpoints = plain.apply(variables, image), shown.apply(variables, image)
    assert set(endpoints) - set(without) == {f'stage{i}_preactivation' for i in (1, 2, 3)}
    for i in (1, 2, 3):
        before = np.asarray(endpoints[f'stage{i}_preactivation'])
        assert before.min() < 0
        np.testing.assert_array_equal(np.maximum(before, 0), without[f'stage{i}'])
