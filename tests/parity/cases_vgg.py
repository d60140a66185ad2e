"""VGG of torchvision and of timm, which differ for images of other sizes than 224 pixels."""

from parity_harness import CLASSES, Case, images, timm_network, torchvision_network

_SIZES, _WIDTHS, _HIDDEN = (1, 2, 1, 1, 2), (4, 5, 6, 7, 5), 12
_FIELDS = dict(stage_sizes=_SIZES, widths=_WIDTHS, hidden=_HIDDEN)


def layers():
    return [step for size, width in zip(_SIZES, _WIDTHS, strict=True) for step in (*[width] * size, 'M')]


def torchvision_reference(batch_norm):
    import torch
    import torch_side  # noqa: F401
    from torchvision.models import vgg

    features = vgg.make_layers(layers(), batch_norm)
    with torch.device('meta'):  # its own linear layers are of half a gigabyte
        model = vgg.VGG(features, CLASSES, init_weights=False)
    model.classifier[0] = torch.nn.Linear(_WIDTHS[-1] * 49, _HIDDEN)
    model.classifier[3] = torch.nn.Linear(_HIDDEN, _HIDDEN)
    model.classifier[6] = torch.nn.Linear(_HIDDEN, CLASSES)
    model.classifier[2].p = model.classifier[5].p = 0
    return model


def timm_reference(batch_norm):
    import torch
    import torch_side  # noqa: F401
    from timm.models import vgg

    with torch.device('meta'):
        model = vgg.VGG(layers(), CLASSES, norm_layer=torch.nn.BatchNorm2d if batch_norm else None)
    model.features.to_empty(device='cpu')
    model.pre_logits = vgg.ConvMlp(_WIDTHS[-1], _HIDDEN, drop_rate=0)
    model.head.fc = torch.nn.Linear(_HIDDEN, CLASSES)
    return model


def outputs(model, image):
    """With `fc6` and `features` of either; torchvision's are linear layers, timm's maps of a convolution."""
    import torch_side

    kinds = [type(layer).__name__ for layer in model.features]
    pools = [place for place, kind in enumerate(kinds) if kind == 'MaxPool2d']
    stages = {f'stage{i}': f'features.{place - 1}' for i, place in enumerate(pools, start=1)}
    ends = ('classifier.1', 'classifier.4') if hasattr(model, 'classifier') else ('pre_logits.act1', 'pre_logits.act2')
    endpoints = torch_side.with_logits(model, image, {**stages, 'fc6': ends[0], 'features': ends[1]})
    for name in ('fc6', 'features'):
        if endpoints[name].ndim == 4:
            endpoints[name] = endpoints[name].mean((2, 3))
    return endpoints


CASES = (
    Case(
        'vgg',
        'vgg11',
        _FIELDS,
        'torchvision',
        lambda: torchvision_reference(False),
        outputs,
        images(2, 75, 110),
        golden=True,
    ),
    Case(
        'vgg_bn',
        'vgg13_bn',
        _FIELDS,
        'torchvision',
        lambda: torchvision_reference(True),
        outputs,
        images(2, 265, 230),
        train=True,
    ),
    Case(
        'vgg_timm',
        'vgg16',
        _FIELDS | dict(grid='slide'),
        'timm',
        lambda: timm_reference(False),
        outputs,
        images(2, 260, 100),
    ),
    Case(
        'vgg_bn_timm',
        'vgg19_bn',
        _FIELDS,
        'timm',
        lambda: timm_reference(True),
        outputs,
        images(3, 40, 72),
        train=True,
    ),
)


SIZES = tuple(
    (f'vgg{depth}{suffix}', 1000, {}, origin, lambda name=f'vgg{depth}{suffix}', build=build: build(name))
    for depth in (11, 13, 16, 19)
    for suffix in ('', '_bn')
    for origin, build in (('torchvision', torchvision_network), ('timm', timm_network))
)
