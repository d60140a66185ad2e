"""Residual networks: torchvision's and timm's names, which agree on what both have, and akamaster/pytorch_resnet_cifar10's."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from tl_jax.models.resnet import MODELS, ResNet
from tl_jax.pretrained.catalogue import Entry, Preprocessing
from tl_jax.pretrained.maps.hub_config import timm_architectures, timm_fields
from tl_jax.pretrained.names import COUNTERS, Family, Origin, Rule, conv, dense, norm, stem_fit

_BLOCK = 'layer{stage}.{block}'
_OURS = 'backbone/stage{stage}/block{block+1}'


def _rules(shortcut: str, head: str) -> tuple[Rule, ...]:
    return (
        *conv('conv1', 'backbone/stem/conv'),
        *norm('bn1', 'backbone/stem/norm'),
        *_blocks(f'{shortcut}.0', f'{shortcut}.1'),
        *dense(head, 'head'),
    )


def _blocks(shortcut_conv: str, shortcut_norm: str) -> tuple[Rule, ...]:
    return (
        *conv(f'{_BLOCK}.conv{{i}}', f'{_OURS}/conv{{i}}'),
        *norm(f'{_BLOCK}.bn{{i}}', f'{_OURS}/norm{{i}}'),
        *conv(f'{_BLOCK}.{shortcut_conv}', f'{_OURS}/shortcut_conv'),
        *norm(f'{_BLOCK}.{shortcut_norm}', f'{_OURS}/shortcut_norm'),
    )


def _timm(backbone: nn.Module | None) -> tuple[Rule, ...]:
    """Torchvision's with numbers for the parts of a deep stem, and a pool counted in shortcuts that have one."""
    deep = getattr(backbone, 'stem', '') in ('deep', 'tiered')
    pooled = getattr(backbone, 'shortcut', '') == 'average'
    return (
        *conv('conv1.0', 'backbone/stem/conv1'),
        *norm('conv1.1', 'backbone/stem/norm1'),
        *conv('conv1.3', 'backbone/stem/conv2'),
        *norm('conv1.4', 'backbone/stem/norm2'),
        *conv('conv1.6', 'backbone/stem/conv3'),
        *(norm('bn1', 'backbone/stem/norm3') if deep else ()),
        *conv(f'{_BLOCK}.se.fc1', f'{_OURS}/se/reduce'),
        *conv(f'{_BLOCK}.se.fc2', f'{_OURS}/se/expand'),
        *(_blocks('downsample.1', 'downsample.2') if pooled else ()),
        *_rules('downsample', 'fc'),
    )


