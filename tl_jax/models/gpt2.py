"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): a causal pre-norm transformer.

Inputs: tokens int32 [batch, length], or `{'tokens', 'mask', 'positions'}`: `mask` [batch, length] is true where a token is
no padding, which may stand on either side; `positions` count the real tokens unless given. Endpoints: `block1`, …, and
`hidden` [batch, length, width] after the last norm, `features` [batch, width], float32, its last real token, and
`lm_logits` [batch, length, vocabulary], float32, of each next token, by the table of the embeddings; with a cache
(see generate.py) those of the last real token alone, [batch, 1, vocabulary].
Modules: `token`, `position`, `block{i}/{norm1,attention/{query,key,value,out},norm2,mlp/{dense1,dense2}}`, `norm`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from tl_jax.errors import UserError
from tl_jax.models.fields import check_activation, check_fields, check_heads
from tl_jax.models.generate import CachedAttention, Places, place, read_inputs, real_tokens, token_logits
from tl_jax.models.text import pool_tokens
from tl_jax.models.transformer import LayerNorm, Mlp, outer_dtype


class GPT2(nn.Module):
    """Embeddings of tokens and positions, pre-norm blocks, a last norm, logits by the table of the tokens.

    Attributes:
      vocabulary: number of token ids.
      length: the most tokens that a text may have.
      width: of the embeddings.
      depth: number of blocks.
      heads: of the attention; divides `width`.
      mlp_width: of the hidden layer of each block; 4 · width unless given.
      activation: of that layer, of `transformer.ACTIVATIONS`.
      epsilon: of the norms.
      dropout: of the embeddings, attention weights and both branches of a block, in training.
      pad_id: tokens that are this are padding where no mask is given; None: none are.
      cache_length: slots to remember tokens in, for generation; 0 for none.
      dtype: of the computation.
    """

    vocabulary: int = 50257
    length: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int | None = None
    activation: str = 'gelu_tanh'
    epsilon: float = 1e-5
    dropout: float = 0.0
    pad_id: int | None = None
    cache_length: int = 0
    dtype: Any = jnp.float32

    # Of `create_model`: the origin's classification head has no bias.
    head_kind = 'unbiased'

    def __post_init__(self):
        super().__post_init__()
        sizes = ('vocabulary', 'length', 'width', 'depth', 'mlp_width')
        check_fields(self, sizes=sizes, counts=('cache_length',), rates=('dropout',))
        check_heads(self.heads, self.width)
        check_activation(self.activation)

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths, from the input to the output."""
        return ('(token|position)/.*', *(f'block{i}/.*' for i in range(1, self.depth + 1)), 'norm/.*')

    @nn.compact
    def __call__(
        self, inputs: Int[Array, 'batch length'] | Mapping[str, Array], train: bool = False
    ) -> dict[str, Array]:
        tokens, mask, positions = read_inputs(inputs, ('tokens', 'mask', 'positions')).values()
        self._check_length(tokens)
        real = real_tokens(tokens, mask, self.pad_id)
        places = place(self, real, positions, self.cache_length)
        token, position = (
            nn.Embed(number, self.width, dtype=outer_dtype(self.dtype), embedding_init=_INIT, name=name)
            for number, name in ((self.vocabulary, 'token'), (self.length, 'position'))
        )
        x = token(tokens) + position(places.positions)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        endpoints = {}
        for i in range(1, self.depth + 1):
            block = Block(
                self.heads,
                self.mlp_width or 4 * self.width,
                self.activation,
                self.epsilon,
                self.dropout,
                self.cache_length,
                self.dtype,
                name=f'block{i}',
            )
            x = endpoints[f'block{i}'] = block(x, places, train)
        x = endpoints['hidden'] = LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x)
        features = pool_tokens(x.astype(jnp.float32), real, 'last')
        last = features[:, None] if self.cache_length else x
        return {
            **endpoints,
            'features': features,
            'lm_logits': token_logits(last, token.embedding, self.dtype),
        }

    def _check_length(self, tokens: Array) -> None:
        if max(tokens.shape[1], self.cache_length) > self.length:
            raise UserError(
                f'model.length: texts of {max(tokens.shape[1], self.cache_length)} tokens have no position embeddings '
                f'beyond {self.length}; shorten them'
            )


_INIT = nn.initializers.normal(0.02)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    heads: int
    mlp_width: int
    activation: str
    epsilon: float
    dropout: float
    cache_length: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch length width'], places: Places, train: bool
    ) -> Float[Array, 'batch length width']:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = CachedAttention(
            self.heads, dropout=self.dropout, cache_length=self.cache_length, dtype=self.dtype, name='attention'
        )
        y = LayerNorm(self.epsilon, dtype=self.dtype, name='norm1')(x)
        x += drop(attention(y, places.start, mask=places.mask(), train=train))
        y = LayerNorm(self.epsilon, dtype=self.dtype, name='norm2')(x)
        return x + drop(Mlp(self.mlp_width, self.activation, dtype=self.dtype, name='mlp')(y))


MODELS = {
    'gpt2': GPT2,
    'gpt2_medium': functools.partial(GPT2, width=1024, depth=24, heads=16),
    'gpt2_large': functools.partial(GPT2, width=1280, depth=36, heads=20),
    'gpt2_xl': functools.partial(GPT2, width=1600, depth=48, heads=25),
    'distilgpt2': functools.partial(GPT2, depth=6),
}
