"""MobileNets of torchvision and timm; MobileNetV1 as Keras has it, and the folded ones of TFLite, have no torch network."""

import functools

from parity_harness import CLASSES, Case, images, timm_network, torchvision_network


def torchvision_v2(stages, width):
    import torch_side  # noqa: F401
    from torchvision.models.mobilenetv2 import MobileNetV2

    return MobileNetV2(CLASSES, width, [list(stage) for stage in stages], dropout=0.0)


def torchvision_v3(blocks, dense_width, width):
    import torch_side  # noqa: F401
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    settings, before = [], 16
    for kernel, wide, channels, squeeze, activation, stride in blocks:
        short = {'hard_swish': 'HS', 'relu': 'RE'}[activation]
        settings.append(InvertedResidualConfig(before, kernel, wide, channels, squeeze, short, stride, 1, width))
        before = channels
    return MobileNetV3(settings, dense_width, CLASSES, dropout=0.0)


def timm_model(definition, width=1.0, activation='relu6', epsilon=1e-5, family='EfficientNet', **kwargs):
    """A network of timm from the strings that define its blocks."""
    import torch_side  # noqa: F401
    from timm.layers import get_act_layer
    from timm.models import _efficientnet_builder as builder
    from timm.models import efficientnet, mobilenetv3
    from torch import nn

    network = efficientnet.EfficientNet if family == 'EfficientNet' else mobilenetv3.MobileNetV3
    return network(
        block_args=builder.decode_arch_def(definition),
        num_classes=CLASSES,
        round_chs_fn=functools.partial(builder.round_channels, multiplier=width),
        norm_layer=functools.partial(nn.BatchNorm2d, eps=epsilon),
        act_layer=get_act_layer(activation),
        **kwargs,
    )


def timm_v3(definition, **kwargs):
    import torch_side  # noqa: F401
    from timm.models._efficientnet_blocks import SqueezeExcite
    from timm.models._efficientnet_builder import round_channels
    from torch import nn

    squeeze = functools.partial(
        SqueezeExcite, gate_layer='hard_sigmoid', force_act_layer=nn.ReLU, rd_round_fn=round_channels
    )
    return timm_model(
        definition, activation='hard_swish', family='MobileNetV3', stem_size=16, se_layer=squeeze, **kwargs
    )


def outputs(modules):
    """The endpoints that these modules of the reference give, and the logits; maps for `features` are averaged."""

    def record(reference, image):
        import torch_side

        endpoints = torch_side.with_logits(reference, image, modules)
        features = endpoints['features']
        return endpoints | {'features': features.mean((2, 3)) if features.ndim == 4 else features}

    return record


def torchvision_outputs(blocks, features='features'):
    names = {f'block{i}': f'features.{i}' for i in range(1, blocks + 1)}
    return outputs({'stem': 'features.0', **names, 'final': f'features.{blocks + 1}', 'features': features})


def timm_outputs(*sizes, **rest):
    """`sizes` are the blocks of each stage."""
    places = [f'blocks.{stage}.{j}' for stage, size in enumerate(sizes) for j in range(size)]
    names = {f'block{i}': place for i, place in enumerate(places, start=1)}
    return outputs({'stem': 'bn1', **names, **({'features': 'global_pool'} | rest)})


_V1 = ((16, 1, 1), (24, 2, 2), (40, 1, 2))
_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (4, 32, 1, 2))
# Every stage of the whole network, but fewer blocks: at a tenth of the channels each adds a third to the rounding error.
_V2_NARROW = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 1, 2), (6, 96, 1, 1), (6, 160, 1, 2), (6, 320, 1, 1))
_V3 = (
    (3, 16, 16, True, 'relu', 2),
    (3, 72, 24, False, 'relu', 2),
    (5, 88, 24, True, 'hard_swish', 1),
    (5, 96, 40, True, 'hard_swish', 2),
)
_V3_TIMM = [['ds_r1_k3_s2_e1_c16_se0.25_nre'], ['ir_r1_k3_s2_e4.5_c24_nre', 'ir_r1_k5_s1_e3.67_c24_se0.25']]
_V3_TIMM += [['ir_r1_k5_s2_e4_c40_se0.25'], ['cn_r1_k1_s1_c240']]

