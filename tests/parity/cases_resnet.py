"""Residual networks of torchvision and timm, and the CIFAR ones, whose shortcut A both lack."""

from parity_harness import CLASSES, Case, images, timm_network, torchvision_network

_SMALL = dict(widths=(8, 16, 24, 32), stem_width=8)
_STAGES = {'stem': 'relu', **{f'stage{i}': f'layer{i}' for i in range(1, 5)}, 'features': 'avgpool'}


def reference(block, sizes, widths, small=False, groups=1, base_width=64):
    import torch
    import torch_side  # noqa: F401
    from torchvision.models import resnet

    class OptionA(torch.nn.Module):  # section 3.3 of He et al.
        def forward(self, x):
            zeros = x.shape[1] // 2
            return torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, zeros, zeros))

    block = getattr(resnet, block)
    model = resnet.ResNet(block, [1, 1, 1, 1], groups=groups, width_per_group=base_width)
    model.inplanes = widths[0]
    for i, (size, width) in enumerate(zip(sizes, widths, strict=True), start=1):
        setattr(model, f'layer{i}', model._make_layer(block, width, size, stride=1 if i == 1 else 2))
    model.conv1 = torch.nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
    model.bn1 = torch.nn.BatchNorm2d(widths[0])
    model.fc = torch.nn.Linear(widths[-1] * block.expansion, CLASSES)
    if small:
        model.conv1 = torch.nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        model.maxpool = model.layer4 = torch.nn.Identity()
        model.layer2[0].downsample, model.layer3[0].downsample = OptionA(), OptionA()
    return model


def outputs(model, image):
    import torch_side

    endpoints = torch_side.with_logits(model, image, _STAGES)
    return endpoints | {'features': endpoints['features'].flatten(1)}


def timm_reference(**fields):
    import torch_side  # noqa: F401
    from timm.models import resnet

    fields['block'] = getattr(resnet, fields['block'])
    return resnet.ResNet(num_classes=CLASSES, **fields)


def timm_outputs(model, image):
    import torch_side

    return torch_side.with_logits(model, image, {**_STAGES, 'stem': 'act1', 'features': 'global_pool'})


def cifar_outputs(model, image):
    endpoints = outputs(model, image)
    del endpoints['stage4']
    return endpoints


CASES = (
    Case(
        'resnet_basic',
        'resnet18',
        dict(stage_sizes=(2, 1, 1, 1), **_SMALL),
        'torchvision',
        lambda: reference('BasicBlock', (2, 1, 1, 1), _SMALL['widths']),
        outputs,
        images(2, 64, 48),
        train=True,
        golden=True,
    ),
    Case(
        'resnet_bottleneck',
        'resnet50',
        dict(stage_sizes=(1, 2, 1, 1), **_SMALL),
        'torchvision',
        lambda: reference('Bottleneck', (1, 2, 1, 1), _SMALL['widths']),
        outputs,
        images(4, 128),
        train=True,
    ),
    Case(
        'resnet_cifar',
        'resnet20',
        dict(stage_sizes=(2, 1, 2)),
        'torchvision',
        lambda: reference('BasicBlock', (2, 1, 2), (16, 32, 64), small=True),
        cifar_outputs,
        images(4, 32),
        train=True,
    ),
    Case(
        'resnext',
        'resnext50_32x4d',
        dict(stage_sizes=(1, 2, 1, 1), groups=4, base_width=12, **_SMALL),
        'torchvision',
        lambda: reference('Bottleneck', (1, 2, 1, 1), _SMALL['widths'], groups=4, base_width=12),
        outputs,
        images(4, 96, 71),
        train=True,
    ),
    Case(
        'resnet_d',
        'resnet26d',
        dict(stage_sizes=(1, 2, 1, 1), **_SMALL),
        'timm',
        lambda: timm_reference(
            block='Bottleneck',
            layers=(1, 2, 1, 1),
            channels=_SMALL['widths'],
            stem_type='deep',
            stem_width=4,
            avg_down=True,
        ),
        timm_outputs,
        images(4, 101, 77),
        train=True,
    ),
    Case(
        'resnet_tiered',
        'resnet10t',
        dict(stage_sizes=(1, 1, 1, 1), widths=(16, 16, 24, 32), stem_width=16),
        'timm',
        lambda: timm_reference(
            block='BasicBlock',
            layers=(1, 1, 1, 1),
            channels=(16, 16, 24, 32),
            stem_type='deep_tiered',
            stem_width=8,
            avg_down=True,
        ),
        timm_outputs,
        images(4, 101, 77),
        train=True,
        golden=True,
    ),
    Case(
        'seresnext',
        'seresnext50_32x4d',
        dict(stage_sizes=(1, 1, 2, 1), widths=(64, 64, 96, 96), groups=4, base_width=8),
        'timm',
        lambda: timm_reference(
            block='Bottleneck',
            layers=(1, 1, 2, 1),
            channels=(64, 64, 96, 96),
            cardinality=4,
            base_width=8,
            block_args=dict(attn_layer='se'),
        ),
        timm_outputs,
        images(2, 80, 64),
        train=True,
    ),
)


_TORCHVISION = (
    *(f'resnet{depth}' for depth in (18, 34, 50, 101, 152)),
    *('resnext50_32x4d', 'resnext101_32x8d', 'resnext101_64x4d', 'wide_resnet50_2', 'wide_resnet101_2'),
)
_TIMM = (
    *(
        'resnet10t',
        'resnet18d',
        'resnet26',
        'resnet26d',
        'resnet50',
        'resnet50c',
        'resnet50d',
        'resnet101',
        'resnet200d',
    ),
    *('resnext50_32x4d', 'resnext50d_32x4d', 'resnext101_32x4d', 'seresnet18', 'seresnet50', 'seresnet152d'),
    *('seresnext26t_32x4d', 'seresnext50_32x4d', 'seresnext101_64x4d', 'seresnext101d_32x8d'),
)
SIZES = (
    *((name, 1000, {}, 'torchvision', lambda name=name: torchvision_network(name)) for name in _TORCHVISION),
    *((name, 1000, {}, 'timm', lambda name=name: timm_network(name)) for name in _TIMM),
)
