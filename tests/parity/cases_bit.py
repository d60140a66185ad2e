"""BiT of timm, under timm's names and, through a file of Google's names that timm reads, under those."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from parity_harness import CLASSES, Case, images

from tl_jax.models.bit import MODELS

_SIZES, _WIDTHS = (2, 1, 1), (8, 16, 24)
_STAGES = {'stem': 'stem.conv', **{f'stage{i}': f'stages.{i - 1}' for i in range(1, 4)}, 'features': 'head.global_pool'}
_FIELDS = dict(stage_sizes=_SIZES, widths=_WIDTHS, stem_width=16, groups=8)


def reference():
    import functools

    import torch_side  # noqa: F401
    from timm.layers import GroupNormAct, StdConv2d
    from timm.models.resnetv2 import ResNetV2

    return ResNetV2(
        _SIZES,
        tuple(4 * width for width in _WIDTHS),
        num_classes=CLASSES,
        stem_chs=16,
        stem_type='fixed',
        norm_layer=functools.partial(GroupNormAct, num_groups=8),
        conv_layer=functools.partial(StdConv2d, eps=1e-8),
    )


def outputs(model, image):
    import torch_side

    endpoints = torch_side.with_logits(getattr(model, 'network', model), image, _STAGES)
    return endpoints | {'features': endpoints['features'].flatten(1)}


class Google:
    """Timm's network with a state under Google's names, which it loads from an npz file by timm's own reader."""

    def __init__(self):
        self.network = reference()

    def eval(self):
        self.network.eval()
        return self

    def double(self):
        self.network.double()
        return self

    def zero_grad(self):
        self.network.zero_grad()

    def load_state_dict(self, state, strict):
        expected = self.state_dict()
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / 'bit.npz')
            np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
            self.network.load_pretrained(path)
        return SimpleNamespace(
            unexpected_keys=[name for name in state if name not in expected],
            missing_keys=[name for name in expected if name not in state],
        )

    def state_dict(self):
        return {name: google_layout(tensor) for name, tensor in self._named().items()}

    def named_parameters(self):
        return [(name, SimpleNamespace(grad=google_layout(p.grad))) for name, p in self._named().items()]

    def _named(self):
        """As `_load_weights` of timm's resnetv2.py reads them."""
        net, conv = self.network, 'standardized_conv2d/kernel'
        named = {
            f'resnet/root_block/{conv}': net.stem.conv.weight,
            'resnet/group_norm/gamma': net.norm.weight,
            'resnet/group_norm/beta': net.norm.bias,
            'resnet/head/conv2d/kernel': net.head.fc.weight,
            'resnet/head/conv2d/bias': net.head.fc.bias,
        }
        for i, stage in enumerate(net.stages, start=1):
            for j, block in enumerate(stage.blocks, start=1):
                unit = f'resnet/block{i}/unit{j:02d}'
                for number, letter in ((1, 'a'), (2, 'b'), (3, 'c')):
                    named[f'{unit}/{letter}/{conv}'] = getattr(block, f'conv{number}').weight
                    named[f'{unit}/{letter}/group_norm/gamma'] = getattr(block, f'norm{number}').weight
                    named[f'{unit}/{letter}/group_norm/beta'] = getattr(block, f'norm{number}').bias
                if block.downsample is not None:
                    named[f'{unit}/a/proj/{conv}'] = block.downsample.conv.weight
        return named


def google_layout(tensor):
    """Kernels [rows, columns, in, out]; vectors as they are."""
    return tensor.detach().permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.detach()


CASES = (
    Case('bit_timm', 'bit_50x1', _FIELDS, 'timm', reference, outputs, images(2, 75, 64), golden=True),
    Case('bit_google', 'bit_50x1', _FIELDS, 'google', Google, outputs, images(2, 64, 53)),
)


def timm_model(name):
    import timm
    import torch_side  # noqa: F401

    return timm.create_model(f'{name.replace("bit_", "resnetv2_")}_bit')


SIZES = tuple((name, 1000, {}, 'timm', lambda name=name: timm_model(name)) for name in MODELS)
