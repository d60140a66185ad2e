"""Residual networks (He et al. 2015, arXiv:1512.03385), for ImageNet as torchvision's "v1.5" and for CIFAR with option A.

With groups they are ResNeXts (Xie et al. 2016, arXiv:1611.05431), with a larger `base_width` Wide ResNets (Zagoruyko &
Komodakis 2016, arXiv:1605.07146), with a deep stem and average pooling in the shortcuts ResNet-D (He et al. 2018,
arXiv:1812.01187), with `squeeze` SE-ResNets (Hu et al. 2017, arXiv:1709.01507).

Endpoints: `stem`, `stage1`, `stage2`, … [batch, height, width, channels], and `features` [batch, channels], the mean over
positions of the last stage; with `preactivations` also `stage1_preactivation`, …, what the stage's last ReLU sees. Modules:
`stem/{conv,norm}` or `stem/{conv1,norm1,conv2,…}`, `stage{i}/block{j}/{conv1,norm1,conv2,…,se,shortcut_conv,shortcut_norm}`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.models.fields import check_fields, check_stages
from tl_jax.models.layers import BatchNorm, Conv, SqueezeExcite, max_pool
from tl_jax.models.transformer import DropPath, drop_rates


class ResNet(nn.Module):
    """A stem, stages of residual blocks, and the mean over positions.

    Attributes:
      stage_sizes: blocks in each stage; every stage but the first halves the map.
      widths: channels of each stage's inner convolutions.
      block: 'basic' is two 3×3; 'bottleneck' is 1×1, 3×3 (with the stride), 1×1 to four times the width.
      groups: of the bottleneck's 3×3.
      base_width: channels of a group of the bottleneck's 3×3 where the width is 64, in proportion elsewhere.
      squeeze: where not 0, blocks end in a squeeze-and-excitation of 1 / `squeeze` of their channels, in eights.
      stem: 'imagenet' is a 7×7 of stride 2 and a max pool of stride 2; 'deep' has three 3×3 in place of the 7×7, of half
        the stem's width, half and all of it; in 'tiered' the first has 3/8; 'small', for small images, is a 3×3 alone.
      stem_width: channels of the stem.
      shortcut: where a block changes shape, 'projection' is a 1×1 convolution with batch norm; 'average' takes the mean
        of 2×2 first instead of a stride; 'pad' (option A, without parameters) takes every other position and adds zero
        channels on both sides.
      drop_path: rate of stochastic depth in the last block, from 0 in the first.
      preactivations: whether `stage{i}_preactivation` are among the endpoints.
      dtype: of the computation.
    """

    stage_sizes: Sequence[int]
    widths: Sequence[int] = (64, 128, 256, 512)
    block: Literal['basic', 'bottleneck'] = 'basic'
    groups: int = 1
    base_width: int = 64
    squeeze: int = 0
    stem: Literal['imagenet', 'deep', 'tiered', 'small'] = 'imagenet'
    stem_width: int = 64
    shortcut: Literal['projection', 'average', 'pad'] = 'projection'
    drop_path: float = 0.0
    preactivations: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_stages(self.stage_sizes, self.widths)
        sizes = ('widths', 'groups', 'base_width', 'stem_width')
        check_fields(self, sizes=sizes, counts=('squeeze',), rates=('drop_path',))
        if self.block == 'basic' and (self.groups, self.base_width) != (1, 64):
            raise UserError("model.block: basic blocks have neither groups nor a base_width; use 'bottleneck'")
        if min(self.widths) * self.base_width < 64:
            raise UserError(
                f'model.base_width: {self.base_width} of each 64 channels leaves a group of a stage of {min(self.widths)} '
                'without any; raise it'
            )
        least = {'deep': 2, 'tiered': 8}.get(self.stem, 1)
        if self.stem_width < least:
            raise UserError(f'model.stem_width: {self.stem_width} is too narrow for stem={self.stem!r}; give {least}')

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of paths below this module, from the input on."""
        sizes = enumerate(self.stage_sizes, start=1)
        return ('stem/.*', *(f'stage{i}/block{j}/.*' for i, size in sizes for j in range(1, size + 1)))

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        x = Stem(self.stem, self.stem_width, self.dtype, name='stem')(image, train)
        endpoints = {'stem': x}
        if self.stem != 'small':
            x = max_pool(x, 3, 2, padding=1)
        block = functools.partial(
            Block,
            kind=self.block,
            groups=self.groups,
            base_width=self.base_width,
            squeeze=self.squeeze,
            shortcut=self.shortcut,
            dtype=self.dtype,
        )
        rates = drop_rates(self.stage_sizes, self.drop_path)
        for i, (width, drops) in enumerate(zip(self.widths, rates, strict=True), start=1):
            before = Stage(block, width, 1 if i == 1 else 2, drops, name=f'stage{i}')(x, train)
            endpoints[f'stage{i}'] = x = nn.relu(before)
            if self.preactivations:
                endpoints[f'stage{i}_preactivation'] = before
        return {**endpoints, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}


