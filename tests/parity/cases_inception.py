"""Inception v3 of torchvision and of timm, whose names agree, with a sixteenth of the filters."""

import functools

from parity_harness import CLASSES, Case, images

_SHARE = 16
_FIELDS = dict(width=1 / _SHARE)
_STEM = ('Conv2d_1a_3x3', 'Conv2d_2a_3x3', 'Conv2d_2b_3x3', 'Conv2d_3b_1x1', 'Conv2d_4a_3x3')
_BLOCKS = tuple(f'Mixed_{name}' for name in ('5b', '5c', '5d', '6a', '6b', '6c', '6d', '6e', '7a', '7b', '7c'))


def narrow(layer):
    """A constructor of layers with a sixteenth of the channels that it is asked for, but for an image's three."""

    def build(channels, features, **kwargs):
        return layer(channels if channels == 3 else channels // _SHARE, features // _SHARE, **kwargs)

    return build


def torchvision_reference(transform_input):
    import torch
    import torch_side  # noqa: F401
    from torchvision.models import inception

    layer = narrow(inception.BasicConv2d)
    kinds = [getattr(inception, f'Inception{kind}') for kind in ('A', 'B', 'C', 'D', 'E', 'Aux')]
    blocks = [layer, *(functools.partial(kind, conv_block=layer) for kind in kinds)]
    model = inception.Inception3(CLASSES, False, transform_input, blocks, init_weights=False, dropout=0.0)
    model.fc = torch.nn.Linear(2048 // _SHARE, CLASSES)
    return model


def timm_reference():
    import importlib
    from unittest import mock

    import torch
    import torch_side  # noqa: F401

    # `timm.models.inception_v3` is the function of that name.
    inception_v3 = importlib.import_module('timm.models.inception_v3')
    with mock.patch.object(inception_v3, 'ConvNormAct', narrow(inception_v3.ConvNormAct)):
        model = inception_v3.InceptionV3(CLASSES)
    model.fc = torch.nn.Linear(2048 // _SHARE, CLASSES)
    return model


def outputs(model, image):
    import torch_side

    pool = 'avgpool' if hasattr(model, 'avgpool') else 'global_pool'
    modules = {name.lower(): name for name in (*_STEM, *_BLOCKS)} | {'features': pool}
    endpoints = torch_side.with_logits(model, image, modules)
    return endpoints | {'features': endpoints['features'].flatten(1)}


CASES = (
    Case(
        'inception',
        'inception_v3',
        _FIELDS | dict(transform_input=True),
        'torchvision',
        lambda: torchvision_reference(True),
        outputs,
        images(3, 111, 134),
        train=True,
        golden=True,
    ),
    Case(
        'inception_timm',
        'inception_v3',
        _FIELDS,
        'torchvision',
        timm_reference,
        outputs,
        images(3, 107),
    ),
)


def torchvision_model():
    import torch_side  # noqa: F401
    from torchvision.models import inception

    return inception.Inception3(init_weights=False)


def timm_model():
    import timm
    import torch_side  # noqa: F401

    return timm.create_model('inception_v3')


def _size(build, *absent):
    import numpy as np

    return ('inception_v3', 1000, {}, 'torchvision', build, np.zeros((1, 299, 299, 3), np.float32), absent)


SIZES = (_size(torchvision_model, r'AuxLogits\..*'), _size(timm_model))
