"""MobileNet (Howard et al. 2017, arXiv:1704.04861): depthwise and pointwise convolutions in turn, no residuals.

Endpoints: `stem`, `block1` … `block13` [batch, height, width, channels], and `features` [batch, channels], the mean over
positions of the last. Modules: `stem/{conv,norm}`, `block{i}/{depthwise,depthwise_norm,pointwise,pointwise_norm}`.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.models.fields import check_fields
from tl_jax.models.mobilenet import ConvNorm, Style, conv_norm, scaled

# Channels, blocks, stride of the first: table 1 of the paper.
STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))


class MobileNetV1(nn.Module):
    """The network.

    Attributes:
      width: multiplier of the channels (the paper's α), each rounded to a multiple of 8.
      stages: channels, blocks and stride of the first, of each stage.
      activation: after every normalisation.
      norm: 'batch', or 'none' for weights with the normalisation folded in, where every convolution carries a bias.
      bias: whether convolutions carry one although a batch norm follows.
      padding: 'torch', the same zeros on every side, or 'same', as TensorFlow and TFLite place them.
      epsilon: of the batch norms; TensorFlow has 1e-3.
      momentum: share of the running statistics that a step keeps.
      dtype: of the computation.
    """

    width: float = 1.0
    stages: Sequence[Sequence[int]] = STAGES
    activation: Literal['relu', 'relu6'] = 'relu6'
    norm: Literal['batch', 'none'] = 'batch'
    bias: bool = False
    padding: Literal['torch', 'same'] = 'torch'
    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, factors=('width',))

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        style = Style(self.norm, self.padding, self.epsilon, self.momentum, self.dtype, self.bias)
        x = ConvNorm(scaled(32, self.width), 3, 2, self.activation, style, name='stem')(image, train)
        endpoints = {'stem': x}
        for channels, size, first_stride in self.stages:
            for j in range(size):
                stride, name = first_stride if j == 0 else 1, f'block{len(endpoints)}'
                x = Separable(scaled(channels, self.width), stride, self.activation, style, name=name)(x, train)
                endpoints[name] = x
        return {**endpoints, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of the leaves, from input to output."""
        return ('stem/.*', *(f'block{i}/.*' for i in range(1, sum(size for _, size, _ in self.stages) + 1)))


class Separable(nn.Module):
    """Filter each channel on its own, then mix the channels, an activation after each."""

    features: int
    stride: int
    activation: str
    style: Style

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        activation, channels = getattr(nn, self.activation), x.shape[-1]
        names = ('depthwise', 'depthwise_norm')
        x = activation(conv_norm(x, train, self.style, names, channels, 3, self.stride, groups=channels))
        return activation(conv_norm(x, train, self.style, ('pointwise', 'pointwise_norm'), self.features))


MODELS = {
    'mobilenet_v1': MobileNetV1,
    # MLPerf Tiny's: a quarter of the channels, in the details of Keras.
    'mobilenet_v1_vww': functools.partial(
        MobileNetV1, width=0.25, activation='relu', bias=True, padding='same', epsilon=1e-3, momentum=0.99
    ),
}
