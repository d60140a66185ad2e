"""What brings a student's endpoint to a teacher's width: maps of channels that learn beside the student.

They are chosen by shape: at every position of a map [B, H, W, C] (a 1×1 convolution) or of a sequence [B, L, C], and on a
vector [B, C] (a linear layer), the channels are multiplied by one matrix. Positions meet before (`layers.aligned`). Projectors
are there in training alone, so their batch normalisation needs the batch's statistics and keeps none.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tl_jax.models.layers import Conv

Params = Mapping[str, Array]


def dense_init(key: Array, channels: int, width: int, *, bias: bool = True) -> dict[str, Array]:
    """A matrix of variance 1 / channels, and a bias of zeros."""
    kernel = jax.nn.initializers.lecun_normal()(key, (channels, width), jnp.float32)
    return {'kernel': kernel, **({'bias': jnp.zeros(width)} if bias else {})}


def dense(params: Params, x: Float[Array, '*batch channels']) -> Float[Array, '*batch width']:
    """x W + b on the last axis; b where there is one."""
    y = x @ params['kernel']
    return y + params['bias'] if 'bias' in params else y


def conv_init(key: Array, channels: int, width: int, *, bias: bool = True) -> dict[str, Array]:
    """A 3×3 kernel of variance 1 / (9 channels), and a bias of zeros."""
    kernel = jax.nn.initializers.lecun_normal()(key, (3, 3, channels, width), jnp.float32)
    return {'kernel': kernel, **({'bias': jnp.zeros(width)} if bias else {})}


def conv(params: Params, x: Float[Array, 'batch height width channels']) -> Float[Array, 'batch height width features']:
    """A 3×3 convolution that keeps the positions."""
    kernel = params['kernel']
    module = Conv(kernel.shape[-1], 3, padding=1, use_bias='bias' in params, dtype=x.dtype, parent=None)
    return module.apply({'params': params}, x)


def norm_init(width: int) -> dict[str, Array]:
    return {'scale': jnp.ones(width), 'bias': jnp.zeros(width)}


def batch_norm(
    params: Params, x: Float[Array, '*batch channels'], epsilon: float = 1e-5
) -> Float[Array, '*batch channels']:
    """(x - mean) / sqrt(variance + ε) · scale + bias over all axes but the last, by the batch at hand."""
    axes = tuple(range(x.ndim - 1))
    mean, var = jnp.mean(x, axes), jnp.var(x, axes)
    return (x - mean) * (lax.rsqrt(var + epsilon) * params['scale']) + params['bias']


def projector_init(key: Array, channels: int, width: int, *, norm: bool) -> dict[str, dict[str, Array]]:
    """A matrix to another width, and where asked for a batch normalisation after it, which makes a bias idle."""
    linear = {'linear': dense_init(key, channels, width, bias=not norm)}
    return {**linear, 'norm': norm_init(width)} if norm else linear


def project(params: Mapping[str, Params], x: Float[Array, '*batch channels']) -> Float[Array, '*batch width']:
    y = dense(params['linear'], x)
    return batch_norm(params['norm'], y) if 'norm' in params else y
