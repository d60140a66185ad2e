"""Small networks for small images and plain vectors: LeNet, a configurable convnet, an MLP.

Endpoints: `conv1`, `conv2`, … [batch, height, width, channels] after pooling, `dense1`, … [batch, width], and `features`
[batch, dim], the last of them (flattened, or its mean over positions). Modules: `conv{i}`, `norm{i}`, `dense{i}`,
`dense_norm{i}`.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.models.fields import check_fields
from tl_jax.models.heads import uniform
from tl_jax.models.layers import BatchNorm, Conv, max_pool

ACTIVATIONS = {'relu': nn.relu, 'sigmoid': nn.sigmoid, 'none': lambda x: x}


class ConvNet(nn.Module):
    """Blocks of convolution, norm, ReLU, max pool and dropout, then hidden layers of dense, norm, ReLU and dropout.

    Attributes:
      widths: channels of each convolution.
      kernel_size: of every convolution; or of each.
      strides: of every convolution, or of each.
      padding: rows and columns of zeros on every side, or 'same' or 'valid'; or of each.
      pool: window of the max pool after every convolution, or after each; 1 for none.
      pool_stride: its stride; 0 for the window's own length.
      norm: 'batch', or 'none', where the convolutions carry a bias.
      conv_dropout: share of whole channels that is dropped in training after each convolution (Tompson et al. 2015,
        arXiv:1411.4280, sec. 3.2); empty for none.
      reduce: how the last map becomes a vector: 'flatten' it, row by row, or its 'mean' over positions.
      vector_dropout: share of that vector that is dropped in training.
      dense: widths of the hidden layers.
      dense_norm: 'batch' or 'none'.
      dense_activation: 'relu', 'sigmoid', or 'none' for a bottleneck that stays linear.
      dropout: share of each hidden layer that is dropped in training.
      conv_form: how the convolutions are computed (`layers.Conv.form`); 'patches' where each of many tasks has weights of
        its own.
      dtype: of the computation.
    """

    widths: Sequence[int] = (32, 64)
    kernel_size: int | Sequence[int] = 3
    strides: int | Sequence[int] = 1
    padding: int | str | Sequence[int | str] = 'same'
    pool: int | Sequence[int] = 2
    pool_stride: int = 0
    norm: Literal['batch', 'none'] = 'none'
    conv_dropout: Sequence[float] = ()
    reduce: Literal['flatten', 'mean'] = 'flatten'
    vector_dropout: float = 0.0
    dense: Sequence[int] = ()
    dense_norm: Literal['batch', 'none'] = 'none'
    dense_activation: Literal['relu', 'sigmoid', 'none'] = 'relu'
    dropout: float = 0.0
    conv_form: Literal['xla', 'patches', 'taps'] | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        sizes = ('widths', 'kernel_size', 'strides', 'pool', 'dense')
        check_fields(self, sizes=sizes, counts=('pool_stride',), rates=('conv_dropout', 'vector_dropout', 'dropout'))

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths from input to output."""
        convolutions = (f'(conv|norm){i}/.*' for i in range(1, len(self.widths) + 1))
        return (*convolutions, *(f'(dense|dense_norm){i}/.*' for i in range(1, len(self.dense) + 1)))

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        endpoints, x = {}, image
        kernels, pools = self._each('kernel_size', self.kernel_size), self._each('pool', self.pool)
        strides, paddings = self._each('strides', self.strides), self._each('padding', self.padding)
        dropped = self._each('conv_dropout', self.conv_dropout or 0.0)
        for i, width in enumerate(self.widths, start=1):
            conv = functools.partial(Conv, width, kernels[i - 1], strides[i - 1], paddings[i - 1], dtype=self.dtype)
            x = conv(use_bias=self.norm == 'none', form=self.conv_form, name=f'conv{i}')(x)
            if self.norm == 'batch':
                x = BatchNorm(dtype=self.dtype, name=f'norm{i}')(x, train)
            x = max_pool(nn.relu(x), pools[i - 1], self.pool_stride or pools[i - 1])
            drop = nn.Dropout(dropped[i - 1], broadcast_dims=(1, 2), deterministic=not train, name=f'conv_dropout{i}')
            x = endpoints[f'conv{i}'] = drop(x)
        x = x.reshape(x.shape[0], -1) if self.reduce == 'flatten' else jnp.mean(x, (1, 2))
        x = x.astype(jnp.float32)
        x = nn.Dropout(self.vector_dropout, deterministic=not train, name='vector_dropout')(x)
        for i, width in enumerate(self.dense, start=1):
            x = nn.Dense(width, kernel_init=uniform, name=f'dense{i}')(x)
            if self.dense_norm == 'batch':
                x = BatchNorm(name=f'dense_norm{i}')(x, train)
            x = ACTIVATIONS[self.dense_activation](x)
            x = endpoints[f'dense{i}'] = nn.Dropout(self.dropout, deterministic=not train)(x)
        return {**endpoints, 'features': x}

    def _each(self, field: str, value: float | str | Sequence) -> tuple:
        """One value for each convolution."""
        values = tuple(value) if isinstance(value, list | tuple) else (value,) * len(self.widths)
        if len(values) != len(self.widths):
            raise UserError(
                f'model.{field}: {list(values)} has not one for each of the {len(self.widths)} convolutions'
            )
        return values


MODELS = {
    # The Caffe LeNet of the domain-adaptation papers on digits (DANN's, ADDA's and SHOT's differ in their widths).
    'lenet': functools.partial(ConvNet, widths=(20, 50), kernel_size=5, padding=0, dense=(500,)),
    'convnet': ConvNet,
    'mlp': functools.partial(ConvNet, widths=(), dense=(256, 256)),
}
