"""ConvNeXts: torchvision's, timm's and Hugging Face's names."""

import functools
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from tl_jax.models.convnext import MODELS, ConvNeXt
from tl_jax.pretrained.catalogue import Entry, Preprocessing
from tl_jax.pretrained.maps.hub_config import activation, only, require, timm_architectures, timm_fields
from tl_jax.pretrained.names import OI, OI11, SAME, Family, Layout, Origin, Rule, conv, dense, norm, stem_fit

_ROW = Layout(lambda t: t.reshape(-1), lambda leaf: leaf[None, None, None, :])
_COLUMN = Layout(lambda t: t.reshape(-1), lambda leaf: leaf[:, None, None])
# Timm's MLPs, read as what they are: dense or 1×1 convolutions.
_DENSE = Layout(OI11.read, OI.write)
_STAGE = 'backbone/stage{stage+1}'
_BLOCK = f'{_STAGE}/block{{block+1}}'


def _torchvision(backbone: nn.Module | None) -> tuple[Rule, ...]:
    """Stages and what halves the map take turns in one list."""
    rules = [*conv('features.0.0', 'backbone/stem/conv'), *norm('features.0.1', 'backbone/stem/norm')]
    for stage in range(1, 1 + len(getattr(backbone, 'stage_sizes', range(4)))):
        ours, theirs = f'backbone/stage{stage}', f'features.{2 * stage - 1}.{{block}}'
        rules += [
            *norm(f'features.{2 * stage - 2}.0', f'{ours}/downsample_norm'),
            *conv(f'features.{2 * stage - 2}.1', f'{ours}/downsample_conv'),
            *conv(f'{theirs}.block.0', f'{ours}/block{{block+1}}/depthwise'),
            *norm(f'{theirs}.block.2', f'{ours}/block{{block+1}}/norm'),
            *dense(f'{theirs}.block.3', f'{ours}/block{{block+1}}/dense1'),
            *dense(f'{theirs}.block.5', f'{ours}/block{{block+1}}/dense2'),
            Rule(f'{theirs}.layer_scale', f'params/{ours}/block{{block+1}}/gamma', _COLUMN),
        ]
    return (*rules, *norm('classifier.0', 'backbone/norm'), *dense('classifier.2', 'head'))


def _timm(backbone: nn.Module | None) -> tuple[Rule, ...]:
    theirs = 'stages.{stage}.blocks.{block}'
    layout = OI11 if getattr(backbone, 'conv_mlp', False) else _DENSE
    return (
        *_timm_stem(getattr(backbone, 'stem', 'patch')),
        *norm('stages.{stage}.downsample.0', f'{_STAGE}/downsample_norm'),
        *conv('stages.{stage}.downsample.1', f'{_STAGE}/downsample_conv'),
        *conv(f'{theirs}.conv_dw', f'{_BLOCK}/depthwise'),
        *norm(f'{theirs}.norm', f'{_BLOCK}/norm'),
        Rule(f'{theirs}.mlp.fc{{i}}.weight', f'params/{_BLOCK}/dense{{i}}/kernel', layout),
        Rule(f'{theirs}.mlp.fc{{i}}.bias', f'params/{_BLOCK}/dense{{i}}/bias', SAME),
        *norm(f'{theirs}.mlp.grn', f'{_BLOCK}/grn'),
        Rule(f'{theirs}.gamma', f'params/{_BLOCK}/gamma', SAME),
        *norm('norm_pre' if getattr(backbone, 'norm_first', False) else 'head.norm', 'backbone/norm'),
        *dense('head.pre_logits.fc', 'backbone/hidden'),
        *dense('head.fc', 'head'),
    )


def _timm_stem(kind: str) -> tuple[Rule, ...]:
    if kind == 'patch':
        return (*conv('stem.0', 'backbone/stem/conv'), *norm('stem.1', 'backbone/stem/norm'))
    return (
        *conv('stem.0', 'backbone/stem/conv1'),
        *conv('stem.1', 'backbone/stem/conv2'),
        *norm('stem.2', 'backbone/stem/norm'),
    )


def _transformers(backbone: nn.Module | None) -> tuple[Rule, ...]:
    """With the prefix of whole models, V1's or V2's, and without as in bare ones; written with the network's own."""
    prefixes = ('convnextv2.', 'convnext.', '') if getattr(backbone, 'grn', False) else ('convnext.', 'convnextv2.', '')
    rules = [rule for prefix in prefixes for rule in _transformers_backbone(prefix)]
    return (*rules, *dense('classifier', 'head'))


