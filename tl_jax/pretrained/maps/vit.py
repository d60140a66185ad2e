"""Vision transformers: names of timm (and of the authors of DeiT and DINOv2), torchvision, Hugging Face, and Google."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax.errors import UserError
from tl_jax.models.vit import MODELS, VisionTransformer, resize_positions
from tl_jax.pretrained.catalogue import Entry, Preprocessing
from tl_jax.pretrained.maps.hub_config import activation, only, timm_architectures, timm_fields
from tl_jax.pretrained.names import (
    OI,
    SAME,
    Family,
    Fit,
    Layout,
    Origin,
    Rule,
    conv,
    dense,
    norm,
    stacked,
    stem_fit,
)

# Vectors [1, 1, width] and tables [1, rows, width] of ours, which have no axis for the batch.
VECTOR = Layout(lambda t: t.reshape(t.shape[-1]), lambda leaf: leaf[None, None])
TABLE = Layout(lambda t: t.reshape(t.shape[-2:]), lambda leaf: leaf[None])
_BLOCK = 'backbone/block{block+1}'


def fused(theirs: str, ours: str, parts: Sequence[str]) -> tuple[Rule, ...]:
    """Dense layers of one input that the origin holds as one, `{theirs}weight` and `{theirs}bias`."""
    kernels, biases = (tuple(f'params/{ours}/{part}/{leaf}' for part in parts) for leaf in ('kernel', 'bias'))
    return (
        Rule(f'{theirs}weight', kernels, stacked(len(parts), OI)),
        Rule(f'{theirs}bias', biases, stacked(len(parts), SAME)),
    )


def _timm(backbone: VisionTransformer | None) -> tuple[Rule, ...]:
    block, pool = 'blocks.{block}', 'backbone/pooler'
    if backbone is not None and backbone.mlp == 'swiglu':
        first = (
            *fused(f'{block}.mlp.fc1.', f'{_BLOCK}/mlp', ('gate', 'dense1')),
            *fused(f'{block}.mlp.w12.', f'{_BLOCK}/mlp', ('gate', 'dense1')),
        )
    else:
        first = dense(f'{block}.mlp.fc1', f'{_BLOCK}/mlp/dense1')
    after_pool = backbone is not None and backbone.final_norm == 'after_pool'
    return (
        Rule('cls_token', 'params/backbone/cls', VECTOR),
        Rule('dist_token', 'params/backbone/distillation', VECTOR),
        Rule('reg_token', 'params/backbone/registers', TABLE),
        Rule('pos_embed', 'params/backbone/position', TABLE),
        *conv('patch_embed.proj', 'backbone/stem'),
        *norm('norm_pre', 'backbone/embedding_norm'),
        *norm(f'{block}.norm{{i}}', f'{_BLOCK}/norm{{i}}'),
        *fused(f'{block}.attn.qkv.', f'{_BLOCK}/attention', ('query', 'key', 'value')),
        *dense(f'{block}.attn.proj', f'{_BLOCK}/attention/out'),
        *first,
        *dense(f'{block}.mlp.fc2', f'{_BLOCK}/mlp/dense2'),
        Rule(f'{block}.ls{{i}}.gamma', f'params/{_BLOCK}/scale{{i}}/gamma', SAME),
        *norm('fc_norm' if after_pool else 'norm', 'backbone/norm'),
        Rule('attn_pool.latent', f'params/{pool}/probe', TABLE),
        *dense('attn_pool.q', f'{pool}/attention/query'),
        *fused('attn_pool.kv.', f'{pool}/attention', ('key', 'value')),
        *dense('attn_pool.proj', f'{pool}/attention/out'),
        *norm('attn_pool.norm', f'{pool}/norm'),
        *dense('attn_pool.mlp.fc{i}', f'{pool}/mlp/dense{{i}}'),
        *dense('pre_logits.fc', 'backbone/pre_logits'),
        *dense('head', 'head'),
        *dense('head_dist', 'head/distillation'),
        # Names of the authors' own files: DINOv2's, and DeiT III's.
        Rule('register_tokens', 'params/backbone/registers', TABLE),
        *dense(f'{block}.mlp.w3', f'{_BLOCK}/mlp/dense2'),
        Rule(f'{block}.gamma_{{i}}', f'params/{_BLOCK}/scale{{i}}/gamma', SAME),
    )


def _torchvision(backbone: VisionTransformer | None) -> tuple[Rule, ...]:
    block = 'encoder.layers.encoder_layer_{block}'
    return (
        Rule('class_token', 'params/backbone/cls', VECTOR),
        Rule('encoder.pos_embedding', 'params/backbone/position', TABLE),
        *conv('conv_proj', 'backbone/stem'),
        *norm(f'{block}.ln_{{i}}', f'{_BLOCK}/norm{{i}}'),
        *fused(f'{block}.self_attention.in_proj_', f'{_BLOCK}/attention', ('query', 'key', 'value')),
        *dense(f'{block}.self_attention.out_proj', f'{_BLOCK}/attention/out'),
        *dense(f'{block}.mlp.0', f'{_BLOCK}/mlp/dense1'),
        *dense(f'{block}.mlp.3', f'{_BLOCK}/mlp/dense2'),
        *dense(f'{block}.mlp.linear_{{i}}', f'{_BLOCK}/mlp/dense{{i}}'),  # the served files' names
        *norm('encoder.ln', 'backbone/norm'),
        *dense('heads.pre_logits', 'backbone/pre_logits'),
        *dense('heads.head', 'head'),
    )


def _transformers(backbone: VisionTransformer | None) -> tuple[Rule, ...]:
    """Hugging Face's names in files, whole models' before bare ones', and those of version 5 in memory.

    Its four kinds of model are told apart by what they have: a distillation token (`deit`), layer scales (`dinov2`) and with
    them registers, or none of these (`vit`).
    """
    if backbone is not None and backbone.layer_scale is not None:
        prefix = 'dinov2_with_registers.' if backbone.num_registers else 'dinov2.'
        block_rules = functools.partial(_dinov2_block, swiglu=backbone.mlp == 'swiglu')
    else:
        prefix = 'deit.' if backbone is not None and backbone.distilled else 'vit.'
        block_rules = _vit_block
    rules = [rule for each in (prefix, '') for rule in (*_transformers_ends(each), *block_rules(each))]
    if backbone is not None and backbone.distilled:
        rules += [*dense('cls_classifier', 'head'), *dense('distillation_classifier', 'head/distillation')]
    return (*rules, *dense('classifier', 'head'))


def _transformers_ends(prefix: str) -> tuple[Rule, ...]:
    embeddings = f'{prefix}embeddings'
    return (
        Rule(f'{embeddings}.cls_token', 'params/backbone/cls', VECTOR),
        Rule(f'{embeddings}.distillation_token', 'params/backbone/distillation', VECTOR),
        Rule(f'{embeddings}.register_tokens', 'params/backbone/registers', TABLE),
        Rule(f'{embeddings}.position_embeddings', 'params/backbone/position', TABLE),
        *conv(f'{embeddings}.patch_embeddings.projection', 'backbone/stem'),
        *norm(f'{prefix}layernorm', 'backbone/norm'),
        *dense(f'{prefix}pooler.dense', 'backbone/pre_logits'),
    )


def _vit_block(prefix: str) -> tuple[Rule, ...]:
    block, memory = f'{prefix}encoder.layer.{{block}}', f'{prefix}layers.{{block}}'
    rules = (
        *dense(f'{block}.attention.output.dense', f'{_BLOCK}/attention/out'),
        *dense(f'{block}.intermediate.dense', f'{_BLOCK}/mlp/dense1'),
        *dense(f'{block}.output.dense', f'{_BLOCK}/mlp/dense2'),
        *dense(f'{memory}.attention.o_proj', f'{_BLOCK}/attention/out'),
        *dense(f'{memory}.mlp.fc{{i}}', f'{_BLOCK}/mlp/dense{{i}}'),
    )
    for part in ('query', 'key', 'value'):
        rules += dense(f'{block}.attention.attention.{part}', f'{_BLOCK}/attention/{part}')
        rules += dense(f'{memory}.attention.{part[0]}_proj', f'{_BLOCK}/attention/{part}')
    for each in (block, memory):
        rules += norm(f'{each}.layernorm_before', f'{_BLOCK}/norm1') + norm(
            f'{each}.layernorm_after', f'{_BLOCK}/norm2'
        )
    return rules


def _dinov2_block(prefix: str, swiglu: bool) -> tuple[Rule, ...]:
    block = f'{prefix}encoder.layer.{{block}}'
    rules = (
        *_dinov2_mlp(f'{block}.mlp', swiglu),
        *norm(f'{block}.norm{{i}}', f'{_BLOCK}/norm{{i}}'),
        Rule(f'{block}.layer_scale{{i}}.lambda1', f'params/{_BLOCK}/scale{{i}}/gamma', SAME),
        *dense(f'{block}.attention.output.dense', f'{_BLOCK}/attention/out'),
        *dense(f'{block}.attention.o_proj', f'{_BLOCK}/attention/out'),
    )
    for part in ('query', 'key', 'value'):
        rules += dense(f'{block}.attention.attention.{part}', f'{_BLOCK}/attention/{part}')
        rules += dense(f'{block}.attention.{part[0]}_proj', f'{_BLOCK}/attention/{part}')
    return rules


def _dinov2_mlp(mlp: str, swiglu: bool) -> tuple[Rule, ...]:
    if not swiglu:
        return dense(f'{mlp}.fc{{i}}', f'{_BLOCK}/mlp/dense{{i}}')
    return (
        *fused(f'{mlp}.weights_in.', f'{_BLOCK}/mlp', ('gate', 'dense1')),
        *dense(f'{mlp}.weights_out', f'{_BLOCK}/mlp/dense2'),
        *dense(f'{mlp}.gate_proj', f'{_BLOCK}/mlp/gate'),
        *dense(f'{mlp}.up_proj', f'{_BLOCK}/mlp/dense1'),
        *dense(f'{mlp}.down_proj', f'{_BLOCK}/mlp/dense2'),
    )


def _plain(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A Flax layer of Google's, which has our layout."""
    return tuple(Rule(f'{theirs}/{leaf}', f'params/{ours}/{leaf}', SAME) for leaf in ('kernel', 'scale', 'bias'))


