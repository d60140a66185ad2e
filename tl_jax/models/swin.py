"""Swin transformers: attention within windows, shifted by half a window in every other block.

Liu et al. 2021 (arXiv:2103.14030).

Endpoints: `stem`, `stage1`, `stage2`, … [batch, rows, columns, channels], and `features` [batch, channels], the mean
over positions of the last stage, normalised. Modules: `stem`, `stem_norm`, `stage{i}/merge/{norm,reduce}` from the
second stage on, `stage{i}/block{j}/{norm1,attention,norm2,mlp}` with the parameter `relative_position`, and `norm`.

Images of any size will do: maps are padded with zeros to whole windows, whose tokens take part in attention.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from tl_jax.errors import UserError
from tl_jax.models.fields import check_fields, check_heads, check_stages
from tl_jax.models.transformer import INIT, Attention, Dense, DropPath, LayerNorm, Mlp, drop_rates
from tl_jax.models.vit import Patches


class Swin(nn.Module):
    """Patches to tokens, stages of windowed transformer blocks, and the mean over positions.

    Attributes:
      width: of a token in the first stage; every further stage doubles it and halves the map.
      depths: blocks in each stage; every second one of a stage is shifted.
      heads: of attention in each stage.
      window: tokens, side of a window; one number, or one for each stage.
      patch_size: pixels, side of a patch.
      mlp_ratio: width of the hidden layer by that of a token.
      pad: what comes first where a map is no multiple of the window: torchvision pads and then shifts, timm shifts and
        then pads. For other maps it is the same.
      dropout: of the branches.
      drop_path: rate of stochastic depth in the last block, from 0 in the first.
      dtype: of the computation.
    """

    width: int = 96
    depths: Sequence[int] = (2, 2, 6, 2)
    heads: Sequence[int] = (3, 6, 12, 24)
    window: int | Sequence[int] = 7
    patch_size: int = 4
    mlp_ratio: float = 4.0
    pad: Literal['before_shift', 'after_shift'] = 'before_shift'
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_stages(self.depths, field='depths')
        sizes = ('width', 'heads', 'window', 'patch_size')
        check_fields(self, sizes=sizes, factors=('mlp_ratio',), rates=('dropout', 'drop_path'))
        for name, given in (('heads', self.heads), ('window', self.windows)):
            if len(given) != len(self.depths):
                raise UserError(
                    f'model.{name}: {len(given)} numbers for {len(self.depths)} stages; give as many as model.depths'
                )
        for i, heads in enumerate(self.heads):
            check_heads(heads, self.width * 2**i)

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each stage."""
        return (self.window,) * len(self.depths) if isinstance(self.window, int) else tuple(self.window)

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths from input to output."""
        order = [r'stem(_norm)?/.*']
        for i, depth in enumerate(self.depths, start=1):
            order += [f'stage{i}/merge/.*'] if i > 1 else []
            order += [f'stage{i}/block{j}/.*' for j in range(1, depth + 1)]
        return (*order, 'norm/.*')

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        x = Patches(self.width, self.patch_size, True, self.dtype, name='stem')(image)
        x = LayerNorm(dtype=self.dtype, name='stem_norm')(x)
        endpoints = {'stem': x}
        rates = drop_rates(self.depths, self.drop_path)
        for i, (heads, window, drops) in enumerate(zip(self.heads, self.windows, rates, strict=True), start=1):
            block = functools.partial(
                Block,
                heads=heads,
                window=window,
                mlp_ratio=self.mlp_ratio,
                pad=self.pad,
                dropout=self.dropout,
                dtype=self.dtype,
            )
            x = Stage(block, i > 1, drops, self.dtype, name=f'stage{i}')(x, train)
            endpoints[f'stage{i}'] = x
        x = LayerNorm(dtype=self.dtype, name='norm')(x)
        return {**endpoints, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}


class Stage(nn.Module):
    """Halves the map where `merge`, then a block for each rate of `drops`, every second one shifted."""

    block: Any
    merge: bool
    drops: tuple[float, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, 'batch rows columns width'], train: bool) -> Array:
        if self.merge:
            x = Merge(self.dtype, name='merge')(x)
        for j, drop in enumerate(self.drops):
            x = self.block(shifted=j % 2 == 1, drop_path=drop, name=f'block{j + 1}')(x, train)
        return x


class Merge(nn.Module):
    """2×2 neighbours side by side, normalised, to twice the width; beyond an odd edge there are zeros."""

    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch rows columns width']
    ) -> Float[Array, 'batch half_rows half_columns twice']:
        x = _padded(x, 2)
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, width).transpose(0, 1, 3, 4, 2, 5)
        x = LayerNorm(dtype=self.dtype, name='norm')(x.reshape(batch, rows // 2, columns // 2, 4 * width))
        return Dense(2 * width, use_bias=False, dtype=self.dtype, name='reduce')(x)


class Block(nn.Module):
    """`x + attention(norm1(x))` within windows, then `x + mlp(norm2(x))`."""

    heads: int
    window: int
    shifted: bool
    mlp_ratio: float
    pad: str
    dropout: float
    drop_path: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, 'batch rows columns width'], train: bool) -> Array:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        path = DropPath(self.drop_path)
        x += path(drop(self._attend(LayerNorm(dtype=self.dtype, name='norm1')(x), train)), train)
        mlp = Mlp(int(self.mlp_ratio * x.shape[-1]), dropout=self.dropout, dtype=self.dtype, name='mlp')
        return x + path(drop(mlp(LayerNorm(dtype=self.dtype, name='norm2')(x), train)), train)

    def _attend(self, x: Array, train: bool) -> Array:
        batch, rows, columns, _ = x.shape
        # A map that one window covers has nothing to shift.
        shift = tuple(self.window // 2 if self.shifted and size > self.window else 0 for size in (rows, columns))
        if self.pad == 'before_shift':
            x = _padded(x, self.window)
        before = x.shape[1:3]
        x = _padded(jnp.roll(x, (-shift[0], -shift[1]), (1, 2)), self.window)
        grid = x.shape[1] // self.window, x.shape[2] // self.window
        mask = None
        if any(shift):
            mask = jnp.tile(_together(grid, self.window, shift)[:, None], (batch, 1, 1, 1))
        attention = Attention(self.heads, dtype=self.dtype, name='attention')
        x = attention(_windows(x, self.window), mask=mask, bias=self._bias(), train=train)
        x = _map(x, grid, self.window)[:, : before[0], : before[1]]
        return jnp.roll(x, shift, (1, 2))[:, :rows, :columns]

    def _bias(self) -> Float[Array, 'heads tokens tokens']:
        """What is added to the scores of each pair of a window's tokens, by where one lies from the other."""
        table = self.param('relative_position', INIT, ((2 * self.window - 1) ** 2, self.heads), jnp.float32)
        return table[relative_position_index(self.window)].transpose(2, 0, 1)


