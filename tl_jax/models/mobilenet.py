"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): inverted residuals with linear bottlenecks.

Endpoints: `stem`, `block1` … `block17`, `final` [batch, height, width, channels], and `features` [batch, channels], the mean
over positions of the last. Modules: `stem/{conv,norm}`,
`block{i}/{expand,expand_norm,depthwise,depthwise_norm,project,project_norm}` (the first block has no `expand`),
`final/{conv,norm}`.
"""

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.models.layers import BatchNorm, Conv

# Expansion, output channels, blocks, stride of the first: table 2 of the paper.
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV2(nn.Module):
    """The network, of which every size but the number of blocks scales with `width`.

    Attributes:
      width: multiplier of the channels, each rounded to a multiple of 8 and by at most 10 % down.
      norm: 'batch', or 'none' for weights with the normalisation folded in, where every convolution carries a bias.
      padding: 'torch', the same zeros on every side, or 'same', as TensorFlow and TFLite place them.
      dtype: of the computation.
    """

    width: float = 1.0
    norm: Literal['batch', 'none'] = 'batch'
    padding: Literal['torch', 'same'] = 'torch'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        common = dict(norm=self.norm, padding=self.padding, dtype=self.dtype)
        layer = ConvNorm(scaled(32, self.width), 3, 2, **common, name='stem')
        x = layer(image, train)
        endpoints = {'stem': x}
        for expansion, channels, size, first_stride in GROUPS:
            for j in range(size):
                stride = first_stride if j == 0 else 1
                name = f'block{len(endpoints)}'
                block = InvertedResidual(scaled(channels, self.width), expansion, stride, **common, name=name)
                x = endpoints[name] = block(x, train)
        # The last layer is not made narrower than in the paper.
        x = ConvNorm(scaled(1280, max(1.0, self.width)), 1, 1, **common, name='final')(x, train)
        return {**endpoints, 'final': x, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}


class ConvNorm(nn.Module):
    """A convolution, its normalisation if any, and ReLU6."""

    features: int
    kernel_size: int
    stride: int
    norm: str
    padding: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        return relu6(_conv_norm(self, x, train, self.features, self.kernel_size, self.stride, 1, 'conv', 'norm'))


class InvertedResidual(nn.Module):
    """Expand, filter each channel on its own, project back; added to the input where the shapes agree."""

    features: int
    expansion: int
    stride: int
    norm: str
    padding: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        wide = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = relu6(_conv_norm(self, y, train, wide, 1, 1, 1, 'expand', 'expand_norm'))
        y = relu6(_conv_norm(self, y, train, wide, 3, self.stride, wide, 'depthwise', 'depthwise_norm'))
        y = _conv_norm(self, y, train, self.features, 1, 1, 1, 'project', 'project_norm')
        return x + y if x.shape == y.shape else y


def _conv_norm(module, x, train, features, kernel_size, stride, groups, conv, norm):
    """Within a compact call of `module`, whose norm, padding and dtype it takes."""
    padding = kernel_size // 2 if module.padding == 'torch' else 'same'
    folded = module.norm == 'none'
    x = Conv(features, kernel_size, stride, padding, groups=groups, use_bias=folded, dtype=module.dtype, name=conv)(x)
    return x if folded else BatchNorm(dtype=module.dtype, name=norm)(x, train)


def relu6(x: Array) -> Array:
    return jnp.clip(x, 0, 6)


def scaled(channels: int, width: float, divisor: int = 8) -> int:
    """`channels · width` to the nearest multiple of `divisor`, but never less than nine tenths of it."""
    exact = channels * width
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * exact else rounded + divisor


MODELS = {'mobilenet_v2': MobileNetV2}