def _multi_head(theirs: str, ours: str, heads: int) -> tuple[Rule, ...]:
    """Flax attention: kernels [width, heads, head width], and of `out` [heads, head width, width]."""
    split = Layout(lambda t: t.reshape(t.shape[0], -1), lambda leaf: leaf.reshape(leaf.shape[0], heads, -1))
    bias = Layout(lambda t: t.reshape(-1), lambda leaf: leaf.reshape(heads, -1))
    joined = Layout(lambda t: t.reshape(-1, t.shape[-1]), lambda leaf: leaf.reshape(heads, -1, leaf.shape[-1]))
    rules = (
        Rule(f'{theirs}/out/kernel', f'params/{ours}/out/kernel', joined),
        Rule(f'{theirs}/out/bias', f'params/{ours}/out/bias', SAME),
    )
    for part in ('query', 'key', 'value'):
        rules += (
            Rule(f'{theirs}/{part}/kernel', f'params/{ours}/{part}/kernel', split),
            Rule(f'{theirs}/{part}/bias', f'params/{ours}/{part}/bias', bias),
        )
    return rules


def _google(
    backbone: VisionTransformer | None, position: str, attention: int, mlp: int, norm2: int
) -> tuple[Rule, ...]:
    """Rules for vision_transformer and big_vision, whose modules bear other numbers."""
    heads = backbone.heads if backbone is not None else 1  # matters to writing alone
    block, pool = 'Transformer/encoderblock_{block}', 'MAPHead_0'
    return (
        *_plain('embedding', 'backbone/stem'),
        Rule('cls', 'params/backbone/cls', VECTOR),
        Rule(position, 'params/backbone/position', TABLE),
        *_plain(f'{block}/LayerNorm_0', f'{_BLOCK}/norm1'),
        *_multi_head(f'{block}/MultiHeadDotProductAttention_{attention}', f'{_BLOCK}/attention', heads),
        *_plain(f'{block}/LayerNorm_{norm2}', f'{_BLOCK}/norm2'),
        *_plain(f'{block}/MlpBlock_{mlp}/Dense_0', f'{_BLOCK}/mlp/dense1'),
        *_plain(f'{block}/MlpBlock_{mlp}/Dense_1', f'{_BLOCK}/mlp/dense2'),
        *_plain('Transformer/encoder_norm', 'backbone/norm'),
        Rule(f'{pool}/probe', 'params/backbone/pooler/probe', TABLE),
        *_multi_head(f'{pool}/MultiHeadDotProductAttention_0', 'backbone/pooler/attention', heads),
        *_plain(f'{pool}/LayerNorm_0', 'backbone/pooler/norm'),
        *_plain(f'{pool}/MlpBlock_0/Dense_0', 'backbone/pooler/mlp/dense1'),
        *_plain(f'{pool}/MlpBlock_0/Dense_1', 'backbone/pooler/mlp/dense2'),
        *_plain('pre_logits', 'backbone/pre_logits'),
        *_plain('head', 'head'),
    )