def relative_position_index(window: int) -> Int[np.ndarray, 'tokens tokens']:
    """The row of the table for each pair of a window's tokens: by their distance in rows and then in columns."""
    place = np.indices((window, window)).reshape(2, -1)
    distance = place[:, :, None] - place[:, None, :] + window - 1
    return distance[0] * (2 * window - 1) + distance[1]


def _together(grid: tuple[int, int], window: int, shift: tuple[int, int]) -> Bool[np.ndarray, 'windows tokens tokens']:
    """Which tokens of a window were neighbours before the map was rolled by `shift`."""
    beyond = [np.arange(n * window) >= n * window - s for n, s in zip(grid, shift, strict=True)]
    part = 2 * beyond[0][:, None] + beyond[1]
    part = _windows(part[None, :, :, None], window)[..., 0]
    return part[:, :, None] == part[:, None, :]


def _padded(
    x: Float[Array, 'batch rows columns width'], multiple: int
) -> Float[Array, 'batch more_rows more_columns width']:
    """Zeros below and to the right, up to a multiple of rows and columns."""
    more = [(0, -size % multiple) for size in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *more, (0, 0))) if any(n for _, n in more) else x


def _windows(x: Array, window: int) -> Float[Array, 'windows tokens width']:
    """[batch, rows, columns, width], cut into windows by row."""
    _, rows, columns, width = x.shape
    x = x.reshape(-1, rows // window, window, columns // window, window, width)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window * window, width)


def _map(x: Float[Array, 'windows tokens width'], grid: tuple[int, int], window: int) -> Array:
    """The inverse of `_windows`."""
    x = x.reshape(-1, *grid, window, window, x.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, grid[0] * window, grid[1] * window, x.shape[-1])


_SIZES = {  # width, depths, heads
    'tiny': (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    'small': (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    'base': (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    'large': (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


def _swin(size: str, **fields: Any):
    width, depths, heads = _SIZES[size]
    return functools.partial(Swin, **dict(width=width, depths=depths, heads=heads) | fields)


def _timm(size: str, **fields: Any):
    return _swin(size, pad='after_shift', **fields)


MODELS = {
    'swin_t': _swin('tiny'),
    'swin_s': _swin('small'),
    'swin_b': _swin('base'),
    **{f'swin_{size}_patch4_window7_224': _timm(size) for size in _SIZES},
    **{f'swin_{size}_patch4_window12_384': _timm(size, window=12) for size in ('base', 'large')},
    # Sizes that were searched for (Chen et al. 2021, arXiv:2111.14725).
    'swin_s3_tiny_224': _timm('tiny', window=(7, 7, 14, 7)),
    'swin_s3_small_224': _timm('small', window=(14, 14, 14, 7)),
    'swin_s3_base_224': _timm('small', depths=(2, 2, 30, 2), window=(7, 7, 14, 7)),
}
