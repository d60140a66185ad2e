"""DenseNet-BC (Huang et al. 2017, arXiv:1608.06993): every layer of a block sees the maps of all layers before it.

Endpoints: `stem`, `block1`, `transition1`, `block2`, … [batch, height, width, channels], and `features` [batch, channels],
the mean over positions of the last block, normalised and rectified. Modules: `stem/{conv,norm}`,
`block{i}/layer{j}/{norm1,conv1,norm2,conv2}`, `transition{i}/{norm,conv}`, `final_norm`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.models.fields import check_fields, check_stages
from tl_jax.models.layers import BatchNorm, Conv, avg_pool, max_pool


class DenseNet(nn.Module):
    """A stem, dense blocks, transitions between them that halve the map and its channels, and a mean over positions.

    Attributes:
      stage_sizes: layers of each block.
      growth: channels that a layer adds.
      stem_width: channels of the stem.
      bottleneck: channels between a layer's two convolutions, in multiples of the growth.
      dropout: of what a layer adds.
      dtype: of the computation.
    """

    stage_sizes: Sequence[int] = (6, 12, 24, 16)
    growth: int = 32
    stem_width: int = 64
    bottleneck: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_stages(self.stage_sizes)
        check_fields(self, sizes=('growth', 'stem_width', 'bottleneck'), rates=('dropout',))

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        x = Stem(self.stem_width, self.dtype, name='stem')(image, train)
        endpoints = {'stem': x}
        x = max_pool(x, 3, 2, padding=1)
        for i, size in enumerate(self.stage_sizes, start=1):
            x = Block(size, self.growth, self.bottleneck, self.dropout, self.dtype, name=f'block{i}')(x, train)
            endpoints[f'block{i}'] = x
            if i < len(self.stage_sizes):
                x = Transition(self.dtype, name=f'transition{i}')(x, train)
                endpoints[f'transition{i}'] = x
        x = nn.relu(BatchNorm(dtype=self.dtype, name='final_norm')(x, train))
        return {**endpoints, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of the leaves, from the input to the output."""
        order = ['stem/.*']
        for i, size in enumerate(self.stage_sizes, start=1):
            order += [f'block{i}/layer{j}/.*' for j in range(1, size + 1)]
            order += [f'transition{i}/.*'] if i < len(self.stage_sizes) else []
        return (*order, 'final_norm/.*')


class Stem(nn.Module):
    """The first convolution, normalised and rectified."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, image: Array, train: bool) -> Array:
        x = Conv(self.width, 7, 2, 3, dtype=self.dtype, name='conv')(image)
        return nn.relu(BatchNorm(dtype=self.dtype, name='norm')(x, train))


class Block(nn.Module):
    """`size` layers, each appending its channels to the map."""

    size: int
    growth: int
    bottleneck: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for j in range(1, self.size + 1):
            added = Layer(self.growth, self.bottleneck, self.dropout, self.dtype, name=f'layer{j}')(x, train)
            x = jnp.concatenate([x, added], -1)
        return x


class Layer(nn.Module):
    """`conv2(relu(norm2(conv1(relu(norm1(x))))))`, 1×1 and then 3×3."""

    growth: int
    bottleneck: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.relu(BatchNorm(dtype=self.dtype, name='norm1')(x, train))
        x = Conv(self.bottleneck * self.growth, 1, dtype=self.dtype, name='conv1')(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name='norm2')(x, train))
        x = Conv(self.growth, 3, padding=1, dtype=self.dtype, name='conv2')(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class Transition(nn.Module):
    """Normalises and rectifies, then halves the channels by a 1×1 convolution and the map by means over 2×2."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.relu(BatchNorm(dtype=self.dtype, name='norm')(x, train))
        return avg_pool(Conv(x.shape[-1] // 2, 1, dtype=self.dtype, name='conv')(x), 2, 2)


MODELS = {
    'densenet121': functools.partial(DenseNet, stage_sizes=(6, 12, 24, 16)),
    'densenet161': functools.partial(DenseNet, stage_sizes=(6, 12, 36, 24), growth=48, stem_width=96),
    'densenet169': functools.partial(DenseNet, stage_sizes=(6, 12, 32, 32)),
    'densenet201': functools.partial(DenseNet, stage_sizes=(6, 12, 48, 32)),
}
