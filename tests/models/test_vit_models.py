"""Vision transformers by shape: endpoints, sizes, resized positions, and Google's npz files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.models import create_model, vit
from tl_jax.pretrained import load_pretrained, maps
from tl_jax.pretrained.export import foreign_tensors
from tl_jax.trees import flatten

TINY = dict(width=8, depth=2, heads=2, patch_size=4, image_size=16)
RESIZED = Path(__file__).parent / 'vit_positions.npz'


def shapes(name, image=(2, 64, 48, 3), **fields):
    """Variables and endpoints by shape alone."""
    module = create_model(name, **fields)
    endpoints, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), jnp.zeros(image))
    return module, flatten(variables), endpoints


@pytest.mark.parametrize('name', vit.MODELS)
def test_endpoints(name):
    module, _, endpoints = shapes(name, num_classes=3, depth=2)
    backbone = module.backbone
    blocks = ['block1', 'block2']
    two = {'class_logits', 'distillation_logits'} if backbone.distilled else set()
    assert set(endpoints) == {'embedding', *blocks, 'encoded', 'features', 'logits', *two}
    tokens = 1 + backbone.distilled + backbone.num_registers + (64 // backbone.patch_size) * (48 // backbone.patch_size)
    assert all(endpoints[block].shape == (2, tokens, backbone.width) for block in blocks)
    assert endpoints['features'].shape == (2, (1 + backbone.distilled) * backbone.width)
    assert endpoints['features'].dtype == jnp.float32


# torchvision's `num_params`, and what timm's networks have.
@pytest.mark.parametrize(
    'name, count',
    [
        ('vit_base_patch16', 86_567_656),
        ('vit_base_patch32', 88_224_232),
        ('vit_large_patch16', 304_326_632),
        ('deit_tiny_patch16', 5_717_416),
        ('deit_tiny_distilled_patch16', 5_910_800),
    ],
)
def test_parameter_counts(name, count):
    _, leaves, _ = shapes(name, num_classes=1000)
    assert sum(leaf.size for leaf in leaves.values()) == count


def test_parameter_count_of_a_giant():
    """Counted from one block, of which there are forty."""
    sizes = [sum(leaf.size for leaf in shapes('dinov2_giant', depth=depth)[1].values()) for depth in (1, 2)]
    assert sizes[0] + 39 * (sizes[1] - sizes[0]) == 1_136_479_232


def test_positions_are_resized_as_timm_does():
    golden = np.load(RESIZED)
    resized = vit.resize_positions(golden['position'], (3, 7), 2)
    np.testing.assert_allclose(resized, golden['to_3_7'], atol=2e-6)
    resized = vit.resize_positions(golden['to_3_7'], (8, 5), 2, old_grid=(3, 7))
    np.testing.assert_allclose(resized, golden['to_8_5'], atol=2e-6)
    plain = vit.resize_positions(golden['position'], (8, 3), 2, antialias=False)
    np.testing.assert_allclose(plain, golden['plain_8_3'], atol=2e-6)


def test_resizing_to_the_same_grid_changes_nothing():
    position = np.random.default_rng(0).standard_normal((17, 3)).astype(np.float32)
    np.testing.assert_allclose(vit.resize_positions(position, (4, 4)), position, atol=1e-7)


def test_positions_that_are_no_square_are_refused():
    with pytest.raises(ValueError, match='no square'):
        vit.resize_positions(np.zeros((17, 3), np.float32), (2, 2), 0)


def drawn(name, **fields):
    """A small network's module and random variables."""
    module = create_model(name, **TINY | fields)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    rng = np.random.default_rng(0)
    return module, jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def saved(tmp_path, name, origin, **fields):
    """A file of a small network under the origin's names."""
    module, variables = drawn(name, **fields)
    path = tmp_path / 'weights.npz'
    np.savez(path, **foreign_tensors(flatten(variables), maps.name_map(origin, module.backbone)))
    return module, variables, path


