"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): inverted residuals with linear bottlenecks.

Endpoints: `stem`, `block1` … `block17`, `final` [batch, height, width, channels], and `features` [batch, channels], the mean
over positions of the last. Modules: `stem/{conv,norm}`,
`block{i}/{expand,expand_norm,depthwise,depthwise_norm,project,project_norm}` (the first block has no `expand`),
`final/{conv,norm}`.
"""

from typing import Any, Literal, NamedTuple

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
        style = Style(self.norm, self.padding, self.dtype)
        x = Layer(scaled(32, self.width), 3, 2, style, name='stem')(image, train)
        endpoints = {'stem': x}
        for expansion, channels, size, first_stride in GROUPS:
            for j in range(size):
                stride, name = first_stride if j == 0 else 1, f'block{len(endpoints)}'
                x = InvertedResidual(scaled(channels, self.width), expansion, stride, style, name=name)(x, train)
                endpoints[name] = x
        # The paper makes every layer but the last narrower.
        x = Layer(scaled(1280, max(1.0, self.width)), 1, 1, style, name='final')(x, train)
        return {**endpoints, 'final': x, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}


class Style(NamedTuple):
    """What every layer has in common."""

    norm: str
    padding: str
    dtype: Any


class Layer(nn.Module):
    """A convolution, its normalisation if any, and ReLU6."""

    features: int
    kernel_size: int
    stride: int
    style: Style

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        return relu6(conv_norm(x, train, self.style, ('conv', 'norm'), self.features, self.kernel_size, self.stride))


class InvertedResidual(nn.Module):
    """Expand, filter each channel on its own, project back; added to the input where the shapes agree."""

    features: int
    expansion: int
    stride: int
    style: Style

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        y, wide = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = relu6(conv_norm(y, train, self.style, ('expand', 'expand_norm'), wide))
        names = ('depthwise', 'depthwise_norm')
        y = relu6(conv_norm(y, train, self.style, names, wide, 3, self.stride, groups=wide))
        y = conv_norm(y, train, self.style, ('project', 'project_norm'), self.features)
        return x + y if x.shape == y.shape else y


def conv_norm(
    x: Array,
    train: bool,
    style: Style,
    names: tuple[str, str],
    features: int,
    kernel_size: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> Array:
    """A convolution and its normalisation, or a bias in its place, as two submodules of the module that calls it."""
    padding = kernel_size // 2 if style.padding == 'torch' else style.padding
    folded = style.norm == 'none'
    conv = Conv(
        features, kernel_size, stride, padding, groups=groups, use_bias=folded, dtype=style.dtype, name=names[0]
    )
    x = conv(x)
    return x if folded else BatchNorm(dtype=style.dtype, name=names[1])(x, train)


def relu6(x: Array) -> Array:
    return jnp.clip(x, 0, 6)


def scaled(channels: int, width: float, divisor: int = 8) -> int:
    """`channels · width` to the nearest multiple of `divisor`, but never less than nine tenths of it."""
    exact = channels * width
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * exact else rounded + divisor


MODELS = {'mobilenet_v2': MobileNetV2}
