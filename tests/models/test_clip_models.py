"""CLIP and SigLIP by shape: endpoints, sizes, layer order; where a text's vector is from; one file, three models."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.models import clip, create_model
from tl_jax.pretrained import load_pretrained, maps
from tl_jax.pretrained.export import foreign_tensors
from tl_jax.trees import flatten

SHORT = dict(image_depth=1, text_depth=2)
_BOTH = dict(image_width=8, image_heads=2, text_width=8, text_heads=2, projection=8, **SHORT)
_PIXELS = dict(patch_size=4, image_size=8)
_TOKENS = dict(vocabulary=20, length=6)
PAIR = _BOTH | _PIXELS | _TOKENS
IMAGE = dict(width=8, depth=1, heads=2, **_PIXELS)
TEXT = dict(width=8, depth=2, heads=2, projection=8, **_TOKENS)
IMAGES, TOKENS = jnp.zeros((2, 32, 48, 3)), jnp.ones((3, 5), jnp.int32)


def inputs_for(backbone):
    if isinstance(backbone, clip.Clip):
        return dict(image=IMAGES, tokens=TOKENS)
    return IMAGES if isinstance(backbone, clip.ImageTower) else TOKENS


def shapes(name, **fields):
    """Variables and endpoints by shape alone."""
    module = create_model(name, **fields)
    inputs = inputs_for(module.backbone)
    endpoints, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), inputs)
    return module, flatten(variables), endpoints


@pytest.mark.parametrize('name', clip.MODELS)
def test_endpoints(name):
    both = isinstance(create_model(name).backbone, clip.Clip)
    module, _, endpoints = shapes(name, **SHORT if both else dict(depth=2, num_classes=3))
    assert endpoints['features'].dtype == jnp.float32
    if both:
        assert endpoints['logits_per_image'].shape == (2, 3)
        assert endpoints['image_features'].shape == (2, module.backbone.projection)
        assert endpoints['text_features'].shape == (3, module.backbone.projection)
        assert 'image_block1' in endpoints and 'text_block2' in endpoints
    else:
        batch = 3 if isinstance(module.backbone, clip.TextTower) else 2
        assert endpoints['features'].shape == (batch, module.backbone.projection or module.backbone.width)
        assert {'embedding', 'block1', 'block2', 'logits'} <= set(endpoints)


def test_layers_as_far_from_the_output_are_one():
    order = create_model('clip_base_patch32', **SHORT).backbone.layer_order
    assert [sum(which in layer for layer in order) for which in ('image/', 'text/')] == [3, 4]
    assert re.fullmatch(order[-2], 'image/projection/kernel') and re.fullmatch(order[-2], 'text/norm/scale')
    assert re.fullmatch(order[-3], 'image/encoder/block1/norm1/scale')
    assert re.fullmatch(order[-3], 'text/block2/norm1/scale')
    assert re.fullmatch(order[0], 'text/position') and order[-1] == 'log_scale|bias'


# Of transformers' `CLIPModel` and `SiglipModel` at the sizes that their names stand for.
@pytest.mark.parametrize(
    'name, count',
    [
        ('clip_base_patch32', 151_277_313),
        ('clip_base_patch16', 149_620_737),
        ('clip_large_patch14', 427_616_513),
        ('siglip_base_patch16', 203_155_970),
    ],
)
def test_parameter_counts(name, count):
    _, leaves, _ = shapes(name)
    assert sum(leaf.size for leaf in leaves.values()) == count


def drawn(name, **fields):
    """A small network's module and random variables."""
    module = create_model(name, **fields)
    inputs = inputs_for(module.backbone)
    shaped = jax.eval_shape(module.init, jax.random.key(0), inputs)
    rng = np.random.default_rng(0)
    return module, jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), shaped)


def features(module, variables, tokens):
    return jax.jit(module.apply)(variables, jnp.asarray(tokens, jnp.int32))['features']


