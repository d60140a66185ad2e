"""Wide residual networks of CIFAR (Zagoruyko & Komodakis 2016, arXiv:1605.07146), as the distillation tables use them.

A block normalises and rectifies before each 3×3 convolution (He et al. 2016, arXiv:1603.05027). The ImageNet networks of that
paper are `wide_resnet50_2` and `wide_resnet101_2` of `resnet.py`.

Endpoints: `stem`, `stage1`, `stage2`, `stage3` [batch, height, width, channels], each before the next norm, and `features`
[batch, channels], the mean over positions of the last, normalised and rectified. Modules: `stem`,
`stage{i}/block{j}/{norm1,conv1,norm2,conv2,shortcut_conv}`, `norm`.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.models.fields import check_fields
from tl_jax.models.layers import BatchNorm, Conv


class WideResNet(nn.Module):
    """A 3×3 convolution, three stages of pre-activated blocks, a norm, and the mean over positions.

    Attributes:
      depth: layers, 6n + 4 for n blocks a stage.
      widen: factor k of the channels 16, 32 and 64.
      dropout: share of the units between a block's convolutions that is dropped in training.
      dtype: of the computation.
    """

    depth: int = 16
    widen: int = 2
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, sizes=('depth', 'widen'), rates=('dropout',))
        if self.depth < 10 or (self.depth - 4) % 6:
            raise UserError(f'model.depth: must be 6n + 4, such as 16 or 40, not {self.depth}')

    @property
    def blocks(self) -> int:
        """In each stage."""
        return (self.depth - 4) // 6

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of paths below this module, from the input on."""
        places = [(i, j) for i in (1, 2, 3) for j in range(1, self.blocks + 1)]
        return ('stem/.*', *(f'stage{i}/block{j}/.*' for i, j in places), 'norm/.*')

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        x = Conv(16, 3, 1, 1, dtype=self.dtype, name='stem')(image)
        endpoints = {'stem': x}
        for i, width in enumerate((16, 32, 64), start=1):
            stage = Stage(
                self.blocks, self.widen * width, 1 if i == 1 else 2, self.dropout, self.dtype, name=f'stage{i}'
            )
            x = endpoints[f'stage{i}'] = stage(x, train)
        x = nn.relu(BatchNorm(dtype=self.dtype, name='norm')(x, train))
        return {**endpoints, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}


class Stage(nn.Module):
    """Blocks, the first of them with the stride."""

    blocks: int
    width: int
    stride: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for j in range(1, self.blocks + 1):
            x = Block(self.width, self.stride if j == 1 else 1, self.dropout, self.dtype, name=f'block{j}')(x, train)
        return x


class Block(nn.Module):
    """`shortcut + conv2(relu(norm2(conv1(relu(norm1(x))))))`; where channels change the shortcut is a 1×1 of relu(norm1(x))."""

    width: int
    stride: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        y = nn.relu(BatchNorm(dtype=self.dtype, name='norm1')(x, train))
        if x.shape[-1] != self.width:
            x = Conv(self.width, 1, self.stride, 0, dtype=self.dtype, name='shortcut_conv')(y)
        y = Conv(self.width, 3, self.stride, 1, dtype=self.dtype, name='conv1')(y)
        y = nn.relu(BatchNorm(dtype=self.dtype, name='norm2')(y, train))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return x + Conv(self.width, 3, 1, 1, dtype=self.dtype, name='conv2')(y)


MODELS = {
    f'wrn_{depth}_{widen}': functools.partial(WideResNet, depth=depth, widen=widen)
    for depth, widen in ((16, 1), (16, 2), (28, 10), (40, 1), (40, 2))
}
