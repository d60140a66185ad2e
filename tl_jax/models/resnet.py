"""Residual networks (He et al. 2015, arXiv:1512.03385), for ImageNet as torchvision's "v1.5" and for CIFAR with option A.

Endpoints: `stem`, `stage1`, `stage2`, … [batch, height, width, channels], and `features` [batch, channels], the mean over
positions of the last stage. Modules: `stem/{conv,norm}`, `stage{i}/block{j}/{conv1,norm1,conv2,…,shortcut_conv,shortcut_norm}`.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.models.layers import BatchNorm, Conv, max_pool


class ResNet(nn.Module):
    """A stem, stages of residual blocks, and the mean over positions.

    Attributes:
      stage_sizes: blocks in each stage; every stage but the first halves the map.
      widths: channels of each stage's inner convolutions.
      block: 'basic' is two 3×3; 'bottleneck' is 1×1, 3×3 (with the stride), 1×1 to four times the width.
      stem: 'imagenet' is a 7×7 of stride 2 and a max pool of stride 2; 'small', for small images, a 3×3.
      stem_width: channels of the stem.
      shortcut: where a block changes shape, 'projection' is a 1×1 convolution with batch norm; 'pad' (option A, without
        parameters) takes every other position and adds zero channels on both sides.
      dtype: of the computation.
    """

    stage_sizes: Sequence[int]
    widths: Sequence[int] = (64, 128, 256, 512)
    block: Literal['basic', 'bottleneck'] = 'basic'
    stem: Literal['imagenet', 'small'] = 'imagenet'
    stem_width: int = 64
    shortcut: Literal['projection', 'pad'] = 'projection'
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if len(self.widths) != len(self.stage_sizes):
            raise UserError(
                f'model.widths: {len(self.widths)} widths for {len(self.stage_sizes)} stages; '
                'give model.stage_sizes and model.widths the same length'
            )

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        x = Stem(self.stem_width, self.stem == 'small', self.dtype, name='stem')(image, train)
        endpoints = {'stem': x}
        if self.stem == 'imagenet':
            x = max_pool(x, 3, 2, padding=1)
        for i, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True), start=1):
            x = Stage(size, width, 1 if i == 1 else 2, self.block, self.shortcut, self.dtype, name=f'stage{i}')(
                x, train
            )
            endpoints[f'stage{i}'] = x
        return {**endpoints, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}


class Stem(nn.Module):
    """The first convolution, normalised and rectified."""

    width: int
    small: bool
    dtype: Any

    @nn.compact
    def __call__(self, image: Array, train: bool) -> Array:
        size, stride = (3, 1) if self.small else (7, 2)
        x = Conv(self.width, size, stride, size // 2, dtype=self.dtype, name='conv')(image)
        return nn.relu(BatchNorm(dtype=self.dtype, name='norm')(x, train))


class Stage(nn.Module):
    """`size` blocks, the first of them with the stride."""

    size: int
    width: int
    stride: int
    block: str
    shortcut: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for j in range(1, self.size + 1):
            stride = self.stride if j == 1 else 1
            x = Block(self.width, stride, self.block, self.shortcut, self.dtype, name=f'block{j}')(x, train)
        return x


class Block(nn.Module):
    """`relu(shortcut(x) + norm(conv(… x)))`."""

    width: int
    stride: int
    block: str
    shortcut: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if self.block == 'basic':
            layers = [(self.width, 3, self.stride), (self.width, 3, 1)]
        else:
            layers = [(self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1)]
        y = x
        for i, (width, size, stride) in enumerate(layers, start=1):
            y = Conv(width, size, stride, size // 2, dtype=self.dtype, name=f'conv{i}')(y)
            y = BatchNorm(dtype=self.dtype, name=f'norm{i}')(y, train)
            if i < len(layers):
                y = nn.relu(y)
        return nn.relu(y + self._shortcut(x, y.shape[-1], train))

    def _shortcut(self, x: Array, width: int, train: bool) -> Array:
        if self.stride == 1 and x.shape[-1] == width:
            return x
        if self.shortcut == 'pad':
            before = (width - x.shape[-1]) // 2
            pads = ((0, 0), (0, 0), (0, 0), (before, width - x.shape[-1] - before))
            return jnp.pad(x[:, :: self.stride, :: self.stride], pads)
        x = Conv(width, 1, self.stride, dtype=self.dtype, name='shortcut_conv')(x)
        return BatchNorm(dtype=self.dtype, name='shortcut_norm')(x, train)


def _imagenet(*stage_sizes: int, block: str):
    return functools.partial(ResNet, stage_sizes=stage_sizes, block=block)


def _cifar(depth: int):
    """A network of 6n + 2 layers: three stages of n basic blocks, of 16, 32 and 64 channels."""
    sizes = ((depth - 2) // 6,) * 3
    return functools.partial(
        ResNet, stage_sizes=sizes, widths=(16, 32, 64), stem='small', stem_width=16, shortcut='pad'
    )


MODELS = {
    'resnet18': _imagenet(2, 2, 2, 2, block='basic'),
    'resnet34': _imagenet(3, 4, 6, 3, block='basic'),
    'resnet50': _imagenet(3, 4, 6, 3, block='bottleneck'),
    'resnet101': _imagenet(3, 4, 23, 3, block='bottleneck'),
    'resnet152': _imagenet(3, 8, 36, 3, block='bottleneck'),
    **{f'resnet{depth}': _cifar(depth) for depth in (20, 32, 44, 56, 110)},
}
