"""Vision transformers: ViT (Dosovitskiy et al. 2020, arXiv:2010.11929) and those that differ from it by a field.

DeiT (Touvron et al. 2020, arXiv:2012.12877) with its distillation token, DeiT III (arXiv:2204.07118), DINOv2 (Oquab et al.
2023, arXiv:2304.07193) with layer scale, SwiGLU and registers (Darcet et al. 2023, arXiv:2309.16588), and the image towers of
CLIP and SigLIP (attention pooling, Zhai et al. 2021, arXiv:2106.04560).

Endpoints: `embedding`, `block1`, …, `encoded` (after the final norm, where it stands before the pool) [batch, tokens, width],
and `features`. Tokens: class, distillation, registers, then patches by row. Modules: `stem`, `embedding_norm`,
`block{i}/{norm1,attention,scale1,norm2,mlp,scale2}`, `norm`, `pooler`, `pre_logits`; parameters `cls`, `distillation`,
`registers`, `position`.

Images of any size will do: the position embeddings are those of `image_size`, resized for others (`resize_positions`).
"""

import functools
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.models.fields import check_activation, check_fields, check_heads
from tl_jax.models.transformer import INIT, Attention, Dense, DropPath, GatedMlp, LayerNorm, Mlp, outer_dtype


class VisionTransformer(nn.Module):
    """Patches to tokens, pre-norm transformer blocks, and a pool.

    Attributes:
      width: of a token.
      depth: blocks.
      heads: of attention.
      patch_size: pixels, side of a patch; rows and columns of pixels that fill no patch are left out.
      image_size: pixels, side or (height, width), for which there are position embeddings.
      mlp_width: of the hidden layer; 4 · width unless given.
      mlp: 'mlp', or 'swiglu', `dense2(silu(gate(x)) · dense1(x))`.
      activation: of the MLP.
      use_cls: whether there is a class token.
      distilled: whether there is a distillation token, too; `features` are then both tokens [batch, 2 · width], and beside
        `logits`, the mean of both heads, there are `class_logits` and `distillation_logits`.
      num_registers: further tokens, without a position.
      embed_prefix: whether class and distillation token have position embeddings.
      antialias: of their resizing, as `resize_positions` has it.
      pool: 'token' is the class token, 'mean' that of the patches, 'token_mean' both side by side, 'map' attention pooling.
      norm_pre: whether the embeddings are normalised.
      final_norm: before the pool, after it, or not at all.
      patch_bias: whether the stem has a bias.
      qkv_bias: whether query, key and value have one.
      epsilon: of the norms.
      layer_scale: what the scale of each branch starts from; None for no scales.
      representation_size: width of a dense layer with tanh after the pool (`pre_logits`); None for no such layer.
      dropout: of embeddings and branches.
      drop_path: rate at the last block; from 0 at the first it grows linearly.
      dtype: of the computation.
    """

    width: int
    depth: int
    heads: int
    patch_size: int = 16
    image_size: int | tuple[int, int] = 224
    mlp_width: int | None = None
    mlp: Literal['mlp', 'swiglu'] = 'mlp'
    activation: str = 'gelu'
    use_cls: bool = True
    distilled: bool = False
    num_registers: int = 0
    embed_prefix: bool = True
    antialias: bool = True
    pool: Literal['token', 'mean', 'token_mean', 'map'] = 'token'
    norm_pre: bool = False
    final_norm: Literal['before_pool', 'after_pool', 'none'] = 'before_pool'
    patch_bias: bool = True
    qkv_bias: bool = True
    epsilon: float = 1e-6
    layer_scale: float | None = None
    representation_size: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        sizes = ('width', 'depth', 'patch_size', 'image_size', 'mlp_width', 'representation_size')
        check_fields(self, sizes=sizes, counts=('num_registers',), rates=('dropout', 'drop_path'))
        check_heads(self.heads, self.width)
        check_activation(self.activation)
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise UserError(f'model.image_size: {list(self.image_size)} is neither a side nor (height, width)')
        if not self.use_cls and (self.distilled or 'token' in self.pool):
            raise UserError("model.use_cls: without a class token give model.pool='mean' or 'map', and no distilled")
        if self.distilled and self.pool != 'token':
            raise UserError(
                f"model.pool: {self.pool!r} leaves out the distillation token; a distilled model has 'token'"
            )
        if min(self.grid) < 1:
            raise UserError(
                f'model.image_size: {self.image_size} is less than a patch of {self.patch_size} pixels; '
                'give a larger image_size or a smaller patch_size'
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that have position embeddings."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def embedded_prefix(self) -> int:
        """Tokens before the patches that have position embeddings."""
        return self.embed_prefix * (self.use_cls + self.distilled)

    @property
    def head_kind(self) -> str:
        """The head that fits `features`, of `heads.HEADS`."""
        return 'distilled' if self.distilled else 'linear'

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of the parameters' paths from input to output; every path matches exactly one."""
        blocks = (f'block{i}/.*' for i in range(1, self.depth + 1))
        first = '((stem|embedding_norm)/.*|cls|distillation|registers|position)'
        last = (
            ('norm', self.final_norm != 'none'),
            ('pooler', self.pool == 'map'),
            ('pre_logits', self.representation_size is not None),
        )
        last = '|'.join(name for name, present in last if present)
        return (first, *blocks, *([f'({last})/.*'] if last else []))

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        patches = Patches(self.width, self.patch_size, self.patch_bias, self.dtype, name='stem')(image)
        x = nn.Dropout(self.dropout, deterministic=not train)(self._embed(patches))
        if self.norm_pre:
            x = LayerNorm(self.epsilon, dtype=self.dtype, name='embedding_norm')(x)
        endpoints = {'embedding': x}
        for i in range(1, self.depth + 1):
            x = Block(
                heads=self.heads,
                mlp_width=self.mlp_width or 4 * self.width,
                gated=self.mlp == 'swiglu',
                activation=self.activation,
                qkv_bias=self.qkv_bias,
                epsilon=self.epsilon,
                layer_scale=self.layer_scale,
                dropout=self.dropout,
                drop_path=self.drop_path * (i - 1) / max(self.depth - 1, 1),
                dtype=self.dtype,
                name=f'block{i}',
            )(x, train)
            endpoints[f'block{i}'] = x
        if self.final_norm == 'before_pool':
            x = LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x)
            endpoints['encoded'] = x
        return endpoints | {'features': self._features(x)}

    def _embed(self, patches: Float[Array, 'batch rows columns width']) -> Float[Array, 'batch tokens width']:
        """Patches with their positions, after the prefix tokens."""
        batch, *grid, width = patches.shape
        own = self.embedded_prefix
        position = self.param('position', INIT, (own + math.prod(self.grid), width), jnp.float32)
        if tuple(grid) != self.grid:
            position = resize_positions(position, grid, own, self.grid, self.antialias)
        tokens = [
            self.param(name, nn.initializers.normal(1e-6), (width,), jnp.float32)[None]
            for name, present in (('cls', self.use_cls), ('distillation', self.distilled))
            if present
        ]
        if own:
            tokens = [jnp.concatenate(tokens) + position[:own]]
        if self.num_registers:
            init = nn.initializers.normal(1e-6)
            tokens.append(self.param('registers', init, (self.num_registers, width), jnp.float32))
        x = patches.reshape(batch, -1, width) + position[own:].astype(patches.dtype)
        if not tokens:
            return x
        prefix = jnp.concatenate(tokens).astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(prefix, (batch, *prefix.shape)), x], 1)

    def _features(self, x: Float[Array, 'batch tokens width']) -> Float[Array, 'batch features']:
        patches = x[:, self.use_cls + self.distilled + self.num_registers :]
        if self.pool == 'map':
            mlp_width = self.mlp_width or 4 * self.width
            pooler = AttentionPool(self.heads, mlp_width, self.activation, self.epsilon, self.dtype, name='pooler')
            x = pooler(patches)
        else:
            tokens = [x[:, i] for i in range(1 + self.distilled)] if 'token' in self.pool else []
            means = [jnp.mean(patches, 1, dtype=jnp.float32)] if 'mean' in self.pool else []
            x = jnp.concatenate([*tokens, *means], -1)
        if self.final_norm == 'after_pool':
            x = LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x)
        if self.representation_size:
            x = jnp.tanh(Dense(self.representation_size, dtype=self.dtype, name='pre_logits')(x))
        return x.astype(jnp.float32)


