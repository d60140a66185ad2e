"""Small networks for small images and plain vectors: LeNet, a configurable convnet, an MLP.

Endpoints: `conv1`, `conv2`, … [batch, height, width, channels] after pooling, `dense1`, … [batch, width], and `features`
[batch, dim], the last of them (flattened, or its mean over positions). Modules: `conv{i}`, `norm{i}`, `dense{i}`.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.models.heads import uniform
from tl_jax.models.layers import BatchNorm, Conv, max_pool


class ConvNet(nn.Module):
    """Blocks of convolution, norm, ReLU and max pool, then hidden layers of dense, ReLU and dropout.

    Attributes:
      widths: channels of each convolution.
      kernel_size: of every convolution, stride 1.
      padding: rows and columns of zeros on every side, or 'same' or 'valid'.
      pool: window and stride of the max pool after each convolution; 1 for none.
      norm: 'batch', or 'none', where the convolutions carry a bias.
      reduce: how the last map becomes a vector: 'flatten' it, row by row, or its 'mean' over positions.
      dense: widths of the hidden layers.
      dropout: share of each hidden layer that is dropped in training.
      dtype: of the computation.
    """

    widths: Sequence[int] = (32, 64)
    kernel_size: int = 3
    padding: int | str = 'same'
    pool: int = 2
    norm: Literal['batch', 'none'] = 'none'
    reduce: Literal['flatten', 'mean'] = 'flatten'
    dense: Sequence[int] = ()
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        endpoints, x = {}, image
        for i, width in enumerate(self.widths, start=1):
            conv = functools.partial(Conv, width, self.kernel_size, 1, self.padding, dtype=self.dtype)
            x = conv(use_bias=self.norm == 'none', name=f'conv{i}')(x)
            if self.norm == 'batch':
                x = BatchNorm(dtype=self.dtype, name=f'norm{i}')(x, train)
            x = endpoints[f'conv{i}'] = max_pool(nn.relu(x), self.pool, self.pool)
        x = x.reshape(x.shape[0], -1) if self.reduce == 'flatten' else jnp.mean(x, (1, 2))
        x = x.astype(jnp.float32)
        for i, width in enumerate(self.dense, start=1):
            x = nn.relu(nn.Dense(width, kernel_init=uniform, name=f'dense{i}')(x))
            x = endpoints[f'dense{i}'] = nn.Dropout(self.dropout, deterministic=not train)(x)
        return {**endpoints, 'features': x}


MODELS = {
    # The Caffe LeNet of the domain-adaptation papers on digits (DANN's, ADDA's and SHOT's differ in their widths).
    'lenet': functools.partial(ConvNet, widths=(20, 50), kernel_size=5, padding=0, dense=(500,)),
    'convnet': ConvNet,
    'mlp': functools.partial(ConvNet, widths=(), dense=(256, 256)),
}
