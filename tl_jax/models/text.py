"""Text encoders: a small transformer, a bag of embeddings and convolutions over words, from token ids to a vector.

Inputs: ids int32 [batch, length], 0 for padding, which changes nothing. An id of `vocabulary` or more gives NaN, so that a
tokenizer that does not fit is noticed at the first step. Endpoints: `mask` bool [batch, length] and `block1`, … [batch,
length, width], or `dense1`, … [batch, width], and `features` [batch, dim], float32. Modules: `token`, `position`, `block{i}`,
`norm`, `dense{i}`, `conv{size}`.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from tl_jax.errors import UserError
from tl_jax.models.fields import check_fields, check_heads
from tl_jax.models.layers import Conv


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)) (Xiong et al. 2020, arXiv:2002.04745)."""

    heads: int
    mlp_width: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch length width'], real: Bool[Array, 'batch length'], train: bool
    ) -> Float[Array, 'batch length width']:
        attention = nn.MultiHeadDotProductAttention(
            self.heads, dtype=self.dtype, dropout_rate=self.dropout, deterministic=not train, name='attention'
        )
        x += attention(nn.LayerNorm(dtype=self.dtype, name='norm1')(x), mask=real[:, None, None, :])
        y = nn.LayerNorm(dtype=self.dtype, name='norm2')(x)
        y = nn.Dense(self.mlp_width, dtype=self.dtype, name='mlp1')(y)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name='mlp2')(nn.gelu(y))
        return x + nn.Dropout(self.dropout, deterministic=not train)(y)


class TextTransformer(nn.Module):
    """A pre-norm transformer with learned positions and attention in both directions.

    Attributes:
      vocabulary: number of ids, padding included.
      length: the most tokens that a text may have.
      width: of the embeddings.
      depth: number of blocks.
      heads: of the attention; divides `width`.
      mlp_width: of the hidden layer of each block.
      pool: how positions become one vector: their 'mean', or the 'first' or 'last' that is no padding.
      dropout: of attention weights and of each block's output, in training.
      dtype: of the computation.
    """

    vocabulary: int = 8192
    length: int = 128
    width: int = 128
    depth: int = 2
    heads: int = 4
    mlp_width: int = 512
    pool: Literal['mean', 'first', 'last'] = 'mean'
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, sizes=('vocabulary', 'length', 'width', 'depth', 'mlp_width'), rates=('dropout',))
        check_heads(self.heads, self.width)

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths from input to output."""
        return 'token/.*|position', *(f'block{i}/.*' for i in range(1, self.depth + 1)), 'norm/.*'

    @nn.compact
    def __call__(self, tokens: Int[Array, 'batch length'], train: bool = False) -> dict[str, Array]:
        if tokens.shape[1] > self.length:
            raise UserError(f'model.length: texts have {tokens.shape[1]} tokens; raise it from {self.length}')
        real = tokens != 0
        position = self.param('position', nn.initializers.normal(0.01), (self.length, self.width), jnp.float32)
        x = _embed(self.vocabulary, self.width, self.dtype)(tokens) + position[: tokens.shape[1]].astype(self.dtype)
        endpoints = {'mask': real}
        for i in range(1, self.depth + 1):
            block = Block(self.heads, self.mlp_width, self.dropout, self.dtype, name=f'block{i}')
            x = endpoints[f'block{i}'] = block(x, real, train)
        x = nn.LayerNorm(dtype=self.dtype, name='norm')(x)
        return {**endpoints, 'features': pool_tokens(x.astype(jnp.float32), real, self.pool)}


class TextBag(nn.Module):
    """The mean of the tokens' embeddings, then dense layers with GELU, as fastText's (Joulin et al. 2016, arXiv:1607.01759).

    Attributes:
      vocabulary: number of ids, padding included.
      width: of the embeddings.
      dense: widths of the hidden layers; without any the mean itself are the features.
      dropout: share of the mean and of each hidden layer that is dropped in training.
      dtype: of the embeddings' computation.
    """

    vocabulary: int = 8192
    width: int = 256
    dense: Sequence[int] = (256,)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, sizes=('vocabulary', 'width', 'dense'), rates=('dropout',))

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths from input to output."""
        return 'token/.*', *(f'dense{i}/.*' for i in range(1, len(self.dense) + 1))

    @nn.compact
    def __call__(self, tokens: Int[Array, 'batch length'], train: bool = False) -> dict[str, Array]:
        x = _embed(self.vocabulary, self.width, self.dtype)(tokens)
        x = pool_tokens(x.astype(jnp.float32), tokens != 0, 'mean')
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        endpoints = {}
        for i, width in enumerate(self.dense, start=1):
            x = nn.gelu(nn.Dense(width, name=f'dense{i}')(x))
            x = endpoints[f'dense{i}'] = nn.Dropout(self.dropout, deterministic=not train)(x)
        return {**endpoints, 'features': x}


