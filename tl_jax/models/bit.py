"""BiT: residual networks of version 2 with group norm and weight standardisation (Kolesnikov et al. 2019, arXiv:1912.11370).

A block normalises and rectifies before each convolution (He et al. 2016, arXiv:1603.05027), and every kernel is used with
zero mean and unit variance for each output channel (Qiao et al. 2019, arXiv:1903.10520). Nothing depends on the batch.

Endpoints: `stem`, `stage1`, `stage2`, … [batch, height, width, channels], and `features` [batch, channels], the mean over
positions of the last stage, normalised and rectified. Modules: `stem/conv`,
`stage{i}/block{j}/{norm1,conv1,norm2,conv2,norm3,conv3,shortcut_conv}`, `norm`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.models.fields import check_fields, check_stages
from tl_jax.models.layers import Conv, max_pool
from tl_jax.models.transformer import DropPath, drop_rates, outer_dtype


class BiT(nn.Module):
    """A stem, stages of pre-activated bottlenecks, a last norm, and the mean over positions.

    Attributes:
      stage_sizes: blocks in each stage; every stage but the first halves the map.
      widths: channels of each stage's inner convolutions; its output has four times as many.
      stem_width: channels of the stem.
      groups: of the group norms.
      drop_path: rate of stochastic depth in the last block, from 0 in the first.
      dtype: of the computation.
    """

    stage_sizes: Sequence[int]
    widths: Sequence[int] = (64, 128, 256, 512)
    stem_width: int = 64
    groups: int = 32
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_stages(self.stage_sizes, self.widths)
        check_fields(self, sizes=('widths', 'stem_width', 'groups'), rates=('drop_path',))
        if odd := [width for width in (self.stem_width, *self.widths) if width % self.groups]:
            raise UserError(f'model.groups: {self.groups} groups do not divide {odd[0]} channels; change one of them')

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of paths below this module, from the input on."""
        sizes = enumerate(self.stage_sizes, start=1)
        return ('stem/.*', *(f'stage{i}/block{j}/.*' for i, size in sizes for j in range(1, size + 1)), 'norm/.*')

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        x = Stem(self.stem_width, self.dtype, name='stem')(image)
        endpoints = {'stem': x}
        # Zeros and not minus infinities around the map, which is not rectified: Google's pool pads so.
        x = max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, 2)
        rates = drop_rates(self.stage_sizes, self.drop_path)
        for i, (width, drops) in enumerate(zip(self.widths, rates, strict=True), start=1):
            stride = 1 if i == 1 else 2
            x = Stage(width, stride, self.groups, drops, self.dtype, name=f'stage{i}')(x, train)
            endpoints[f'stage{i}'] = x
        x = nn.relu(group_norm(self.groups, self.dtype, 'norm')(x))
        return {**endpoints, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}


class Stem(nn.Module):
    """A 7×7 convolution of stride 2."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, image: Array) -> Array:
        return standardized_conv(self.width, 7, 2, self.dtype, 'conv')(image)


class Stage(nn.Module):
    """A block for each rate of `drops`, the first of them with the stride."""

    width: int
    stride: int
    groups: int
    drops: tuple[float, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for j, drop in enumerate(self.drops, start=1):
            stride = self.stride if j == 1 else 1
            x = Block(self.width, stride, self.groups, j == 1, drop, self.dtype, name=f'block{j}')(x, train)
        return x


class Block(nn.Module):
    """`shortcut + conv(relu(norm(… x)))`; a projected shortcut starts from the first norm's output."""

    width: int
    stride: int
    groups: int
    project: bool
    drop: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        layers = ((self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1))
        shortcut = y = x
        for i, (width, size, stride) in enumerate(layers, start=1):
            y = nn.relu(group_norm(self.groups, self.dtype, f'norm{i}')(y))
            if i == 1 and self.project:
                shortcut = standardized_conv(4 * self.width, 1, self.stride, self.dtype, 'shortcut_conv')(y)
            y = standardized_conv(width, size, stride, self.dtype, f'conv{i}')(y)
        return shortcut + DropPath(self.drop)(y, train)


def standardized_conv(width: int, size: int, stride: int, dtype: Any, name: str) -> Conv:
    """A convolution with the standardised kernel and as much padding as keeps the map."""
    return Conv(width, size, stride, size // 2, dtype=dtype, reparametrize=standardized, name=name)


def standardized(kernel: Float[Array, 'rows columns in out'], epsilon: float = 1e-8) -> Float[Array, '...']:
    """The kernel with zero mean and unit variance for each output channel; `epsilon` is added to the variance."""
    kernel -= jnp.mean(kernel, (0, 1, 2))
    return kernel * jax.lax.rsqrt(jnp.mean(kernel * kernel, (0, 1, 2)) + epsilon)


def group_norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    """Group normalisation in float32, with torch's two-pass variance."""
    return nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False, dtype=outer_dtype(dtype), name=name)


def _sizes(*stage_sizes: int, width: int):
    widths = tuple(width * w for w in (64, 128, 256, 512))
    return functools.partial(BiT, stage_sizes=stage_sizes, widths=widths, stem_width=64 * width)


MODELS = {
    'bit_50x1': _sizes(3, 4, 6, 3, width=1),
    'bit_50x3': _sizes(3, 4, 6, 3, width=3),
    'bit_101x1': _sizes(3, 4, 23, 3, width=1),
    'bit_101x3': _sizes(3, 4, 23, 3, width=3),
    'bit_152x2': _sizes(3, 8, 36, 3, width=2),
    'bit_152x4': _sizes(3, 8, 36, 3, width=4),
}
