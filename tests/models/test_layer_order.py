"""The order of layers that every backbone states: each leaf in one of them, and none without a leaf."""

import re

import jax
import jax.numpy as jnp
import pytest

from tl_jax.models import bert, clip, create_model, deberta, gpt2, list_models, llama, lstm, t5, text
from tl_jax.trees import flatten

TEXTS = tuple(m.__name__ for m in (bert, deberta, gpt2, llama, lstm, t5, text))
# Fewer layers, none of another kind: tracing is what takes time.
FEWER = {
    'Bert': dict(depth=2),
    'Clip': dict(image_depth=1, text_depth=2),
    'Deberta': dict(depth=2),
    'GPT2': dict(depth=2),
    'ImageTower': dict(depth=2),
    'Llama': dict(depth=2),
    'MobileNetV1': dict(stages=((16, 1, 1), (32, 2, 2))),
    'MobileNetV2': dict(stages=((1, 8, 1, 1), (6, 16, 2, 2))),
    'Swin': dict(depths=(1, 2, 1, 1)),
    'T5': dict(depth=2),
    'TextTower': dict(depth=2),
    'VisionTransformer': dict(depth=2),
}
# By fields: what no named model has.
OTHERS = (
    ('bert_tiny', dict(pool='mean')),
    ('bert_tiny', dict(mlm_head=True)),
    ('deberta_v3_small', dict(depth=1, pool='pooler')),
    ('convnet', dict(norm='batch', dense=[5, 4], dense_norm='batch')),
    ('mobilenet_v2', dict(norm='none', stages=((1, 8, 1, 1),))),
    ('squeezenet1_1', dict(classes=3)),
    ('convnext_tiny', dict(stage_sizes=(1,), widths=(8,), hidden=5)),
    ('vit_tiny_patch16', dict(depth=1, final_norm='none')),
    ('vit_tiny_patch16', dict(depth=1, final_norm='none', pool='map', representation_size=5)),
    ('clip_vision_base_patch32', dict(depth=1, projection=None)),
    ('clip_text_base', dict(depth=1, projection=None)),
    ('llama', dict(depth=1, output='none')),
    ('t5_small', dict(depth=1, decoder_depth=2, output='dense')),
)


def fewer(backbone):
    kind = type(backbone).__name__
    if kind in ('ResNet', 'BiT', 'ConvNeXt'):
        return dict(stage_sizes=(1, 2), widths=backbone.widths[:2])
    if kind == 'DenseNet':
        return dict(stage_sizes=(1, 2))
    if kind == 'EfficientNet':
        return dict(stages=backbone.stages[:3], depth=0.2)
    return dict(blocks=backbone.blocks[:4]) if kind == 'MobileNetV3' else FEWER.get(kind, {})


def inputs_for(name, backbone):
    tokens = jnp.zeros((1, 4), jnp.int32)
    if isinstance(backbone, clip.Clip):
        return dict(image=jnp.zeros((1, 64, 64, 3)), tokens=tokens)
    if type(backbone).__module__ in TEXTS or isinstance(backbone, clip.TextTower):
        return tokens
    image = {'ds_cnn': (49, 10, 1), 'doodlenet': (28, 28, 1), 'inception_v3': (75, 75, 3)}.get(name, (64, 64, 3))
    return jnp.zeros((1, *image))


@pytest.mark.parametrize(
    'name, fields', [*((name, None) for name in list_models()), *OTHERS], ids=lambda v: v if isinstance(v, str) else ''
)
def test_every_leaf_is_of_one_layer_and_every_layer_has_a_leaf(name, fields):
    fields = fewer(create_model(name).backbone) if fields is None else fields
    module = create_model(name, **fields)
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs_for(name, module.backbone))
    order = module.backbone.layer_order
    leaves = {path.partition('/backbone/')[2] for path in flatten(variables)}
    found = {leaf: [regex for regex in order if re.fullmatch(regex, leaf)] for leaf in leaves}
    assert all(len(regexes) == 1 for regexes in found.values()), found
    assert isinstance(order, tuple) and {regexes[0] for regexes in found.values()} == set(order)
