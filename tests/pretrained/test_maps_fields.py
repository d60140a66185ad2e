"""What each family makes of the `config.json` beside its weights, of others', and what its origins are without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.models import create_model
from tl_jax.pretrained import load_pretrained, maps
from tl_jax.pretrained.export import foreign_tensors
from tl_jax.trees import flatten

# One model of each family that reads descriptions.
NAMES = [
    'bert_tiny',
    'deberta_v3_small',
    'gpt2',
    'llama',
    't5_small',
    'clip_base_patch32',
    'clip_vision_base_patch16',
    'clip_text_base',
    'vit_tiny_patch16',
    'swin_t',
    'convnext_tiny',
    'resnet18',
    'vgg11',
    'densenet121',
    'inception_v3',
    'bit_50x1',
    'mobilenet_v1',
    'mobilenet_v2',
    'mobilenet_v3_small',
    'efficientnet_b0',
]
OTHERS = [
    'resnetaa50',
    'resnetblur50',
    'resnet50_gn',
    'vit_small_patch16_rope_ape_224',
    'vit_base_patch32_clip_quickgelu_224',
    'vit_base_patch16_224_miil',
    'vit_base_patch16_clip_224',
    'swinv2_tiny_window8_256',
    'convnext_zepto_rms',
    'densenetblur121d',
    'inception_v4',
    'resnetv2_50',
    'mobilenetv2_110d',
    'mobilenetv3_rw',
    'efficientnet_lite0',
    'repvgg_a2',
]


def fields(name, **config):
    return maps.family_of(create_model(name).backbone).fields(config)


@pytest.mark.parametrize('name', NAMES)
def test_descriptions_of_other_networks_are_nobodys(name):
    for model_type in ('mt5', 'vit_msn', 'granite', 'smollm3', 'deberta', 'swinv2', 'roberta-prelayernorm', 'resnet'):
        assert fields(name, model_type=model_type) is None
    for architecture in OTHERS:
        assert fields(name, architecture=architecture) is None


@pytest.mark.parametrize(
    'name, architecture, model',
    [
        ('resnet18', 'resnet50', 'resnet50'),
        ('resnet18', 'seresnext26t_32x4d', 'seresnext26t_32x4d'),
        ('vit_tiny_patch16', 'vit_base_patch16_224', 'vit_base_patch16'),
        ('vit_tiny_patch16', 'deit_small_distilled_patch16_224', 'deit_small_distilled_patch16'),
        ('swin_t', 'swin_base_patch4_window12_384', 'swin_base_patch4_window12_384'),
        ('convnext_base', 'convnextv2_huge', 'convnextv2_huge'),
        ('bit_152x4', 'resnetv2_50x1_bit', 'bit_50x1'),
        ('densenet121', 'densenet161', 'densenet161'),
        ('inception_v3', 'inception_v3', 'inception_v3'),
    ],
)
def test_architectures_of_timm(name, architecture, model):
    found = create_model(name, **fields(name, architecture=architecture, pretrained_cfg={})).backbone
    assert found == create_model(model).backbone


def test_architectures_of_timm_with_more_than_sizes():
    assert fields('vgg11', architecture='vgg16_bn')['grid'] == 'slide'
    deit3 = fields('vit_tiny_patch16', architecture='deit3_small_patch16_384')
    assert (deit3['image_size'], deit3['embed_prefix']) == (384, False)
    with pytest.raises(UserError, match=r"config\.json: model_args = .*'aa'.* change resnet50"):
        fields('resnet18', architecture='resnet50', model_args={'aa': True})
    for name, architecture in (('resnet18', 'resnet50'), ('vit_tiny_patch16', 'vit_base_patch16_224')):
        with pytest.raises(UserError, match=f"global_pool = 'max' is not supported for {architecture}"):
            fields(name, architecture=architecture, global_pool='max')
    assert fields('vit_tiny_patch16', architecture='vit_base_patch16_224', global_pool='token')


def test_activations_are_read():
    for kind, key in (('gemma', 'hidden_act'), ('gemma2', 'hidden_activation')):
        assert fields('llama', model_type=kind)['activation'] == 'gelu_tanh'
        assert fields('llama', model_type=kind, **{key: 'gelu_pytorch_tanh'})['activation'] == 'gelu_tanh'
        assert fields('llama', model_type=kind, **{key: 'silu'})['activation'] == 'silu'
    assert fields('llama', model_type='gemma', hidden_act='gelu')['activation'] == 'gelu_tanh'
    for name, kind in (('convnext_tiny', 'convnext'), ('vit_tiny_patch16', 'vit'), ('bert_tiny', 'bert')):
        assert fields(name, model_type=kind, hidden_act='gelu_new')['activation'] == 'gelu_tanh'
        with pytest.raises(UserError, match="hidden_act 'mish' is unknown"):
            fields(name, model_type=kind, hidden_act='mish')


def test_absent_keys_take_the_defaults_of_transformers():
    v3 = dict(relative_attention=True, position_buckets=8, norm_rel_ebd='layer_norm', share_att_key=True)
    v3 |= dict(model_type='deberta-v2', pos_att_type='p2c|c2p', position_biased_input=False)
    found = fields('deberta_v3_small', **v3)
    assert dict(width=1536, depth=24, heads=24, mlp_width=6144, vocabulary=128100).items() <= found.items()
    with pytest.raises(UserError, match='position_buckets'):
        fields('deberta_v3_small', **v3 | dict(position_buckets=-1))
    with pytest.raises(UserError, match='share_att_key = False is not supported'):
        fields('deberta_v3_small', **{key: value for key, value in v3.items() if key != 'share_att_key'})
    vocabularies = {'roberta': 50265, 'xlm-roberta': 30522, 'camembert': 30522}
    for kind, vocabulary in vocabularies.items():
        found = fields('bert_tiny', model_type=kind, layer_norm_eps=1e-5)
        assert dict(kind='roberta', vocabulary=vocabulary, epsilon=1e-5, pad_id=1).items() <= found.items()
    windows = fields('llama', model_type='qwen2', use_sliding_window=True, num_hidden_layers=30)
    assert (windows['window'], windows['window_blocks']) == (4096, (29, 30))


def test_deit_without_a_teacher_is_refused():
    teacher = fields('vit_tiny_patch16', model_type='deit', architectures=['DeiTForImageClassificationWithTeacher'])
    assert teacher['distilled']
    with pytest.raises(UserError, match=r'config\.json: DeiTForImageClassification has'):
        fields('vit_tiny_patch16', model_type='deit', architectures=['DeiTForImageClassification'])


TINY_VIT = dict(width=8, depth=1, heads=2, patch_size=4, image_size=16)


@pytest.mark.parametrize(
    'origin, changes',
    [
        ('torchvision', dict(pool='mean')),
        ('torchvision', dict(activation='gelu_tanh')),
        ('torchvision', dict(final_norm='none')),
        ('transformers', dict(pool='mean')),
        ('transformers', dict(pool='token_mean')),
        ('google', dict(pool='mean')),
        ('google', dict(pool='map', use_cls=False)),
        ('big_vision', dict(activation='relu')),
        ('timm', dict(pool='token_mean')),
    ],
)
def test_exports_that_would_compute_something_else(origin, changes):
    with pytest.raises(UserError, match=rf'^origin: {origin!r} has no such VisionTransformer: .*model\.[^\n]+$'):
        maps.name_map(origin, create_model('vit_tiny_patch16', **TINY_VIT | changes).backbone)


def test_exports_that_compute_the_same():
    for origin, changes in (
        ('timm', dict(pool='mean', final_norm='after_pool', activation='relu')),
        ('google', dict(pool='mean', use_cls=False)),
        ('big_vision', dict(pool='map', use_cls=False)),
        ('transformers', dict(activation='relu')),
    ):
        maps.name_map(origin, create_model('vit_tiny_patch16', **TINY_VIT | changes).backbone)
    with pytest.raises(UserError, match=r'model\.norm_first=False alone'):
        maps.name_map('transformers', create_model('convnext_tiny_hnf').backbone)


TINY_TEXT = dict(width=8, depth=1, heads=2, mlp_width=8, vocabulary=9)
TOKENS = np.ones((1, 4), np.int32)


@pytest.mark.parametrize(
    'name, changes, inputs',
    [
        ('bert_tiny', TINY_TEXT | dict(pool='mean'), TOKENS),
        ('deberta_v3_small', TINY_TEXT | dict(pool='cls'), TOKENS),
        ('vit_tiny_patch16', TINY_VIT | dict(representation_size=5), np.ones((1, 16, 16, 3), np.float32)),
        ('dinov2_small', TINY_VIT, np.ones((1, 16, 16, 3), np.float32)),
    ],
)
def test_a_head_on_other_features_than_transformers_has_is_not_written(name, changes, inputs):
    for num_classes in (3, None):
        module = create_model(name, num_classes=num_classes, **changes)
        shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
        leaves = flatten(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
        name_map = maps.name_map('transformers', module.backbone)
        if num_classes is None:
            assert foreign_tensors(leaves, name_map)
            continue
        with pytest.raises(UserError, match=r'^origin: transformers has its heads on other features than model\.'):
            foreign_tensors(leaves, name_map)


def test_a_bare_swin_loads(tmp_path):
    tiny = dict(width=4, depths=(1, 1), heads=(1, 2), window=2, patch_size=2)
    module = create_model('swin_t', **tiny)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), shapes)
    tensors = foreign_tensors(flatten(variables), maps.name_map('transformers', module.backbone))
    assert all(name.startswith('swin.') for name in tensors)
    np.savez(tmp_path / 'w.npz', **{name.removeprefix('swin.'): tensor for name, tensor in tensors.items()})
    loaded = load_pretrained('swin_t', tmp_path / 'w.npz', **tiny)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_marks_tell_families_apart():
    """Names that two families share are no mark of either."""
    swin = ['embeddings.patch_embeddings.projection.weight', 'encoder.layers.0.blocks.0.layernorm_before.weight']
    mobilenet = ['features.0.0.weight', 'features.1.block.0.0.weight', 'classifier.0.weight', 'classifier.3.weight']
    for name, names in (('vit_tiny_patch16', swin), ('vgg11', mobilenet)):
        with pytest.raises(UserError, match='no name map of a'):
            maps.choose(names, 'file', create_model(name).backbone)
    vgg = ['features.0.weight', 'features.3.weight', 'classifier.0.weight', 'classifier.6.weight']
    assert maps.choose(vgg, 'file', create_model('vgg11').backbone).origin == 'torchvision'
    assert maps.choose([*vgg[:2], 'pre_logits.fc1.weight'], 'file', create_model('vgg11').backbone).origin == 'timm'
