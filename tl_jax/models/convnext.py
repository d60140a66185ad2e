"""ConvNeXt (Liu et al. 2022, arXiv:2201.03545) and, with `grn`, ConvNeXt V2 (Woo et al. 2023, arXiv:2301.00808).

Endpoints: `stem`, `stage1`, `stage2`, … [batch, height, width, channels], and `features` [batch, channels]: the mean over
positions of the last stage, and its norm. Modules: `stem/{conv,norm}` or `stem/{conv1,conv2,norm}`,
`stage{i}/{downsample_norm,downsample_conv}` of all stages but the first,
`stage{i}/block{j}/{depthwise,norm,dense1,grn,dense2}` and the parameter `gamma`, `norm`, `hidden`.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.models.fields import check_activation, check_fields, check_stages
from tl_jax.models.layers import Conv
from tl_jax.models.transformer import ACTIVATIONS, INIT, Dense, DropPath, LayerNorm, drop_rates, outer_dtype


class ConvNeXt(nn.Module):
    """A stem of stride 4, stages of depthwise convolutions and position-wise MLPs, the mean over positions and its norm.

    Attributes:
      stage_sizes: blocks in each stage; every stage but the first halves the map.
      widths: channels of each stage.
      kernel_size: of the depthwise convolutions.
      stem: 'patch' is a 4×4 of stride 4; 'overlap' two 3×3 of stride 2; in 'tiered' the first has half the channels.
      grn: whether the MLPs normalise their responses over positions, as V2 does.
      layer_scale: what `gamma`, by which a block's output is multiplied, starts from; 0 for no gamma, as in V2.
      norm_first: whether the last norm comes before the mean over positions.
      hidden: width of a dense layer with gelu after the last norm; 0 for none.
      activation: of the MLPs.
      epsilon: of the norms.
      last_epsilon: of the last norm; Hugging Face has 1e-12 there.
      conv_mlp: whether timm keeps the MLPs' kernels as 1×1 convolutions: what it writes differs, what it computes does not.
      drop_path: rate of stochastic depth in the last block, from 0 in the first.
      dtype: of the computation.
    """

    stage_sizes: Sequence[int]
    widths: Sequence[int]
    kernel_size: int = 7
    stem: Literal['patch', 'overlap', 'tiered'] = 'patch'
    grn: bool = False
    layer_scale: float = 1e-6
    norm_first: bool = False
    hidden: int = 0
    activation: str = 'gelu'
    epsilon: float = 1e-6
    last_epsilon: float = 1e-6
    conv_mlp: bool = False
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_stages(self.stage_sizes, self.widths)
        check_fields(self, sizes=('widths', 'kernel_size'), counts=('hidden',), rates=('drop_path',))
        check_activation(self.activation)
        if self.kernel_size % 2 == 0:
            raise UserError(f'model.kernel_size: {self.kernel_size} is even and would shrink the map; give an odd one')

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of paths below this module, from the input on."""
        order = ['stem/.*']
        for i, size in enumerate(self.stage_sizes, start=1):
            order += [f'stage{i}/downsample_.*'] if i > 1 else []
            order += [f'stage{i}/block{j}/.*' for j in range(1, size + 1)]
        return (*order, 'norm/.*', *(['hidden/.*'] if self.hidden else []))

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        x = Stem(self.stem, self.widths[0], self.epsilon, self.dtype, name='stem')(image)
        endpoints = {'stem': x}
        block = functools.partial(
            Block,
            kernel_size=self.kernel_size,
            grn=self.grn,
            layer_scale=self.layer_scale,
            activation=self.activation,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        rates = drop_rates(self.stage_sizes, self.drop_path)
        for i, (width, drops) in enumerate(zip(self.widths, rates, strict=True), start=1):
            x = Stage(block, width, i > 1, drops, self.epsilon, self.dtype, name=f'stage{i}')(x, train)
            endpoints[f'stage{i}'] = x
        norm = LayerNorm(self.last_epsilon, name='norm')
        mean = functools.partial(jnp.mean, axis=(1, 2), dtype=jnp.float32)
        x = mean(norm(x)) if self.norm_first else norm(mean(x))
        if self.hidden:
            x = ACTIVATIONS['gelu'](Dense(self.hidden, dtype=self.dtype, name='hidden')(x))
        return {**endpoints, 'features': x.astype(jnp.float32)}


class Stem(nn.Module):
    """The image in patches of 4×4, or by two convolutions, and normalised."""

    kind: str
    width: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, image: Array) -> Array:
        conv = functools.partial(Conv, use_bias=True, dtype=self.dtype, kernel_init=INIT)
        if self.kind == 'patch':
            x = conv(self.width, 4, 4, name='conv')(image)
        else:
            # The half is rounded to eights, timm's rule, but not down by more than a tenth.
            half = max(8, (self.width // 2 + 4) // 8 * 8)
            half += 8 if half < 0.9 * (self.width // 2) else 0
            x = conv(half if self.kind == 'tiered' else self.width, 3, 2, 1, name='conv1')(image)
            x = conv(self.width, 3, 2, 1, name='conv2')(x)
        return LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x)


class Stage(nn.Module):
    """A norm and a 2×2 convolution of stride 2 where the map is to be halved, then a block for each rate of `drops`."""

    block: Any
    width: int
    halve: bool
    drops: tuple[float, ...]
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if self.halve:
            x = LayerNorm(self.epsilon, dtype=self.dtype, name='downsample_norm')(x)
            conv = Conv(self.width, 2, 2, use_bias=True, dtype=self.dtype, kernel_init=INIT, name='downsample_conv')
            x = conv(x)
        for j, drop in enumerate(self.drops, start=1):
            x = self.block(drop=drop, name=f'block{j}')(x, train)
        return x


class Block(nn.Module):
    """`x + gamma · dense2(grn(gelu(dense1(norm(depthwise(x))))))`."""

    kernel_size: int
    grn: bool
    layer_scale: float
    activation: str
    epsilon: float
    dtype: Any
    drop: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        width, size = x.shape[-1], self.kernel_size
        conv = functools.partial(Conv, groups=width, use_bias=True, dtype=self.dtype, kernel_init=INIT)
        y = conv(width, size, 1, size // 2, name='depthwise')(x)
        y = LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(y)
        y = ACTIVATIONS[self.activation](Dense(4 * width, dtype=self.dtype, name='dense1')(y))
        if self.grn:
            y = GlobalResponseNorm(self.dtype, name='grn')(y)
        y = Dense(width, dtype=self.dtype, name='dense2')(y)
        if self.layer_scale:
            gamma = self.param('gamma', nn.initializers.constant(self.layer_scale), (width,), jnp.float32)
            y *= gamma.astype(y.dtype)
        return x + DropPath(self.drop)(y, train)


class GlobalResponseNorm(nn.Module):
    """`x + scale · x · n / mean(n) + bias`, where n is a channel's Euclidean norm over positions (arXiv:2301.00808, alg. 1)."""

    dtype: Any
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, 'batch height width channels']) -> Float[Array, 'batch height width channels']:
        scale = self.param('scale', nn.initializers.zeros, x.shape[-1:], jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        squares = jnp.sum(x * x, (1, 2), keepdims=True)
        # The root has no gradient at 0, where torch's is 0.
        norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
        y = x + scale * x * (norms / (jnp.mean(norms, -1, keepdims=True) + self.epsilon)) + bias
        return y.astype(outer_dtype(self.dtype))


def _sizes(stage_sizes: Sequence[int], width: int, **fields: Any):
    """Widths double from stage to stage."""
    widths = tuple(width * 2**i for i in range(4))
    return functools.partial(ConvNeXt, stage_sizes=stage_sizes, widths=widths, **fields)


_TIMM = dict(conv_mlp=True)
_V2 = dict(grn=True, layer_scale=0.0)
_SMALL = {
    'atto': ((2, 2, 6, 2), 40),
    'femto': ((2, 2, 6, 2), 48),
    'pico': ((2, 2, 6, 2), 64),
    'nano': ((2, 2, 8, 2), 80),
}
_LARGE = {
    'tiny': ((3, 3, 9, 3), 96),
    'small': ((3, 3, 27, 3), 96),
    'base': ((3, 3, 27, 3), 128),
    'large': ((3, 3, 27, 3), 192),
}

MODELS = {
    **{f'convnext_{name}': _sizes(*size, **_TIMM) for name, size in _SMALL.items()},
    **{f'convnext_{name}_ols': _sizes(*_SMALL[name], stem='tiered', **_TIMM) for name in ('atto', 'femto', 'pico')},
    'convnext_nano_ols': _sizes(*_SMALL['nano'], stem='overlap', **_TIMM),
    'convnext_tiny_hnf': _sizes(*_LARGE['tiny'], norm_first=True, **_TIMM),
    **{f'convnext_{name}': _sizes(*size) for name, size in _LARGE.items()},
    'convnext_large_mlp': _sizes(*_LARGE['large'], hidden=1536),
    'convnext_xlarge': _sizes((3, 3, 27, 3), 256),
    'convnext_xxlarge': _sizes((3, 4, 30, 3), 384, epsilon=1e-5, last_epsilon=1e-5),
    **{f'convnextv2_{name}': _sizes(*size, **_TIMM, **_V2) for name, size in _SMALL.items()},
    **{f'convnextv2_{name}': _sizes(*size, **_V2) for name, size in _LARGE.items()},
    'convnextv2_huge': _sizes((3, 3, 27, 3), 352, **_V2),
}
