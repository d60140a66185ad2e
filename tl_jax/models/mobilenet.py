"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): inverted residuals with linear bottlenecks.

Endpoints: `stem`, `block1` … `block17`, `final` [batch, height, width, channels], and `features` [batch, channels], the mean
over positions of the last. Modules: `stem/{conv,norm}`,
`block{i}/{expand,expand_norm,depthwise,depthwise_norm,project,project_norm}` (the first block has no `expand`),
`final/{conv,norm}`. The other MobileNets and EfficientNet are made of the same layers.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.models.fields import check_fields
from tl_jax.models.layers import BatchNorm, Conv, SqueezeExcite
from tl_jax.models.transformer import DropPath

# Expansion, output channels, blocks, stride of the first: table 2 of the paper.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV2(nn.Module):
    """The network, of which every size but the number of blocks scales with `width`.

    Attributes:
      width: multiplier of the channels, each rounded to a multiple of 8 and by at most 10 % down.
      stages: expansion, output channels, blocks and stride of the first, of each stage.
      norm: 'batch', or 'none' for weights with the normalisation folded in, where every convolution carries a bias.
      padding: 'torch', the same zeros on every side, or 'same', as TensorFlow and TFLite place them.
      epsilon: of the batch norms; TensorFlow has 1e-3.
      momentum: share of the running statistics that a step keeps.
      dtype: of the computation.
    """

    width: float = 1.0
    stages: Sequence[Sequence[int]] = STAGES
    norm: Literal['batch', 'none'] = 'batch'
    padding: Literal['torch', 'same'] = 'torch'
    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, factors=('width',))

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        style = Style(self.norm, self.padding, self.epsilon, self.momentum, self.dtype)
        x = ConvNorm(scaled(32, self.width), 3, 2, 'relu6', style, name='stem')(image, train)
        endpoints = {'stem': x}
        for expansion, channels, size, first_stride in self.stages:
            for j in range(size):
                stride, wide, name = first_stride if j == 0 else 1, expansion * x.shape[-1], f'block{len(endpoints)}'
                x = InvertedResidual(scaled(channels, self.width), wide, stride, style, name=name)(x, train)
                endpoints[name] = x
        # The paper makes every layer but the last narrower.
        x = ConvNorm(scaled(1280, max(1.0, self.width)), 1, 1, 'relu6', style, name='final')(x, train)
        return {**endpoints, 'final': x, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of the leaves, from input to output."""
        blocks = sum(size for _, _, size, _ in self.stages)
        return ('stem/.*', *(f'block{i}/.*' for i in range(1, blocks + 1)), 'final/.*')


class Style(NamedTuple):
    """What every layer of a network has in common; the fields are `MobileNetV2`'s.

    Attributes:
      bias: whether convolutions carry one although a batch norm follows, as Keras' own do.
    """

    norm: str
    padding: str
    epsilon: float
    momentum: float
    dtype: Any
    bias: bool = False


class ConvNorm(nn.Module):
    """A convolution, its normalisation if any, and an activation. Modules: `conv`, `norm`."""

    features: int
    kernel_size: int
    stride: int
    activation: str
    style: Style

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = conv_norm(x, train, self.style, ('conv', 'norm'), self.features, self.kernel_size, self.stride)
        return getattr(nn, self.activation)(x)


class InvertedResidual(nn.Module):
    """Expand, filter each channel on its own, weigh the channels, project back; added to the input where shapes agree.

    Attributes:
      features: output channels.
      wide: channels in between; where the input has as many there is no `expand`.
      stride: of the depthwise convolution.
      style: of the convolutions.
      kernel_size: of the depthwise convolution.
      activation: of all but the projection, which is linear.
      squeeze: width of the squeeze-and-excitation `se`; 0 for none.
      gate: of `se`.
      squeeze_activation: inside of `se`.
      drop_path: probability that training leaves an example's input as it is.
    """

    features: int
    wide: int
    stride: int
    style: Style
    kernel_size: int = 3
    activation: str = 'relu6'
    squeeze: int = 0
    gate: str = 'sigmoid'
    squeeze_activation: str = 'relu'
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        y, activation = x, getattr(nn, self.activation)
        if self.wide != x.shape[-1]:
            y = activation(conv_norm(y, train, self.style, ('expand', 'expand_norm'), self.wide))
        names, wide = ('depthwise', 'depthwise_norm'), self.wide
        y = activation(conv_norm(y, train, self.style, names, wide, self.kernel_size, self.stride, groups=wide))
        if self.squeeze:
            y = SqueezeExcite(self.squeeze, self.squeeze_activation, self.gate, self.style.dtype, name='se')(y)
        y = conv_norm(y, train, self.style, ('project', 'project_norm'), self.features)
        return x + DropPath(self.drop_path)(y, train) if x.shape == y.shape else y


def conv_norm(
    x: Array,
    train: bool,
    style: Style,
    names: tuple[str, str],
    features: int,
    kernel_size: int | tuple[int, int] = 1,
    stride: int = 1,
    groups: int = 1,
) -> Array:
    """A convolution and its normalisation, or a bias in its place, as two submodules of the module that calls it."""
    padding = kernel_size // 2 if style.padding == 'torch' else style.padding
    folded = style.norm == 'none'
    conv = Conv(
        features,
        kernel_size,
        stride,
        padding,
        groups=groups,
        use_bias=folded or style.bias,
        dtype=style.dtype,
        name=names[0],
    )
    x = conv(x)
    return x if folded else BatchNorm(style.momentum, style.epsilon, style.dtype, name=names[1])(x, train)


def scaled(channels: int, width: float, divisor: int = 8) -> int:
    """`channels · width` to the nearest multiple of `divisor`, but never less than nine tenths of it."""
    exact = channels * width
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * exact else rounded + divisor


MODELS = {'mobilenet_v2': MobileNetV2}
