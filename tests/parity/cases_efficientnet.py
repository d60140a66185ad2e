"""EfficientNets of torchvision and timm, TensorFlow's padding and epsilon among the latter."""

from cases_mobilenet import outputs, timm_model
from parity_harness import CLASSES, Case, images, timm_network, torchvision_network

# Two blocks without expansion, so that the first stage is one of them with a residual.
_STAGES = ((1, 3, 1, 16, 2), (6, 5, 2, 24, 1), (4, 3, 2, 40, 1))
_DEFINITION = [['ds_r2_k3_s1_e1_c16_se0.25'], ['ir_r1_k5_s2_e6_c24_se0.25'], ['ir_r1_k3_s2_e4_c40_se0.25']]


def torchvision_reference(width):
    import torch_side  # noqa: F401
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    settings, before = [], 32
    for expansion, kernel, stride, channels, size in _STAGES:
        settings.append(MBConvConfig(expansion, kernel, stride, before, channels, size, width_mult=width))
        before = channels
    return EfficientNet(settings, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES, last_channel=320)


def timm_reference(**kwargs):
    return timm_model(_DEFINITION, 0.25, 'swish', num_features=320, **kwargs)


_TORCHVISION = {'stem': 'features.0', **{f'stage{i}': f'features.{i}' for i in (1, 2, 3)}, 'final': 'features.4'}
_TIMM = {'stem': 'bn1', **{f'stage{i}': f'blocks.{i - 1}' for i in (1, 2, 3)}, 'final': 'bn2'}

CASES = (
    Case(
        'efficientnet_torchvision',
        'efficientnet_b0',
        dict(stages=_STAGES, width=0.25),
        'torchvision',
        lambda: torchvision_reference(0.25),
        outputs(_TORCHVISION | {'features': 'features'}),
        images(4, 45, 38),
        train=True,
        golden=True,
    ),
    Case(
        'efficientnet_timm',
        'efficientnet_b0',
        dict(stages=_STAGES, width=0.25),
        'timm',
        timm_reference,
        outputs(_TIMM | {'features': 'global_pool'}),
        images(4, 45, 38),
        train=True,
    ),
    # Even sizes too: there 'same' pads the right and the bottom alone.
    Case(
        'efficientnet_tensorflow',
        'efficientnet_b0',
        dict(stages=_STAGES, width=0.25, padding='same', epsilon=1e-3),
        'timm',
        lambda: timm_reference(pad_type='same', epsilon=1e-3),
        outputs(_TIMM | {'features': 'global_pool'}),
        images(4, 44, 35),
        train=True,
        golden=True,
    ),
)

SIZES = (
    *(
        (f'efficientnet_b{i}', 1000, {}, 'torchvision', lambda i=i: torchvision_network(f'efficientnet_b{i}'))
        for i in range(8)
    ),
    *(
        (f'efficientnet_b{i}', 1000, {}, 'timm', lambda i=i, prefix=prefix: timm_network(f'{prefix}efficientnet_b{i}'))
        for prefix, i in (('', 0), ('tf_', 3), ('tf_', 7))
    ),
)