class TextCnn(nn.Module):
    """Convolutions of several widths over the words, and the most that each filter finds (Kim 2014, arXiv:1408.5882, sec. 2).

    A filter of width w also sees windows that reach w − 1 words beyond either end, but none of padding alone, so that padding
    changes nothing. The paper's dropout is the head's: `head=dict(name='linear', dropout=0.5)`.

    Attributes:
      vocabulary: number of ids, padding included.
      width: of the embeddings, which start as U(-0.25, 0.25).
      kernel_sizes: words that a filter sees.
      filters: of each of them.
      dtype: of the convolutions.
    """

    vocabulary: int = 8192
    width: int = 300
    kernel_sizes: Sequence[int] = (3, 4, 5)
    filters: int = 100
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, sizes=('vocabulary', 'width', 'kernel_sizes', 'filters'))

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths from input to output."""
        return 'token/.*', 'conv[0-9]+/.*'

    @nn.compact
    def __call__(self, tokens: Int[Array, 'batch length'], train: bool = False) -> dict[str, Array]:
        real = (tokens != 0)[..., None]
        token = nn.Embed(self.vocabulary, self.width, embedding_init=_uniform_quarter, dtype=self.dtype, name='token')
        x = jnp.where(real, token(tokens), 0)
        endpoints = {}
        for size in self.kernel_sizes:
            conv = Conv(
                self.filters,
                (size, 1),
                padding=(size - 1, 0),
                use_bias=True,
                dtype=self.dtype,
                kernel_init=nn.initializers.lecun_normal(),
                name=f'conv{size}',
            )
            y = nn.relu(conv(x[:, :, None])[:, :, 0])
            seen = nn.max_pool(real.astype(y.dtype), (size,), padding=[(size - 1, size - 1)])
            endpoints[f'conv{size}'] = jnp.max(y * (seen > 0), 1)
        features = jnp.concatenate([endpoints[f'conv{size}'] for size in self.kernel_sizes], -1)
        return {**endpoints, 'features': features.astype(jnp.float32)}


def pool_tokens(
    x: Float[Array, 'batch length width'], real: Bool[Array, 'batch length'], pool: str
) -> Float[Array, 'batch width']:
    """The mean, first or last of the real positions; for a text without any, zeros or the vector of position 0."""
    if pool == 'mean':
        total = jnp.sum(jnp.where(real[..., None], x, 0), 1)
        return total / jnp.maximum(jnp.sum(real, 1, keepdims=True), 1)
    place = jnp.argmax(real, 1) if pool == 'first' else jnp.max(jnp.arange(x.shape[1]) * real, 1)
    return jnp.take_along_axis(x, place[:, None, None], 1)[:, 0]


def _embed(vocabulary: int, width: int, dtype: Any) -> nn.Embed:
    return nn.Embed(vocabulary, width, dtype=dtype, embedding_init=nn.initializers.normal(0.02), name='token')


def _uniform_quarter(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -0.25, 0.25)


MODELS = {'text_transformer': TextTransformer, 'text_bag': TextBag, 'text_cnn': TextCnn}