class Patches(nn.Module):
    """A convolution whose stride is its size, as one matrix product: XLA's is several times slower on CPU.

    Its parameters are a convolution's: `kernel` [rows, columns, channels, features] and `bias`.
    """

    features: int
    size: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, image: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch rows columns features']:
        batch, height, width, channels = image.shape
        size, rows, columns = self.size, height // self.size, width // self.size
        if min(rows, columns) < 1:
            raise UserError(f'model: an image of {height} × {width} has no patch of {size} pixels; use larger images')
        init = nn.initializers.lecun_normal()
        kernel = self.param('kernel', init, (size, size, channels, self.features), jnp.float32)
        outer = outer_dtype(self.dtype)
        x = image[:, : rows * size, : columns * size].astype(self.dtype)
        x = x.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch * rows * columns, size * size * channels)
        y = jnp.matmul(x, kernel.reshape(-1, self.features).astype(self.dtype), preferred_element_type=outer)
        if self.use_bias:
            y += self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32).astype(outer)
        return y.reshape(batch, rows, columns, self.features)


class Block(nn.Module):
    """`x + scale1 · attention(norm1(x))`, then `x + scale2 · mlp(norm2(x))`."""

    heads: int
    mlp_width: int
    gated: bool
    activation: str
    qkv_bias: bool
    epsilon: float
    layer_scale: float | None
    dropout: float
    drop_path: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch tokens width'], train: bool, mask: Array | None = None
    ) -> Float[Array, 'batch tokens width']:
        norm = functools.partial(LayerNorm, self.epsilon, dtype=self.dtype)
        attention = Attention(self.heads, use_bias=self.qkv_bias, dtype=self.dtype, name='attention')
        x += self._branch(attention(norm(name='norm1')(x), mask=mask, train=train), 1, train)
        if self.gated:
            mlp = GatedMlp(self.mlp_width, 'silu', True, self.dropout, self.dtype, name='mlp')
        else:
            mlp = Mlp(self.mlp_width, self.activation, dropout=self.dropout, dtype=self.dtype, name='mlp')
        return x + self._branch(mlp(norm(name='norm2')(x), train), 2, train)

    def _branch(self, y: Array, number: int, train: bool) -> Array:
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        if self.layer_scale is not None:
            y = LayerScale(self.layer_scale, name=f'scale{number}')(y)
        return DropPath(self.drop_path)(y, train)


