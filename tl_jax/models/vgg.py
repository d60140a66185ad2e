"""VGG (Simonyan & Zisserman 2015, arXiv:1409.1556), with and without batch normalisation.

Endpoints: `stage1` … `stage5` [batch, height, width, channels], each before its max pool, `fc6` and `features`, what fc7
gives, [batch, hidden]. Modules: `stage{i}/{conv,norm}{j}`, `fc6`, `fc7`; the last linear layer is the role `head`.

`fc6` is a 7×7 convolution without padding and `fc7` a 1×1 one: on the 7×7 map of a 224-pixel image, linear layers.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.models.fields import check_fields, check_stages
from tl_jax.models.layers import BatchNorm, Conv, max_pool

GRID = 7  # Positions along each side of the map that fc6 was made for.


class VGG(nn.Module):
    """Stages of 3×3 convolutions with a max pool after each, and two wide layers.

    Attributes:
      stage_sizes: convolutions in each stage.
      widths: channels of each stage.
      hidden: width of fc6 and fc7.
      norm: 'batch' normalises after every convolution.
      grid: a last map that is not 7×7 is averaged to it: 'pool', as torchvision, in any case; 'slide', as timm, only along
        sides that are smaller, while over a larger map fc6 slides and the mean over its positions counts.
      dropout: after fc6 and fc7; 0.5 in the paper.
      dtype: of the computation.
    """

    stage_sizes: Sequence[int]
    widths: Sequence[int] = (64, 128, 256, 512, 512)
    hidden: int = 4096
    norm: Literal['none', 'batch'] = 'none'
    grid: Literal['pool', 'slide'] = 'pool'
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_stages(self.stage_sizes, self.widths)
        check_fields(self, sizes=('widths', 'hidden'), rates=('dropout',))

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        x, endpoints = image, {}
        for i, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True), start=1):
            x = Stage(size, width, self.norm == 'batch', self.dtype, name=f'stage{i}')(x, train)
            endpoints[f'stage{i}'] = x
            x = max_pool(x, 2, 2)
        sides = x.shape[1:3] if self.grid == 'slide' else (GRID, GRID)
        x = averaged(x, tuple(max(GRID, side) for side in sides))
        for name, size, endpoint in (('fc6', GRID, 'fc6'), ('fc7', 1, 'features')):
            x = Conv(self.hidden, size, use_bias=True, dtype=self.dtype, kernel_init=_wide_init, name=name)(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
            endpoints[endpoint] = jnp.mean(x, (1, 2), dtype=jnp.float32)
        return endpoints

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of the leaves, from the input to the output."""
        sizes = enumerate(self.stage_sizes, start=1)
        return (*(f'stage{i}/(conv|norm){j}/.*' for i, size in sizes for j in range(1, size + 1)), 'fc6/.*', 'fc7/.*')


class Stage(nn.Module):
    """`size` convolutions of 3×3, each normalised if asked, and rectified."""

    size: int
    width: int
    norm: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for j in range(1, self.size + 1):
            x = Conv(self.width, 3, padding=1, use_bias=True, dtype=self.dtype, name=f'conv{j}')(x)
            x = nn.relu(BatchNorm(dtype=self.dtype, name=f'norm{j}')(x, train) if self.norm else x)
        return x


def averaged(
    x: Float[Array, 'batch height width channels'], sides: tuple[int, int]
) -> Float[Array, 'batch rows columns channels']:
    """Means over a grid of `sides` cells, as torch's adaptive pooling: cell i of n begins at ⌊i·size/n⌋ and ends before
    ⌈(i+1)·size/n⌉, so that cells overlap where n does not divide the size.
    """
    if x.shape[1:3] == sides:
        return x
    rows, columns = (_shares(size, cells) for size, cells in zip(x.shape[1:3], sides, strict=True))
    return jnp.einsum('bhwc,ih,jw->bijc', x, rows, columns, precision='highest')


def _shares(size: int, cells: int) -> np.ndarray:
    """[cells, size]: each position's share in the mean of each cell."""
    cell, position = np.arange(cells)[:, None], np.arange(size)
    inside = (position >= cell * size // cells) & (position < -(-(cell + 1) * size // cells))
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


def _wide_init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """N(0, 0.01²), as the paper and torchvision start their linear layers."""
    return nn.initializers.normal(0.01)(key, (int(np.prod(shape)),), dtype).reshape(shape)


_SIZES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
MODELS = {
    f'vgg{depth}{suffix}': functools.partial(VGG, stage_sizes=sizes, norm=norm)
    for depth, sizes in _SIZES.items()
    for suffix, norm in (('', 'none'), ('_bn', 'batch'))
}