@pytest.mark.parametrize('origin', ['google', 'big_vision', 'timm', 'torchvision', 'transformers'])
def test_every_origin_reads_back(tmp_path, origin):
    # Classifiers of transformers have none.
    size = None if origin == 'transformers' else 5
    _, variables, path = saved(tmp_path, 'vit_base_patch16', origin, num_classes=3, representation_size=size)
    loaded = load_pretrained('vit_base_patch16', path, representation_size=size, **TINY)
    jax.tree.map(np.testing.assert_array_equal, dict(loaded), dict(variables))


def test_a_load_at_another_image_size_equals_resizing_on_the_fly(tmp_path):
    module, variables, path = saved(tmp_path, 'deit_tiny_distilled_patch16', 'timm', num_classes=3)
    image = np.random.default_rng(1).standard_normal((2, 24, 12, 3)).astype(np.float32)
    fields = TINY | dict(image_size=(24, 12))
    loaded = load_pretrained('deit_tiny_distilled_patch16', path, **fields)
    assert loaded['params']['backbone']['position'].shape == (2 + 18, 8)
    resized = create_model('deit_tiny_distilled_patch16', num_classes=3, **fields)
    np.testing.assert_allclose(
        jax.jit(resized.apply)(loaded, image)['logits'],
        jax.jit(module.apply)(variables, image)['logits'],
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_file_without_distillation_is_refused(tmp_path):
    _, _, path = saved(tmp_path, 'vit_tiny_patch16', 'timm', num_classes=3)
    with pytest.raises(UserError, match='distillation'):
        load_pretrained('deit_tiny_distilled_patch16', path, **TINY)


def test_dropout_and_drop_path_only_in_training():
    module, variables = drawn('vit_tiny_patch16', dropout=0.5, drop_path=0.5)
    image = jnp.ones((2, 16, 16, 3))
    evaluated = jax.jit(module.apply)(variables, image)['features']
    plain = jax.jit(create_model('vit_tiny_patch16', **TINY).apply)(variables, image)['features']
    np.testing.assert_array_equal(evaluated, plain)
    rngs = {'dropout': jax.random.key(0)}
    trained = jax.jit(lambda v, x: module.apply(v, x, train=True, rngs=rngs))(variables, image)['features']
    assert not np.allclose(evaluated, trained)


@pytest.mark.parametrize(
    'fields, field',
    [
        (dict(heads=5), 'model.heads'),
        (dict(activation='gellu'), 'model.activation'),
        (dict(use_cls=False), 'model.use_cls'),
        (dict(distilled=True, pool='mean'), 'model.pool'),
        (dict(image_size=8), 'model.image_size'),
        (dict(pool='max'), 'model.pool'),
    ],
)
def test_bad_fields_are_refused(fields, field):
    with pytest.raises(UserError, match=f'^{field}: [^\n]+$'):
        create_model('vit_tiny_patch16', **fields)


def test_config_json():
    fields = maps.family_of(create_model('vit_tiny_patch16').backbone).fields
    dinov2 = dict(model_type='dinov2', hidden_size=1536, num_attention_heads=24, use_swiglu_ffn=True, image_size=518)
    module = create_model('dinov2_giant', **fields(dinov2 | dict(num_hidden_layers=40, layerscale_value=1e-5)))
    assert module.backbone.mlp_width == 4096 and module.backbone.grid == (37, 37)
    assert fields(dict(model_type='vit', architectures=['ViTModel']))['representation_size'] == 768
    timm = dict(architecture='vit_small_patch14_reg4_dinov2', pretrained_cfg=dict(input_size=[3, 518, 518]))
    stated = create_model('vit_tiny_patch16', **fields(timm)).backbone
    wanted = create_model('dinov2_small_reg', image_size=(518, 518), embed_prefix=False).backbone
    assert stated == wanted
    assert fields(dict(model_type='resnet')) is fields(dict(model_type='vit_msn')) is None
    with pytest.raises(UserError, match='hidden_act'):
        fields(dict(model_type='vit', hidden_act='mish'))
