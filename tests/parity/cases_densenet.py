"""DenseNets of torchvision and of timm, whose names agree."""

from parity_harness import CLASSES, Case, images, timm_network, torchvision_network

_FIELDS = dict(stage_sizes=(2, 1, 2), growth=6, stem_width=12, bottleneck=3)
_ENDPOINTS = {
    'block1': 'features.denseblock1',
    'transition1': 'features.transition1',
    'block2': 'features.denseblock2',
    'transition2': 'features.transition2',
    'block3': 'features.denseblock3',
}


def torchvision_reference():
    import torch_side  # noqa: F401
    from torchvision.models import DenseNet

    return DenseNet(6, (2, 1, 2), num_init_features=12, bn_size=3, num_classes=CLASSES)


def timm_reference():
    import torch_side  # noqa: F401
    from timm.models.densenet import DenseNet

    return DenseNet(6, (2, 1, 2), bn_size=3, num_classes=CLASSES)


def torchvision_outputs(model, image):
    import torch_side

    # `norm5` is rectified in place after the hook.
    endpoints = torch_side.with_logits(
        model, image, {'stem': 'features.relu0', **_ENDPOINTS, 'features': 'features.norm5'}
    )
    return endpoints | {'features': endpoints['features'].relu().mean((2, 3))}


def timm_outputs(model, image):
    import torch_side

    return torch_side.with_logits(model, image, {'stem': 'features.norm0', **_ENDPOINTS, 'features': 'global_pool'})


CASES = (
    Case(
        'densenet',
        'densenet121',
        _FIELDS,
        'torchvision',
        torchvision_reference,
        torchvision_outputs,
        images(3, 75, 90),
        train=True,
        golden=True,
    ),
    Case(
        'densenet_timm',
        'densenet121',
        _FIELDS,
        'torchvision',
        timm_reference,
        timm_outputs,
        images(3, 65),
        train=True,
    ),
)


SIZES = tuple(
    (f'densenet{depth}', 1000, {}, 'torchvision', lambda name=f'densenet{depth}', build=build: build(name))
    for depth in (121, 161, 169, 201)
    for build in (torchvision_network, timm_network)
)
