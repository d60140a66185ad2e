"""SqueezeNets of torchvision, and Caffe's network under ncnn's names, whose images are BGR."""

from parity_harness import CLASSES, Case, images, torchvision_network

_WIDTHS = (8, 6, 9, 7)
_FIELDS = dict(stage_sizes=(2, 1, 1), widths=_WIDTHS, squeeze=3, stem_width=10, classes=CLASSES)


def reference(stem_size, sizes, widths):
    import torch
    import torch_side  # noqa: F401
    from torchvision.models import squeezenet

    layers = [torch.nn.Conv2d(3, 10, stem_size, 2), torch.nn.ReLU(inplace=True)]
    channels, remaining = 10, iter(widths)
    for size in sizes:
        layers.append(torch.nn.MaxPool2d(3, 2, ceil_mode=True))
        for _ in range(size):
            width = next(remaining)
            layers.append(squeezenet.Fire(channels, width // 3, width, width))
            channels = 2 * width
    model = squeezenet.SqueezeNet('1_1', CLASSES)
    model.features = torch.nn.Sequential(*layers)
    model.classifier[1] = torch.nn.Conv2d(channels, CLASSES, 1)
    return model


def outputs(model, image):
    import torch_side

    fires = [i for i, layer in enumerate(model.features) if type(layer).__name__ == 'Fire']
    modules = {'stem': 'features.1'} | {f'fire{i}': f'features.{place}' for i, place in enumerate(fires, start=2)}
    endpoints, logits = torch_side.recorded(model, modules, image)
    last = list(endpoints.values())[-1]
    return {**endpoints, 'features': last.mean((2, 3)), 'logits': logits}


def caffe_reference():
    """The deploy.prototxt of DeepScale's SqueezeNet 1.1, layer by layer, with fewer filters."""
    import torch

    sizes = {'conv1': (10, 3, 3)}
    channels = 10
    for i, width in enumerate(_WIDTHS, start=2):
        sizes[f'fire{i}_squeeze1x1'] = (width // 3, channels, 1)
        sizes[f'fire{i}_expand1x1'] = (width, width // 3, 1)
        sizes[f'fire{i}_expand3x3'] = (width, width // 3, 3)
        channels = 2 * width
    sizes['conv10'] = (CLASSES, channels, 1)
    model = torch.nn.Module()
    for name, (features, depth, side) in sizes.items():
        model.register_parameter(f'{name}_w', torch.nn.Parameter(torch.zeros(features, depth, side, side)))
        model.register_parameter(f'{name}_b', torch.nn.Parameter(torch.zeros(features)))
    return model


def caffe_outputs(model, image):
    from torch.nn import functional

    def conv(x, name, **window):
        return functional.conv2d(x, getattr(model, f'{name}_w'), getattr(model, f'{name}_b'), **window).relu()

    def fire(x, i):
        x = conv(x, f'fire{i}_squeeze1x1')
        return conv(x, f'fire{i}_expand1x1'), conv(x, f'fire{i}_expand3x3', padding=1)

    import torch

    x = conv(image.flip(1), 'conv1', stride=2)
    endpoints = {'stem': x}
    for i in range(2, len(_WIDTHS) + 2):
        if i in (2, 4, 5):
            x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        x = endpoints[f'fire{i}'] = torch.cat(fire(x, i), 1)
    return {**endpoints, 'features': x.mean((2, 3)), 'logits': conv(x, 'conv10').mean((2, 3))}


CASES = (
    Case(
        'squeezenet',
        'squeezenet1_1',
        _FIELDS,
        'torchvision',
        lambda: reference(3, (2, 1, 1), _WIDTHS),
        outputs,
        images(2, 65, 78),
        num_classes=None,
        golden=True,
    ),
    Case(
        'squeezenet_large_stem',
        'squeezenet1_0',
        _FIELDS | dict(stage_sizes=(1, 1), widths=(8, 7)),
        'torchvision',
        lambda: reference(7, (1, 1), (8, 7)),
        outputs,
        images(2, 60, 43),
        num_classes=None,
    ),
    Case(
        'squeezenet_ncnn',
        'squeezenet1_1',
        _FIELDS,
        'ncnn',
        caffe_reference,
        caffe_outputs,
        images(2, 67, 70),
        num_classes=None,
    ),
)


SIZES = tuple(
    (name, None, dict(classes=1000), 'torchvision', lambda name=name: torchvision_network(name))
    for name in ('squeezenet1_0', 'squeezenet1_1')
)