CASES = (
    Case(
        'mobilenet_v1_timm',
        'mobilenet_v1',
        dict(stages=_V1, width=0.5),
        'timm',
        lambda: timm_model([['dsa_r1_k3_s1_c16'], ['dsa_r2_k3_s2_c24'], ['dsa_r1_k3_s2_c40']], 0.5, num_features=0),
        timm_outputs(1, 2, 1),
        images(4, 45, 38),
        train=True,
        golden=True,
    ),
    Case(
        'mobilenet_v2_torchvision',
        'mobilenet_v2',
        dict(stages=_V2_NARROW, width=0.1),
        'torchvision',
        lambda: torchvision_v2(_V2_NARROW, 0.1),
        torchvision_outputs(9),
        images(4, 128),
        train=True,
    ),
    Case(
        'mobilenet_v2_timm',
        'mobilenet_v2',
        dict(stages=_V2, width=1.1),
        'timm',
        lambda: timm_model(
            [['ds_r1_k3_s1_c16'], ['ir_r2_k3_s2_e6_c24'], ['ir_r1_k3_s2_e4_c32']], 1.1, num_features=1408
        ),
        timm_outputs(1, 2, 1, final='bn2'),
        images(4, 61, 50),
        train=True,
        golden=True,
    ),
    Case(
        'mobilenet_v3_torchvision',
        'mobilenet_v3_small',
        dict(blocks=_V3, dense_width=64, width=0.75),
        'torchvision',
        lambda: torchvision_v3(_V3, 48, 0.75),
        torchvision_outputs(4, features='classifier.1'),
        images(4, 70, 65),
        train=True,
        golden=True,
    ),
    Case(
        'mobilenet_v3_timm',
        'mobilenet_v3_large',
        dict(blocks=_V3, dense_width=48, epsilon=1e-5, momentum=0.9),
        'timm',
        lambda: timm_v3(_V3_TIMM, num_features=48),
        timm_outputs(1, 2, 1, final='blocks.3', features='flatten'),
        images(4, 70, 65),
        train=True,
    ),
    Case(
        'mobilenet_v3_tensorflow',
        'mobilenet_v3_large',
        dict(blocks=_V3, dense_width=48, momentum=0.9, padding='same'),
        'timm',
        lambda: timm_v3(_V3_TIMM, num_features=48, pad_type='same', epsilon=1e-3),
        timm_outputs(1, 2, 1, final='blocks.3', features='flatten'),
        images(4, 70, 65),
        train=True,
    ),
)


SIZES = (
    ('mobilenet_v1', 1000, {}, 'timm', lambda: timm_network('mobilenetv1_100')),
    ('mobilenet_v1', 1000, dict(width=1.25), 'timm', lambda: timm_network('mobilenetv1_125')),
    ('mobilenet_v2', 1000, {}, 'torchvision', lambda: torchvision_network('mobilenet_v2')),
    ('mobilenet_v2', 1000, {}, 'timm', lambda: timm_network('mobilenetv2_100')),
    ('mobilenet_v2', 1000, dict(width=1.4), 'timm', lambda: timm_network('mobilenetv2_140')),
    ('mobilenet_v2', 1000, dict(width=0.5), 'timm', lambda: timm_network('mobilenetv2_050')),
    ('mobilenet_v3_large', 1000, {}, 'torchvision', lambda: torchvision_network('mobilenet_v3_large')),
    ('mobilenet_v3_small', 1000, {}, 'torchvision', lambda: torchvision_network('mobilenet_v3_small')),
    ('mobilenet_v3_large', 1000, {}, 'timm', lambda: timm_network('mobilenetv3_large_100')),
    ('mobilenet_v3_small', 1000, {}, 'timm', lambda: timm_network('mobilenetv3_small_100')),
)
