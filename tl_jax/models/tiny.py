"""Small networks of public weights: MLPerf Tiny's ResNet-8 (images) and DS-CNN (keywords), and ml5's DoodleNet (sketches).

MLPerf Tiny: Banbury et al. 2021, arXiv:2106.07597. Endpoints: `stem`, `stage1` …, `block1` … or `conv1` … [batch, height,
width, channels], and `features` [batch, dim]. Modules: see the classes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.models.fields import check_fields
from tl_jax.models.layers import Conv, max_pool
from tl_jax.models.mobilenet import Style, conv_norm
from tl_jax.models.mobilenet_v1 import Separable
from tl_jax.models.transformer import Dense


class ResNet8(nn.Module):
    """MLPerf Tiny's residual network for CIFAR-10, in the details of Keras: biases beside batch norms, `same` padding.

    Modules: `stem`, `stem_norm`, `stage{i}/{conv1,norm1,conv2,norm2,shortcut}`; a stage is one block, and `shortcut` a 1×1
    convolution without a norm where the map halves.

    Attributes:
      widths: channels of each stage; every stage but the first halves the map.
      norm: 'batch', or 'none' for weights with the normalisation folded in.
      dtype: of the computation.
    """

    widths: Sequence[int] = (16, 32, 64)
    norm: Literal['batch', 'none'] = 'batch'
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, sizes=('widths',))
        if not self.widths:
            raise UserError('model.widths: there are none; give one for each stage')

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        style = keras_style(self.norm, self.dtype)
        x = nn.relu(conv_norm(image, train, style, ('stem', 'stem_norm'), self.widths[0], 3))
        endpoints = {'stem': x}
        for i, width in enumerate(self.widths, start=1):
            x = endpoints[f'stage{i}'] = Residual(width, 1 if i == 1 else 2, style, name=f'stage{i}')(x, train)
        return {**endpoints, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of the leaves, from input to output."""
        return ('stem(_norm)?/.*', *(f'stage{i}/.*' for i in range(1, len(self.widths) + 1)))


class Residual(nn.Module):
    """`relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x))))))`."""

    features: int
    stride: int
    style: Style

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        y = nn.relu(conv_norm(x, train, self.style, ('conv1', 'norm1'), self.features, 3, self.stride))
        y = conv_norm(y, train, self.style, ('conv2', 'norm2'), self.features, 3)
        if x.shape != y.shape:
            x = conv_norm(x, train, self.style._replace(norm='none'), ('shortcut', ''), self.features, 1, self.stride)
        return nn.relu(x + y)


class DSCNN(nn.Module):
    """Keywords from 49 × 10 cepstral coefficients (Zhang et al. 2017, arXiv:1711.07128): one convolution, then separable ones.

    Modules: `stem`, `stem_norm`, `block{i}/{depthwise,depthwise_norm,pointwise,pointwise_norm}`.

    Attributes:
      width: channels of every layer.
      depth: number of separable convolutions.
      kernel_size: (steps of time, coefficients) of the first convolution, whose stride is 2.
      norm: 'batch', or 'none' for weights with the normalisation folded in.
      dtype: of the computation.
    """

    width: int = 64
    depth: int = 4
    kernel_size: tuple[int, int] = (10, 4)
    norm: Literal['batch', 'none'] = 'none'
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, sizes=('width', 'kernel_size'), counts=('depth',))

    @nn.compact
    def __call__(self, speech: Float[Array, 'batch time coefficients 1'], train: bool = False) -> dict[str, Array]:
        style = keras_style(self.norm, self.dtype)
        x = nn.relu(conv_norm(speech, train, style, ('stem', 'stem_norm'), self.width, self.kernel_size, 2))
        endpoints = {'stem': x}
        for i in range(1, self.depth + 1):
            x = endpoints[f'block{i}'] = Separable(self.width, 1, 'relu', style, name=f'block{i}')(x, train)
        return {**endpoints, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of the leaves, from input to output."""
        return ('stem(_norm)?/.*', *(f'block{i}/.*' for i in range(1, self.depth + 1)))


class DoodleNet(nn.Module):
    """ml5's network for the sketches of QuickDraw [batch, 28, 28, 1]: pairs of 3×3 convolutions, then a dense layer.

    Modules: `conv1` … `conv6`, `dense`.

    Attributes:
      widths: channels of each pair; a max pool of 2 × 2 follows it.
      dense: width of the hidden layer, of which the hyperbolic tangents are the features.
      dropout: share of the last map that is dropped in training; 0.1 in the original.
      dtype: of the computation.
    """

    widths: Sequence[int] = (16, 32, 64)
    dense: int = 512
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, sizes=('widths', 'dense'), rates=('dropout',))

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        x, endpoints = image, {}
        for width in self.widths:
            for _ in range(2):
                name = f'conv{len(endpoints) + 1}'
                conv = Conv(width, 3, padding='same', use_bias=True, dtype=self.dtype, name=name)
                x = endpoints[name] = nn.relu(conv(x))
            x = max_pool(x, 2, 2)
        x = nn.Dropout(self.dropout, deterministic=not train)(x).reshape(x.shape[0], -1)
        x = jnp.tanh(Dense(self.dense, dtype=self.dtype, name='dense')(x))
        return {**endpoints, 'features': x.astype(jnp.float32)}

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of the leaves, from input to output."""
        return (*(f'conv{i}/.*' for i in range(1, 2 * len(self.widths) + 1)), 'dense/.*')


def keras_style(norm: str, dtype: Any) -> Style:
    """Convolutions as Keras has them unless told otherwise."""
    return Style(norm, 'same', epsilon=1e-3, momentum=0.99, dtype=dtype, bias=True)


MODELS = {'resnet8_keras': ResNet8, 'ds_cnn': DSCNN, 'doodlenet': DoodleNet}