def _fits(backbone: VisionTransformer | None) -> tuple[Fit, ...]:
    stem = stem_fit('backbone/stem')
    if backbone is None:
        return (stem,)

    def resize(position: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        position = np.asarray(position, np.float32)
        if position.ndim != 2 or position.shape[1] != shape[1]:
            raise ValueError(f'{position.shape} is not {shape} with another number of positions')
        prefix = backbone.embedded_prefix
        return np.asarray(resize_positions(position, backbone.grid, prefix, antialias=backbone.antialias))

    return stem, Fit('params/backbone/position', resize, f'resized to a grid of {backbone.grid}')


def _refused_by_transformers(backbone: VisionTransformer) -> str:
    pools = ('token',) if backbone.layer_scale is None else ('token', 'token_mean')
    return only(backbone, pool=pools, final_norm=('before_pool',))


def _head_refused_by_transformers(backbone: VisionTransformer) -> str:
    if backbone.distilled:
        return ''
    if backbone.layer_scale is not None and backbone.pool != 'token_mean':
        return f'model.pool={backbone.pool!r} with layer scales'
    size = backbone.representation_size
    return '' if size is None else f'model.representation_size={size}'


def _refused_by_google(backbone: VisionTransformer, *pools: str) -> str:
    """Both of Google's have a class token for its own sake alone."""
    own = ('token',) if backbone.use_cls else pools
    return only(backbone, pool=own, final_norm=('before_pool',), activation=('gelu', 'gelu_tanh'))


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sizes that a `config.json` of timm or Hugging Face states."""
    if isinstance(config.get('architecture'), str):
        return _timm_fields(config)
    kind = config.get('model_type')
    if kind not in ('vit', 'deit', 'dinov2', 'dinov2_with_registers'):
        return None
    architectures = config.get('architectures') or ()
    if 'DeiTForImageClassification' in architectures:
        raise UserError(
            'config.json: DeiTForImageClassification has a distillation token and no head on it, as no model here; load '
            'the file out of its folder into a distilled model with a fresh head'
        )
    width = config.get('hidden_size', 768)
    fields = dict(
        width=width,
        depth=config.get('num_hidden_layers', 12),
        heads=config.get('num_attention_heads', 12),
        patch_size=_side(config, 'patch_size', 14 if kind == 'dinov2' else 16),
        image_size=_pair(config.get('image_size', 224)),
        activation=activation(config, 'hidden_act'),
        qkv_bias=config.get('qkv_bias', True),
        epsilon=config.get('layer_norm_eps', 1e-6 if kind.startswith('dinov2') else 1e-12),
        antialias=kind == 'dinov2_with_registers',
    )
    if not kind.startswith('dinov2'):
        fields |= dict(mlp_width=config.get('intermediate_size', 3072), distilled=kind == 'deit')
        # A bare ViTModel was saved with its pooler, classifiers were not.
        pooled = architectures == ['ViTModel'] and config.get('pooler_act', 'tanh') == 'tanh'
        return fields | ({'representation_size': config.get('pooler_output_size') or width} if pooled else {})
    mlp_width = int(width * config.get('mlp_ratio', 4))
    swiglu = config.get('use_swiglu_ffn', False)
    classifier = any('ForImageClassification' in name for name in architectures)
    return fields | dict(
        mlp='swiglu' if swiglu else 'mlp',
        mlp_width=(mlp_width * 2 // 3 + 7) // 8 * 8 if swiglu else mlp_width,
        layer_scale=config.get('layerscale_value', 1.0),
        num_registers=config.get('num_register_tokens', 4) if kind == 'dinov2_with_registers' else 0,
        pool='token_mean' if classifier else 'token',
    )


def _timm_fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """By the architecture, whose name ends in an image size that ours lack: `vit_base_patch16_384`."""
    known = timm_architectures(MODELS, CATALOGUE)
    name, size = config['architecture'], config.get('pretrained_cfg', {}).get('input_size')
    model, _, pixels = name.rpartition('_')
    if model in MODELS and pixels.isdecimal():
        known[name] = known[model] | {'image_size': int(pixels)}
    fields = timm_fields(config, known, pool='token')
    if fields is not None and size:
        fields['image_size'] = tuple(size[1:])
    return fields


def _pair(value: Any) -> int | tuple[int, int]:
    return tuple(value) if isinstance(value, list) else value


def _side(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise UserError(f'config.json: {name} is {value}; patches that are not square have no place in this family')
    return value[0]


FAMILIES = (
    Family(
        VisionTransformer,
        (
            Origin(
                'timm',
                r'blocks\.0\.attn\.qkv\.weight',
                _timm,
                ((r'mask_token', 'stands for masked patches in pretraining'),),
                refuses=functools.partial(only, pool=('token', 'mean', 'map')),
            ),
            Origin(
                'torchvision',
                r'encoder\.layers\.encoder_layer_0\.ln_1\.weight',
                _torchvision,
                refuses=functools.partial(only, pool=('token',), final_norm=('before_pool',), activation=('gelu',)),
            ),
            Origin(
                'transformers',
                r'((vit|deit|dinov2|dinov2_with_registers)\.)?embeddings\.cls_token',
                _transformers,
                ((r'(.*\.)?embeddings\.mask_token', 'stands for masked patches in pretraining'),),
                refuses=_refused_by_transformers,
                refuses_head=_head_refused_by_transformers,
                files_only=r'(.*\.)?(vit|deit)\.encoder\..*|.*\.(attention\.attention|attention\.output|mlp\.weights_\w+)\..*',
            ),
            Origin(
                'google',
                r'Transformer/posembed_input/pos_embedding',
                lambda backbone: _google(backbone, 'Transformer/posembed_input/pos_embedding', 1, 3, 2),
                refuses=lambda backbone: _refused_by_google(backbone, 'mean'),
            ),
            Origin(
                'big_vision',
                r'pos_embedding',
                lambda backbone: _google(backbone, 'pos_embedding', 0, 0, 1),
                refuses=lambda backbone: _refused_by_google(backbone, 'mean', 'map'),
            ),
        ),
        fits=_fits,
        fields=_fields,
    ),
)

_HALVES = (0.5, 0.5, 0.5)


def _entry(model: str, size: int, tag: str, timm_name: str = '', **fields: Any) -> dict[str, Entry]:
    """timm's checkpoint of a model, as its `default_cfgs` describe it: 224 pixels are cropped from 90 %, more from all."""
    mean_std = dict(mean=_HALVES, std=_HALVES) if model.startswith('vit') and tag != 'dino' else {}
    preprocessing = Preprocessing(size, crop=0.9 if size == 224 else 1.0, interpolation='bicubic', **mean_std)
    fields |= {'image_size': size} if size not in (224, 518) else {}
    name = f'timm/{timm_name or f"{model}_{size}"}.{tag}'
    return {name: Entry(model, f'hf://{name}', 'apache-2.0', preprocessing, fields)}


_AUGREG = ('tiny_patch16', 'small_patch32', 'small_patch16', 'base_patch32', 'base_patch16', 'large_patch16')
_DEIT = ('tiny', 'small', 'base', 'tiny_distilled', 'small_distilled', 'base_distilled')

CATALOGUE: dict[str, Entry] = {}
for _model in _AUGREG:
    for _size in (224, 384):
        CATALOGUE |= _entry(f'vit_{_model}', _size, 'augreg_in21k_ft_in1k')
    CATALOGUE |= _entry(f'vit_{_model}', 224, 'augreg_in21k')
for _model in ('small_patch16', 'base_patch32', 'base_patch16'):
    for _size in (224, 384):
        CATALOGUE |= _entry(f'vit_{_model}', _size, 'augreg_in1k')
for _tag in ('augreg_in21k_ft_in1k', 'augreg_in21k', 'augreg2_in21k_ft_in1k'):
    CATALOGUE |= _entry('vit_base_patch8', 224, _tag)
CATALOGUE |= _entry('vit_base_patch16', 224, 'augreg2_in21k_ft_in1k')
for _model in ('base_patch32', 'base_patch16', 'large_patch32', 'large_patch16', 'huge_patch14'):
    CATALOGUE |= _entry(f'vit_{_model}', 224, 'orig_in21k')
for _model in ('small_patch8', 'small_patch16', 'base_patch8', 'base_patch16'):
    CATALOGUE |= _entry(f'vit_{_model}', 224, 'dino')
for _model in _DEIT:
    CATALOGUE |= _entry(f'deit_{_model}_patch16', 224, 'fb_in1k')
for _model in ('base', 'base_distilled'):
    CATALOGUE |= _entry(f'deit_{_model}_patch16', 384, 'fb_in1k')
for _model in ('small_patch16', 'medium_patch16', 'base_patch16', 'large_patch16', 'huge_patch14'):
    CATALOGUE |= _entry(f'deit3_{_model}', 224, 'fb_in1k')
for _model in ('small', 'base', 'large', 'giant'):
    CATALOGUE |= _entry(f'dinov2_{_model}', 518, 'lvd142m', f'vit_{_model}_patch14_dinov2')
    # timm adds the class token's position to the token.
    CATALOGUE |= _entry(f'dinov2_{_model}_reg', 518, 'lvd142m', f'vit_{_model}_patch14_reg4_dinov2', embed_prefix=False)