class Stem(nn.Module):
    """The first convolution or three of them, each normalised and rectified."""

    kind: str
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, image: Array, train: bool) -> Array:
        if self.kind in ('imagenet', 'small'):
            size, stride = (3, 1) if self.kind == 'small' else (7, 2)
            x = Conv(self.width, size, stride, size // 2, dtype=self.dtype, name='conv')(image)
            return nn.relu(BatchNorm(dtype=self.dtype, name='norm')(x, train))
        half = self.width // 2
        first = half if self.kind == 'deep' else 3 * (half // 4)
        x = image
        for i, (width, stride) in enumerate([(first, 2), (half, 1), (self.width, 1)], start=1):
            x = Conv(width, 3, stride, 1, dtype=self.dtype, name=f'conv{i}')(x)
            x = nn.relu(BatchNorm(dtype=self.dtype, name=f'norm{i}')(x, train))
        return x


class Stage(nn.Module):
    """A block for each rate of `drops`, the first of them with the stride; without the ReLU after the last."""

    block: Callable[..., nn.Module]
    width: int
    stride: int
    drops: tuple[float, ...]

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for j, drop in enumerate(self.drops, start=1):
            stride = self.stride if j == 1 else 1
            x = nn.relu(x) if j > 1 else x
            x = self.block(width=self.width, stride=stride, drop=drop, name=f'block{j}')(x, train)
        return x


class Block(nn.Module):
    """`shortcut(x) + norm(conv(… x))`, which a ReLU follows."""

    width: int
    stride: int
    kind: str
    groups: int
    base_width: int
    squeeze: int
    shortcut: str
    drop: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if self.kind == 'basic':
            layers = [(self.width, 3, self.stride, 1), (self.width, 3, 1, 1)]
        else:
            inner = self.width * self.base_width // 64 * self.groups
            layers = [(inner, 1, 1, 1), (inner, 3, self.stride, self.groups), (4 * self.width, 1, 1, 1)]
        y = x
        for i, (width, size, stride, groups) in enumerate(layers, start=1):
            y = Conv(width, size, stride, size // 2, groups=groups, dtype=self.dtype, name=f'conv{i}')(y)
            y = BatchNorm(dtype=self.dtype, name=f'norm{i}')(y, train)
            if i < len(layers):
                y = nn.relu(y)
        if self.squeeze:
            reduced = max(8, (y.shape[-1] // self.squeeze + 4) // 8 * 8)
            y = SqueezeExcite(reduced, dtype=self.dtype, name='se')(y)
        y = DropPath(self.drop)(y, train)
        return y + self._shortcut(x, y.shape[-1], train)

    def _shortcut(self, x: Array, width: int, train: bool) -> Array:
        if self.stride == 1 and x.shape[-1] == width:
            return x
        if self.shortcut == 'pad':
            before = (width - x.shape[-1]) // 2
            pads = ((0, 0), (0, 0), (0, 0), (before, width - x.shape[-1] - before))
            return jnp.pad(x[:, :: self.stride, :: self.stride], pads)
        stride = self.stride
        if self.shortcut == 'average' and stride > 1:
            x, stride = halved(x), 1
        x = Conv(width, 1, stride, dtype=self.dtype, name='shortcut_conv')(x)
        return BatchNorm(dtype=self.dtype, name='shortcut_norm')(x, train)


def halved(x: Float[Array, 'batch height width channels']) -> Float[Array, 'batch rows columns channels']:
    """The mean of 2×2 positions; at an odd edge of those that there are."""
    batch, height, width, channels = x.shape
    # An edge row beside its copy has the mean of the row alone.
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode='edge')
    return x.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels).mean((2, 4))


_SIZES = {
    10: (1, 1, 1, 1),
    14: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    26: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


def _imagenet(depth: int, **fields: Any):
    block = 'basic' if depth in (10, 18, 34) else 'bottleneck'
    return functools.partial(ResNet, stage_sizes=_SIZES[depth], block=block, **fields)


def _cifar(depth: int, **fields: Any):
    """A network of 6n + 2 layers: three stages of n basic blocks, of 16, 32 and 64 channels."""
    small = dict(widths=(16, 32, 64), stem='small', stem_width=16, shortcut='pad')
    return functools.partial(ResNet, stage_sizes=((depth - 2) // 6,) * 3, **{**small, **fields})


_C = dict(stem='deep')
_D = dict(stem='deep', shortcut='average')
_T = dict(stem='tiered', shortcut='average')
_SE = dict(squeeze=16)
_32X4, _32X8, _64X4 = (dict(groups=g, base_width=w) for g, w in ((32, 4), (32, 8), (64, 4)))

MODELS = {
    **{f'resnet{depth}': _imagenet(depth) for depth in (18, 26, 34, 50, 101, 152)},
    **{f'resnet{depth}c': _imagenet(depth, **_C) for depth in (50, 101, 152)},
    **{f'resnet{depth}d': _imagenet(depth, **_D) for depth in (18, 26, 34, 50, 101, 152, 200)},
    **{f'resnet{depth}t': _imagenet(depth, **_T) for depth in (10, 14, 26, 50)},
    'resnext50_32x4d': _imagenet(50, **_32X4),
    'resnext50d_32x4d': _imagenet(50, **_32X4, **_D),
    'resnext101_32x4d': _imagenet(101, **_32X4),
    'resnext101_32x8d': _imagenet(101, **_32X8),
    'resnext101_64x4d': _imagenet(101, **_64X4),
    'wide_resnet50_2': _imagenet(50, base_width=128),
    'wide_resnet101_2': _imagenet(101, base_width=128),
    **{f'seresnet{depth}': _imagenet(depth, **_SE) for depth in (18, 34, 50, 101, 152)},
    'seresnet152d': _imagenet(152, **_SE, **_D),
    'seresnext26d_32x4d': _imagenet(26, **_SE, **_32X4, **_D),
    'seresnext26t_32x4d': _imagenet(26, **_SE, **_32X4, **_T),
    'seresnext50_32x4d': _imagenet(50, **_SE, **_32X4),
    'seresnext101_32x4d': _imagenet(101, **_SE, **_32X4),
    'seresnext101_32x8d': _imagenet(101, **_SE, **_32X8),
    'seresnext101_64x4d': _imagenet(101, **_SE, **_64X4),
    'seresnext101d_32x8d': _imagenet(101, **_SE, **_32X8, **_D),
    **{f'resnet{depth}': _cifar(depth) for depth in (20, 32, 44, 56, 110)},
    # Four times as wide, as Tian et al. 2020 (arXiv:1910.10699) and all since compare distillations with.
    **{
        f'resnet{depth}x4': _cifar(depth, widths=(64, 128, 256), stem_width=32, shortcut='projection')
        for depth in (8, 32)
    },
}