class LayerScale(nn.Module):
    """`gamma · x`, a factor a channel (Touvron et al. 2021, arXiv:2103.17239)."""

    start: float

    @nn.compact
    def __call__(self, x: Float[Array, '*batch width']) -> Float[Array, '*batch width']:
        gamma = self.param('gamma', nn.initializers.constant(self.start), x.shape[-1:], jnp.float32)
        return x * gamma.astype(x.dtype)


class AttentionPool(nn.Module):
    """A learned query attends to the tokens: `y = attention(probe, x)`, then `y + mlp(norm(y))`."""

    heads: int
    mlp_width: int
    activation: str
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, 'batch tokens width']) -> Float[Array, 'batch width']:
        probe = self.param('probe', nn.initializers.xavier_uniform(), (1, x.shape[-1]), jnp.float32)
        probe = jnp.broadcast_to(probe.astype(x.dtype), (len(x), *probe.shape))
        y = Attention(self.heads, dtype=self.dtype, name='attention')(probe, x)
        normed = LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(y)
        return (y + Mlp(self.mlp_width, self.activation, dtype=self.dtype, name='mlp')(normed))[:, 0]


def resize_positions(
    position: Float[Array, 'tokens width'],
    grid: tuple[int, int],
    prefix_tokens: int = 1,
    old_grid: tuple[int, int] | None = None,
    antialias: bool = True,
) -> Float[Array, 'new_tokens width']:
    """Resamples position embeddings to another grid of patches, bicubically.

    Args:
      position: of the prefix tokens, which stay as they are, and then of the patches by row.
      grid: rows and columns wanted.
      prefix_tokens: how many of the positions are of no patch.
      old_grid: rows and columns that there are; a square unless given.
      antialias: as torch's `interpolate(mode='bicubic', antialias=…)`: with it, which timm and DINOv2 with registers have,
        the cubic's parameter is -0.5 and it widens where the grid shrinks; without, -0.75, as Hugging Face's others have.

    Raises:
      ValueError: the patches' positions form no square, and `old_grid` is not given.
    """
    count = len(position) - prefix_tokens
    if old_grid is None:
        old_grid = (math.isqrt(max(count, 0)),) * 2
        if count < 1 or math.prod(old_grid) != count:
            raise ValueError(
                f'{len(position)} positions less {prefix_tokens} of prefix tokens are no square of patches'
            )
    rows, columns = (_bicubic(old, new, antialias) for old, new in zip(old_grid, grid, strict=True))
    patches = position[prefix_tokens:].reshape(*old_grid, -1)
    patches = jnp.einsum('ri,cj,ijd->rcd', rows, columns, patches, precision='highest')
    return jnp.concatenate([position[:prefix_tokens], patches.reshape(math.prod(grid), -1)])