def _stem(backbone: nn.Module | None) -> str:
    return 'conv1' if getattr(backbone, 'stem', '') in ('deep', 'tiered') else 'conv'


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of an architecture of timm."""
    return timm_fields(config, timm_architectures(MODELS, CATALOGUE))


FAMILIES = (
    Family(
        ResNet,
        (
            Origin(
                'akamaster',
                r'linear\.weight|layer\d\.0\.shortcut\..*',
                lambda _: _rules('shortcut', 'linear'),
                COUNTERS,
            ),
            Origin(
                'timm',
                r'conv1\.0\.weight|layer\d\.\d\.se\.fc1\.weight|layer\d\.0\.downsample\.2\.weight',
                _timm,
                COUNTERS,
            ),
            Origin('torchvision', r'layer1\.0\.conv1\.weight', lambda _: _rules('downsample', 'fc'), COUNTERS),
        ),
        fits=lambda backbone: (stem_fit(f'backbone/stem/{_stem(backbone)}'),),
        fields=_fields,
    ),
)

# (preprocessing, licence, timm's names). What was trained at 160 or 176 pixels is evaluated at 224, timm's test size.
_CHECKPOINTS = (
    (
        Preprocessing(224, crop=0.95, interpolation='bicubic'),
        'apache-2.0',
        'resnet18.a1_in1k resnet18.a2_in1k resnet18.a3_in1k resnet34.a1_in1k resnet34.a2_in1k resnet34.a3_in1k '
        'resnet50.a1_in1k resnet50.a2_in1k resnet50.a3_in1k resnet50.b1k_in1k resnet50.b2k_in1k resnet50.c1_in1k '
        'resnet50.c2_in1k resnet50.d_in1k resnet101.a1_in1k resnet101.a1h_in1k resnet101.a2_in1k resnet101.a3_in1k '
        'resnet152.a1_in1k resnet152.a1h_in1k resnet152.a2_in1k resnet152.a3_in1k resnet10t.c3_in1k resnet14t.c3_in1k '
        'resnet50d.a1_in1k resnet50d.a2_in1k resnet50d.a3_in1k resnext50_32x4d.a1_in1k resnext50_32x4d.a1h_in1k '
        'resnext50_32x4d.a2_in1k resnext50_32x4d.a3_in1k resnext101_64x4d.c1_in1k seresnet50.a1_in1k '
        'seresnet50.a2_in1k seresnet50.a3_in1k seresnext101_32x8d.ah_in1k seresnext101d_32x8d.ah_in1k',
    ),
    (
        Preprocessing(224, crop=0.875, interpolation='bicubic'),
        'apache-2.0',
        'resnet18d.ra2_in1k resnet26.bt_in1k resnet26d.bt_in1k resnet34.bt_in1k resnet34d.ra2_in1k resnet50.am_in1k '
        'resnet50.bt_in1k resnet50.ra_in1k resnet50.ram_in1k resnet50d.ra2_in1k resnext50_32x4d.ra_in1k '
        'resnext50d_32x4d.bt_in1k seresnet50.ra2_in1k seresnext26d_32x4d.bt_in1k seresnext26t_32x4d.bt_in1k '
        'seresnext50_32x4d.racm_in1k wide_resnet50_2.racm_in1k resnet18.gluon_in1k resnet34.gluon_in1k '
        'resnet50.gluon_in1k resnet101.gluon_in1k resnet152.gluon_in1k resnet50c.gluon_in1k resnet101c.gluon_in1k '
        'resnet152c.gluon_in1k resnet50d.gluon_in1k resnet101d.gluon_in1k resnet152d.gluon_in1k '
        'resnext50_32x4d.gluon_in1k resnext101_32x4d.gluon_in1k resnext101_64x4d.gluon_in1k '
        'seresnext50_32x4d.gluon_in1k seresnext101_32x4d.gluon_in1k seresnext101_64x4d.gluon_in1k',
    ),
    (
        Preprocessing(256, crop=0.95, interpolation='bicubic'),
        'apache-2.0',
        'resnet101d.ra2_in1k resnet152d.ra2_in1k resnet200d.ra2_in1k seresnet152d.ra2_in1k',
    ),
    (Preprocessing(256, crop=0.94, interpolation='bicubic'), 'apache-2.0', 'resnet26t.ra2_in1k'),
    (Preprocessing(224, crop=1.0, interpolation='bicubic'), 'apache-2.0', 'resnet50.a1h_in1k'),
    (
        Preprocessing(224, crop=0.875),
        'bsd-3-clause',
        'resnet18.tv_in1k resnet34.tv_in1k resnet50.tv_in1k resnet101.tv_in1k resnet152.tv_in1k '
        'resnext50_32x4d.tv_in1k resnext101_32x8d.tv_in1k resnext101_64x4d.tv_in1k wide_resnet50_2.tv_in1k '
        'wide_resnet101_2.tv_in1k',
    ),
    (
        Preprocessing(224, crop=0.965),
        'bsd-3-clause',
        'resnet50.tv2_in1k resnet101.tv2_in1k resnet152.tv2_in1k resnext50_32x4d.tv2_in1k resnext101_32x8d.tv2_in1k '
        'wide_resnet50_2.tv2_in1k wide_resnet101_2.tv2_in1k',
    ),
    (
        Preprocessing(224, crop=0.875),
        'cc-by-nc-4.0',
        'resnet18.fb_ssl_yfcc100m_ft_in1k resnet18.fb_swsl_ig1b_ft_in1k resnet50.fb_ssl_yfcc100m_ft_in1k '
        'resnet50.fb_swsl_ig1b_ft_in1k resnext50_32x4d.fb_ssl_yfcc100m_ft_in1k '
        'resnext50_32x4d.fb_swsl_ig1b_ft_in1k resnext101_32x4d.fb_ssl_yfcc100m_ft_in1k '
        'resnext101_32x4d.fb_swsl_ig1b_ft_in1k resnext101_32x8d.fb_ssl_yfcc100m_ft_in1k '
        'resnext101_32x8d.fb_swsl_ig1b_ft_in1k resnext101_32x8d.fb_wsl_ig1b_ft_in1k',
    ),
)
CATALOGUE = {
    f'timm/{name}': Entry(name.split('.')[0], f'hf://timm/{name}', licence, preprocessing)
    for preprocessing, licence, names in _CHECKPOINTS
    for name in names.split()
}
