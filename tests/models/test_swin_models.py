"""Swin transformers by shape: endpoints, sizes; windows, and tables for windows of another side."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.models import create_model, swin
from tl_jax.pretrained import load_pretrained, maps
from tl_jax.pretrained.export import foreign_tensors
from tl_jax.pretrained.maps.swin import resize_relative_position
from tl_jax.trees import flatten

TINY = dict(width=8, depths=(2, 2), heads=(1, 2), window=3)
SINGLE = TINY | dict(depths=(2,), heads=(1,))
RESIZED = Path(__file__).parent / 'swin_positions.npz'


def shapes(name, image=(2, 96, 64, 3), **fields):
    """Variables and endpoints by shape alone."""
    module = create_model(name, **fields)
    endpoints, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), jnp.zeros(image))
    return module, flatten(variables), endpoints


@pytest.mark.parametrize('name', swin.MODELS)
def test_endpoints(name):
    module, _, endpoints = shapes(name, num_classes=3, depths=(2, 1, 1, 1))
    width = module.backbone.width
    assert {k: v.shape for k, v in endpoints.items()} == {
        'stem': (2, 24, 16, width),
        'stage1': (2, 24, 16, width),
        'stage2': (2, 12, 8, 2 * width),
        'stage3': (2, 6, 4, 4 * width),
        'stage4': (2, 3, 2, 8 * width),
        'features': (2, 8 * width),
        'logits': (2, 3),
    }
    assert endpoints['features'].dtype == jnp.float32


# torchvision's `num_params`.
@pytest.mark.parametrize('name, count', [('swin_t', 28_288_354), ('swin_s', 49_606_258), ('swin_b', 87_768_224)])
def test_parameter_counts(name, count):
    _, leaves, _ = shapes(name, num_classes=1000)
    assert sum(leaf.size for leaf in leaves.values()) == count


def drawn(name='swin_t', image=(1, 40, 40, 3), **fields):
    """A small network's module and random variables."""
    module = create_model(name, **TINY | fields)
    rng = np.random.default_rng(0)
    shaped = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(image))
    return module, jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), shaped)


def test_where_to_pad_matters_only_to_maps_with_a_rest():
    _, variables = drawn(**SINGLE)
    first, last = (create_model('swin_t', **SINGLE | dict(pad=pad)) for pad in ('before_shift', 'after_shift'))
    rng = np.random.default_rng(1)
    for size, same in ((24, True), (20, False)):
        image = rng.standard_normal((1, size, size, 3)).astype(np.float32)
        ours, other = (jax.jit(module.apply)(variables, image)['stage1'] for module in (first, last))
        assert np.allclose(ours, other, atol=1e-5) == same


def test_windows_do_not_see_each_other_before_the_shift():
    """A change of one window's pixels stays in that window until the second block."""
    module, variables = drawn(**SINGLE | dict(depths=(1,)))
    image = np.zeros((1, 24, 24, 3), np.float32)
    changed = image.copy()
    changed[:, :12, :12] = 1
    apply = jax.jit(module.apply)
    differs = np.abs(apply(variables, image)['stage1'] - apply(variables, changed)['stage1']).max(-1)[0] > 0
    assert differs[:3, :3].all() and not differs[3:].any() and not differs[:, 3:].any()


def test_tables_are_resized_as_timm_does():
    golden = np.load(RESIZED)
    for window in (2, 4):
        wanted = golden[f'to_{window}']
        np.testing.assert_allclose(resize_relative_position(golden['table'], wanted.shape), wanted, atol=1e-5)
    with pytest.raises(ValueError, match='another window'):
        resize_relative_position(golden['table'], (9, 3))


@pytest.mark.parametrize('origin', ['timm', 'microsoft', 'torchvision', 'transformers'])
def test_every_origin_reads_back_also_with_other_windows(tmp_path, origin):
    module, variables = drawn(num_classes=3)
    path = tmp_path / 'weights.npz'
    tensors = foreign_tensors(flatten(variables), maps.name_map(origin, module.backbone))
    index = next(n for n in tensors if n.endswith('table')).replace('bias_table', 'index')
    np.savez(path, **tensors, **{index: np.zeros(9, np.int64)})
    loaded = load_pretrained('swin_t', path, **TINY)
    jax.tree.map(np.testing.assert_array_equal, dict(loaded), dict(variables))
    wider = load_pretrained('swin_t', path, **TINY | dict(window=(4, 3)))['params']['backbone']
    np.testing.assert_array_equal(
        wider['stage1']['block1']['relative_position'],
        resize_relative_position(variables['params']['backbone']['stage1']['block1']['relative_position'], (49, 1)),
    )


def test_config_json():
    fields = maps.family_of(create_model('swin_t').backbone).fields
    given = fields(
        dict(model_type='swin', embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12)
    )
    assert create_model('swin_t', **given).backbone == create_model('swin_b', window=12).backbone
    assert fields(dict(model_type='vit')) is None
    with pytest.raises(UserError, match='use_absolute_embeddings'):
        fields(dict(model_type='swin', use_absolute_embeddings=True))


@pytest.mark.parametrize(
    'fields, field',
    [
        (dict(heads=(3, 6)), 'model.heads'),
        (dict(heads=(5, 6, 12, 24)), 'model.heads'),
        (dict(window=(7, 7)), 'model.window'),
        (dict(window=0), 'model.window'),
        (dict(pad='never'), 'model.pad'),
    ],
)
def test_bad_fields_are_refused(fields, field):
    with pytest.raises(UserError, match=f'^{field}: [^\n]+$'):
        create_model('swin_t', **fields)