def test_a_text_of_clip_ends_where_it_ends():
    module, variables = drawn('clip_text_base', **TEXT)
    short = features(module, variables, [[18, 3, 19]])
    np.testing.assert_allclose(features(module, variables, [[18, 3, 19, 0, 0]]), short, rtol=1e-5)
    np.testing.assert_allclose(features(module, variables, [[18, 3, 19, 19, 19]]), short, rtol=1e-5)
    assert not np.allclose(features(module, variables, [[18, 3, 4, 19, 0]]), short)
    named, _ = drawn('clip_text_base', **TEXT | dict(eot=7))
    np.testing.assert_allclose(
        features(named, variables, [[18, 3, 7, 19]]), features(named, variables, [[18, 3, 7]]), rtol=1e-5
    )


def test_a_text_of_siglip_looks_at_everything_but_what_is_masked():
    module, variables = drawn('siglip_text_base', **TEXT)
    assert not np.allclose(features(module, variables, [[3, 4, 5, 6]]), features(module, variables, [[9, 4, 5, 6]]))
    apply = jax.jit(module.apply)
    mask = jnp.array([[False, True, True, True]])
    one, other = (apply(variables, dict(tokens=jnp.array([[t, 4, 5, 6]]), mask=mask)) for t in (3, 9))
    np.testing.assert_allclose(one['features'], other['features'], rtol=1e-5)


def test_either_input_may_be_left_out():
    module, variables = drawn('siglip_base_patch16', **PAIR)
    apply = jax.jit(module.apply)
    image = np.random.default_rng(1).standard_normal(IMAGES.shape).astype(np.float32)
    whole = apply(variables, dict(image=image, tokens=TOKENS))
    images, texts = apply(variables, dict(image=image)), apply(variables, dict(tokens=TOKENS))
    np.testing.assert_allclose(images['image_features'], whole['image_features'], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(texts['text_features'], axis=1), 1, rtol=1e-5)
    backbone = variables['params']['backbone']
    logits = whole['image_features'] @ texts['text_features'].T * np.exp(backbone['log_scale']) + backbone['bias']
    np.testing.assert_allclose(whole['logits_per_image'], logits, rtol=1e-4)
    assert 'logits_per_image' not in images and 'logits_per_image' not in texts


@pytest.mark.parametrize(
    'kind, size, origin',
    [('clip', 'base', 'openai'), ('clip', 'base', 'transformers'), ('siglip', 'base', 'transformers')],
)
def test_one_file_fills_both_towers_and_either(tmp_path, capsys, kind, size, origin):
    module, variables = drawn(f'{kind}_{size}_patch16', **PAIR)
    path = tmp_path / 'weights.npz'
    tensors = foreign_tensors(flatten(variables), maps.name_map(origin, module.backbone))
    np.savez(path, **tensors, **{'text_model.embeddings.position_ids': np.arange(6)})
    loaded = load_pretrained(f'{kind}_{size}_patch16', path, inputs=inputs_for(module.backbone), **PAIR)
    jax.tree.map(np.testing.assert_array_equal, dict(loaded), dict(variables))
    backbone = variables['params']['backbone']
    image_fields = IMAGE | (dict(projection=8) if kind == 'clip' else {})
    image = load_pretrained(f'{kind}_vision_{size}_patch16', path, 3, fresh=['head/.*'], inputs=IMAGES, **image_fields)[
        'params'
    ]
    jax.tree.map(np.testing.assert_array_equal, dict(image['backbone']), dict(backbone['image']))
    assert image['head']['kernel'].shape == (8, 3)
    text = load_pretrained(f'{kind}_text_{size}', path, inputs=TOKENS, **TEXT)['params']
    jax.tree.map(np.testing.assert_array_equal, dict(text['backbone']), dict(backbone['text']))
    assert 'the text tower' in capsys.readouterr().out
    plain = load_pretrained(f'{kind}_text_{size}', path, inputs=TOKENS, **TEXT | dict(projection=None))['params']
    assert 'projection' not in plain['backbone']