def _transformers_backbone(prefix: str) -> tuple[Rule, ...]:
    stage = f'{prefix}encoder.stages.{{stage}}'
    theirs = f'{stage}.layers.{{block}}'
    return (
        *conv(f'{prefix}embeddings.patch_embeddings', 'backbone/stem/conv'),
        *norm(f'{prefix}embeddings.layernorm', 'backbone/stem/norm'),
        *norm(f'{stage}.downsampling_layer.0', f'{_STAGE}/downsample_norm'),
        *conv(f'{stage}.downsampling_layer.1', f'{_STAGE}/downsample_conv'),
        *conv(f'{theirs}.dwconv', f'{_BLOCK}/depthwise'),
        *norm(f'{theirs}.layernorm', f'{_BLOCK}/norm'),
        *dense(f'{theirs}.pwconv{{i}}', f'{_BLOCK}/dense{{i}}'),
        Rule(f'{theirs}.grn.weight', f'params/{_BLOCK}/grn/scale', _ROW),
        Rule(f'{theirs}.grn.bias', f'params/{_BLOCK}/grn/bias', _ROW),
        Rule(f'{theirs}.layer_scale_parameter', f'params/{_BLOCK}/gamma', SAME),
        *norm(f'{prefix}layernorm', 'backbone/norm'),
    )


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sizes that a `config.json` of timm or Hugging Face states."""
    kind = config.get('model_type')
    if kind not in ('convnext', 'convnextv2'):
        return timm_fields(config, timm_architectures(MODELS, CATALOGUE))
    require(config, {'patch_size': 4})
    return dict(
        stage_sizes=tuple(config.get('depths', (3, 3, 9, 3))),
        widths=tuple(config.get('hidden_sizes', (96, 192, 384, 768))),
        grn=kind == 'convnextv2',
        layer_scale=0.0 if kind == 'convnextv2' else float(config.get('layer_scale_init_value', 1e-6)),
        activation=activation(config, 'hidden_act'),
        last_epsilon=float(config.get('layer_norm_eps', 1e-12)),
    )


def _stem(backbone: nn.Module | None) -> str:
    return 'conv' if getattr(backbone, 'stem', 'patch') == 'patch' else 'conv1'


FAMILIES = (
    Family(
        ConvNeXt,
        (
            Origin('timm', r'stages\.0\.blocks\.0\.conv_dw\.weight', _timm),
            Origin(
                'transformers',
                r'(convnext(v2)?\.)?encoder\.stages\.0\.layers\.0\.dwconv\.weight',
                _transformers,
                refuses=functools.partial(only, norm_first=(False,), epsilon=(1e-6,)),
            ),
            Origin(
                'torchvision',
                r'features\.1\.0\.layer_scale',
                _torchvision,
                refuses=functools.partial(only, norm_first=(False,), activation=('gelu',)),
            ),
        ),
        fits=lambda backbone: (stem_fit(f'backbone/stem/{_stem(backbone)}'),),
        fields=_fields,
    ),
)

_CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
_PLAIN = Preprocessing(224, crop=0.875, interpolation='bicubic')
_TIGHT = Preprocessing(224, crop=0.95, interpolation='bicubic')
# (preprocessing, licence, timm's names).
_CHECKPOINTS = (
    (
        _PLAIN,
        'apache-2.0',
        'convnext_atto.d2_in1k convnext_atto_ols.a2_in1k convnext_femto.d1_in1k convnext_femto_ols.d1_in1k '
        'convnext_pico.d1_in1k convnext_tiny.fb_in1k convnext_small.fb_in1k convnext_base.fb_in1k '
        'convnext_large.fb_in1k convnext_tiny.fb_in22k convnext_small.fb_in22k convnext_base.fb_in22k '
        'convnext_large.fb_in22k convnext_xlarge.fb_in22k convnext_tiny.fb_in22k_ft_in1k '
        'convnext_small.fb_in22k_ft_in1k convnext_base.fb_in22k_ft_in1k convnext_large.fb_in22k_ft_in1k '
        'convnext_xlarge.fb_in22k_ft_in1k',
    ),
    (
        _TIGHT,
        'apache-2.0',
        'convnext_pico_ols.d1_in1k convnext_nano.d1h_in1k convnext_nano.in12k convnext_nano.in12k_ft_in1k '
        'convnext_nano_ols.d1h_in1k convnext_tiny_hnf.a2h_in1k convnext_tiny.in12k convnext_tiny.in12k_ft_in1k '
        'convnext_small.in12k convnext_small.in12k_ft_in1k',
    ),
    (
        Preprocessing(256, crop=1.0, interpolation='bicubic', **_CLIP),
        'apache-2.0',
        'convnext_base.clip_laion2b_augreg_ft_in1k convnext_base.clip_laion2b_augreg_ft_in12k '
        'convnext_base.clip_laion2b_augreg_ft_in12k_in1k convnext_large_mlp.clip_laion2b_augreg_ft_in1k '
        'convnext_xxlarge.clip_laion2b_soup_ft_in1k convnext_xxlarge.clip_laion2b_soup_ft_in12k',
    ),
    (
        _PLAIN,
        'cc-by-nc-4.0',
        'convnextv2_atto.fcmae_ft_in1k convnextv2_femto.fcmae_ft_in1k convnextv2_pico.fcmae_ft_in1k '
        'convnextv2_nano.fcmae_ft_in1k convnextv2_tiny.fcmae_ft_in1k convnextv2_base.fcmae_ft_in1k '
        'convnextv2_large.fcmae_ft_in1k convnextv2_huge.fcmae_ft_in1k convnextv2_nano.fcmae_ft_in22k_in1k '
        'convnextv2_tiny.fcmae_ft_in22k_in1k convnextv2_base.fcmae_ft_in22k_in1k '
        'convnextv2_large.fcmae_ft_in22k_in1k',
    ),
)
_HUGGING_FACE = dict(last_epsilon=1e-12)
CATALOGUE = {
    **{
        f'timm/{name}': Entry(name.split('.')[0], f'hf://timm/{name}', licence, preprocessing)
        for preprocessing, licence, names in _CHECKPOINTS
        for name in names.split()
    },
    # The licences of these are in their cards, on the hub.
    'facebook/convnext-tiny-224': Entry('convnext_tiny', 'hf://facebook/convnext-tiny-224', '', _PLAIN, _HUGGING_FACE),
    'facebook/convnextv2-tiny-1k-224': Entry(
        'convnextv2_tiny', 'hf://facebook/convnextv2-tiny-1k-224', '', _PLAIN, _HUGGING_FACE
    ),
}