def _bicubic(old: int, new: int, antialias: bool) -> np.ndarray:
    """The matrix [new, old] that resamples a line (Keys 1981, doi:10.1109/TASSP.1981.1163711), edges as torch has them."""
    scale = old / new
    cubic, stretch = (-0.5, max(scale, 1)) if antialias else (-0.75, 1)
    centre = scale * (np.arange(new) + 0.5) - 0.5
    # With antialias what lies outside counts for nothing, and without for as much as the edge.
    taps = np.arange(old) if antialias else np.arange(-2, old + 2)
    d = np.abs(taps - centre[:, None]) / stretch
    near, far = ((cubic + 2) * d - (cubic + 3)) * d**2 + 1, cubic * (((d - 5) * d + 8) * d - 4)
    weights = np.where(d < 1, near, np.where(d < 2, far, 0))
    matrix = np.zeros((new, old))
    np.add.at(matrix, (slice(None), np.clip(taps, 0, old - 1)), weights)
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


_SIZES = {  # width, depth, heads
    'tiny': (192, 12, 3),
    'small': (384, 12, 6),
    'medium': (512, 12, 8),
    'base': (768, 12, 12),
    'large': (1024, 24, 16),
    'huge': (1280, 32, 16),
    'giant': (1536, 40, 24),
}


def _vit(size: str, patch_size: int, **fields: Any):
    width, depth, heads = _SIZES[size]
    return functools.partial(VisionTransformer, width=width, depth=depth, heads=heads, patch_size=patch_size, **fields)


def _dinov2(size: str, **fields: Any):
    if size == 'giant':
        fields |= dict(mlp='swiglu', mlp_width=4096)
    return _vit(size, 14, image_size=518, layer_scale=1e-5, **fields)


_PATCHES = {'tiny': (16,), 'small': (8, 16, 32), 'base': (8, 16, 32), 'large': (14, 16, 32), 'huge': (14,)}
_DEIT3 = dict(embed_prefix=False, layer_scale=1e-6)

MODELS = {
    **{f'vit_{size}_patch{p}': _vit(size, p) for size, patches in _PATCHES.items() for p in patches},
    **{f'deit_{size}_patch16': _vit(size, 16) for size in ('tiny', 'small', 'base')},
    **{f'deit_{size}_distilled_patch16': _vit(size, 16, distilled=True) for size in ('tiny', 'small', 'base')},
    **{f'deit3_{size}_patch16': _vit(size, 16, **_DEIT3) for size in ('small', 'medium', 'base', 'large')},
    'deit3_huge_patch14': _vit('huge', 14, **_DEIT3),
    **{f'dinov2_{size}': _dinov2(size) for size in ('small', 'base', 'large', 'giant')},
    **{f'dinov2_{size}_reg': _dinov2(size, num_registers=4) for size in ('small', 'base', 'large', 'giant')},
}