def test_positions_are_resized_on_loading(tmp_path):
    module, variables = drawn('clip_vision_base_patch32', projection=8, **IMAGE)
    path = tmp_path / 'weights.npz'
    names = maps.name_map('transformers', module.backbone)
    np.savez(path, **foreign_tensors(flatten(variables), names))
    fields = IMAGE | dict(image_size=(12, 8), projection=8)
    loaded = load_pretrained('clip_vision_base_patch32', path, inputs=IMAGES, **fields)
    image = np.random.default_rng(1).standard_normal((1, 12, 8, 3)).astype(np.float32)
    resized = create_model('clip_vision_base_patch32', **fields)
    np.testing.assert_allclose(
        jax.jit(resized.apply)(loaded, image)['features'],
        jax.jit(module.apply)(variables, image)['features'],
        rtol=1e-4,
        atol=1e-5,
    )


def fields_of(name, config):
    return maps.family_of(create_model(name).backbone).fields(config)


def test_config_json():
    towers = dict(
        model_type='clip',
        projection_dim=768,
        text_config=dict(hidden_size=512, eos_token_id=2),
        text_config_dict=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        vision_config=dict(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14
        ),
    )
    given = shapes('clip_base_patch32', **fields_of('clip_base_patch32', towers))[1]
    wanted = shapes('clip_large_patch14')[1]
    assert {path: leaf.shape for path, leaf in given.items()} == {path: leaf.shape for path, leaf in wanted.items()}
    siglip = dict(model_type='siglip_text_model', vocab_size=99, projection_size=5)
    text = create_model('siglip_text_base', **fields_of('siglip_text_base', siglip)).backbone
    assert (text.vocabulary, text.projection, text.length, text.activation) == (99, 5, 64, 'gelu_tanh')
    assert fields_of('siglip_vision_base_patch16', siglip) == fields_of('clip_base_patch16', siglip) is None
    assert fields_of('clip_text_base', dict(model_type='clip_text_model', eos_token_id=9))['eot'] == 9
    with pytest.raises(UserError, match='activation'):
        fields_of('clip_base_patch16', dict(model_type='clip', text_config=dict(hidden_act='gelu')))
    with pytest.raises(UserError, match='vision_use_head'):
        fields_of('siglip_base_patch16', dict(model_type='siglip', vision_config=dict(vision_use_head=False)))


@pytest.mark.parametrize(
    'name, fields, field',
    [
        ('clip_text_base', dict(heads=5), 'model.heads'),
        ('clip_text_base', dict(activation='gellu'), 'model.activation'),
        ('clip_vision_base_patch16', dict(heads=5), 'model.heads'),
        ('clip_vision_base_patch16', dict(image_size=8), 'model.image_size'),
        ('siglip_base_patch16', dict(image_width=24, image_heads=2), 'model.projection'),
        ('clip_base_patch16', dict(kind='align'), 'model.kind'),
    ],
)
def test_bad_fields_are_refused(name, fields, field):
    with pytest.raises(UserError, match=f'^{field}: [^\n]+$'):
        create_model(name, **fields)


def test_texts_that_are_too_long_are_refused():
    module, variables = drawn('clip_text_base', **TEXT)
    with pytest.raises(UserError, match=r'^model\.length: texts have 7 tokens'):
        module.apply(variables, jnp.ones((1, 7), jnp.int32))


@pytest.mark.parametrize(
    'inputs, message',
    [
        (IMAGES, 'two towers need them by name'),
        (dict(), "there is no 'image'"),
        (dict(images=IMAGES), "two towers take no 'images'; did you mean 'image'"),
        (dict(image=IMAGES, mask=TOKENS), "'mask' is of 'tokens'"),
        (dict(image=IMAGES[0], tokens=TOKENS), r'an image is \[batch, height, width, channels\], not \[32, 48, 3\]'),
    ],
)
def test_inputs_that_two_towers_cannot_take_are_refused(inputs, message):
    module, variables = drawn('clip_base_patch16', **PAIR)
    with pytest.raises(UserError, match=f'^inputs: {message}[^\n]*'):
        module.apply(variables, inputs)


def test_init_needs_both_inputs():
    with pytest.raises(UserError, match="^inputs: there is no 'tokens'; init needs both"):
        create_model('clip_base_patch16', **PAIR).init(jax.random.key(0), dict(image=IMAGES))
