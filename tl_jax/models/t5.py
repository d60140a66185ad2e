"""T5 (Raffel et al. 2019, arXiv:1910.10683), versions 1.0 and 1.1, and Flan-T5: an encoder and a decoder that looks at it.

Inputs: tokens int32 [batch, length] of the encoder, or `{'tokens', 'mask', 'decoder_tokens', 'decoder_mask'}`; masks are true
where a token is no padding; the decoder reads `start_id` alone unless `decoder_tokens` are given (those that it has to
write, after `start_id`). Endpoints: `encoder_block1`, …, and `encoder` [batch, length, width] after its last norm,
`features` [batch, width], float32, the mean of that over real tokens; `decoder_block1`, …, and `hidden` [batch, decoder
length, width] after the last norm, `lm_logits` [batch, decoder length, vocabulary], float32, of each next token; with a
cache (see generate.py) those of the last token alone, and later calls give `decoder_tokens` without `tokens`.
Modules: `token`, `encoder` and `decoder`: `relative`, `block{i}/{norm1,attention/{query,key,value,out},…,mlp}`, `norm`; a
decoder's block has `norm2`, `cross` and `norm3`; `lm_head` where `output` is 'dense'.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from tl_jax.errors import UserError
from tl_jax.models.fields import check_activation, check_fields
from tl_jax.models.generate import CachedAttention, place, read_inputs, real_tokens, token_logits
from tl_jax.models.text import pool_tokens
from tl_jax.models.transformer import Dense, GatedMlp, Mlp, RMSNorm, attend, outer_dtype


class T5(nn.Module):
    """One table of embeddings, an encoder, a decoder, and logits.

    Attributes:
      vocabulary: number of token ids.
      width: of the embeddings.
      depth: blocks of the encoder; `decoder_depth`, of the decoder, as many unless given.
      heads: of every attention.
      head_dim: width of a head.
      mlp_width: of the hidden layer of each block.
      gated: whether that layer has a gate (version 1.1).
      activation: of it, of `transformer.ACTIVATIONS`.
      buckets: of relative positions, each with its bias for each head.
      max_distance: tokens beyond which distances are alike.
      output: 'tied', logits by the table of the embeddings, scaled by 1 / √width; 'dense', by a layer of its own.
      epsilon: of the norms.
      start_id: the token that the decoder begins with.
      pad_id: the encoder's tokens that are this are padding where no mask is given; None: none are.
      dropout: of embeddings, attention weights, hidden layers and branches, in training.
      cache_length: slots to remember the decoder's tokens in, for generation; 0 for none.
      dtype: of the computation.
    """

    vocabulary: int = 32128
    width: int = 512
    depth: int = 6
    decoder_depth: int | None = None
    heads: int = 8
    head_dim: int = 64
    mlp_width: int = 2048
    gated: bool = False
    activation: str = 'relu'
    buckets: int = 32
    max_distance: int = 128
    output: Literal['tied', 'dense'] = 'tied'
    epsilon: float = 1e-6
    start_id: int = 0
    pad_id: int | None = None
    dropout: float = 0.0
    cache_length: int = 0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        sizes = ('vocabulary', 'width', 'depth', 'decoder_depth', 'heads', 'head_dim', 'mlp_width')
        check_fields(self, sizes=sizes, counts=('cache_length',), rates=('dropout',))
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise UserError(
                f'model.buckets: {self.buckets} are not a multiple of 4, or too many for a max_distance of '
                f'{self.max_distance}, which must be more than half of them'
            )
        check_activation(self.activation)

    @property
    def _decoder_depth(self) -> int:
        return self.depth if self.decoder_depth is None else self.decoder_depth

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths, from the input to the output."""
        order = ['token/.*']
        for stack, depth in (('encoder', self.depth), ('decoder', self._decoder_depth)):
            order += [
                f'{stack}/relative/.*',
                *(f'{stack}/block{i}/.*' for i in range(1, depth + 1)),
                f'{stack}/norm/.*',
            ]
        return (*order, 'lm_head/.*') if self.output == 'dense' else tuple(order)

    @nn.compact
    def __call__(
        self, inputs: Int[Array, 'batch length'] | Mapping[str, Array], train: bool = False
    ) -> dict[str, Array]:
        known = ('tokens', 'mask', 'decoder_tokens', 'decoder_mask')
        tokens, mask, decoder_tokens, decoder_mask = read_inputs(inputs, known).values()
        token = nn.Embed(
            self.vocabulary,
            self.width,
            dtype=outer_dtype(self.dtype),
            embedding_init=nn.initializers.normal(1.0),
            name='token',
        )
        drop = nn.Dropout(self.dropout, deterministic=not train)
        endpoints, encoded, real = {}, None, self._remembered_mask()
        if tokens is not None:
            real = real_tokens(tokens, mask, self.pad_id)
            slots = jnp.arange(tokens.shape[1])
            encoder = Stack(self._sizes, self.depth, name='encoder')
            encoded, blocks = encoder(drop(token(tokens)), slots[:, None] - slots, real[:, None, None], train=train)
            endpoints = {f'encoder_block{i}': x for i, x in enumerate(blocks, start=1)} | {'encoder': encoded}
            endpoints['features'] = pool_tokens(encoded.astype(jnp.float32), real, 'mean')
            if self.cache_length:
                self.put_variable('cache', 'mask', real)
        elif real is None:
            raise UserError("inputs: an encoder-decoder needs 'tokens', unless a cache remembers them")
        if decoder_tokens is None:
            decoder_tokens = jnp.full((len(real), 1), self.start_id, jnp.int32)
        written = real_tokens(decoder_tokens, decoder_mask)
        places = place(self, written, None, self.cache_length)
        decoder = Stack(self._sizes, self._decoder_depth, True, self.cache_length, name='decoder')
        hidden, blocks = decoder(
            drop(token(decoder_tokens)),
            places.distances(),
            places.mask(),
            start=places.start,
            context=encoded,
            context_mask=real[:, None, None],
            train=train,
        )
        endpoints |= {f'decoder_block{i}': x for i, x in enumerate(blocks, start=1)} | {'hidden': hidden}
        last = pool_tokens(hidden, written, 'last')[:, None] if self.cache_length else hidden
        return {**endpoints, 'lm_logits': self._logits(last, token)}

    def _logits(self, hidden: Array, token: nn.Embed) -> Array:
        if self.output == 'tied':
            return token_logits(hidden * self.width**-0.5, token.embedding, self.dtype)
        head = Dense(self.vocabulary, use_bias=False, dtype=self.dtype, name='lm_head')
        return head(hidden).astype(jnp.float32)

    def _remembered_mask(self) -> Bool[Array, 'batch length'] | None:
        return self.get_variable('cache', 'mask') if self.has_variable('cache', 'mask') else None

    @property
    def _sizes(self) -> '_Sizes':
        return _Sizes(
            self.heads,
            self.head_dim,
            self.mlp_width,
            self.gated,
            self.activation,
            self.buckets,
            self.max_distance,
            self.epsilon,
            self.dropout,
            self.dtype,
        )


class _Sizes(NamedTuple):
    """The fields of `T5` that all of its blocks share."""

    heads: int
    head_dim: int
    mlp_width: int
    gated: bool
    activation: str
    buckets: int
    max_distance: int
    epsilon: float
    dropout: float
    dtype: Any


class Stack(nn.Module):
    """Blocks that share one bias of relative positions, and a last norm; a decoder's look at `context` as well."""

    sizes: _Sizes
    depth: int
    decoder: bool = False
    cache_length: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch length width'],
        distances: Int[Array, 'length slots'],
        mask: Bool[Array, 'batch 1 _ slots'],
        *,
        start: Int[Array, ''] | int = 0,
        context: Float[Array, 'batch context width'] | None = None,
        context_mask: Bool[Array, 'batch 1 1 context'] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, 'batch length width'], list[Float[Array, 'batch length width']]]:
        sizes = self.sizes
        # Distances are of queries from keys, and a decoder's queries stand behind their keys.
        buckets = bucket(distances, sizes.buckets, sizes.max_distance, both_sides=not self.decoder)
        init = nn.initializers.normal(x.shape[-1] ** -0.5)
        relative = nn.Embed(sizes.buckets, sizes.heads, embedding_init=init, name='relative')
        bias = jnp.transpose(relative(buckets), (2, 0, 1))
        blocks = []
        for i in range(1, self.depth + 1):
            block = Block(sizes, self.decoder, self.cache_length, name=f'block{i}')
            x = block(x, start, mask, bias, context, context_mask, train)
            blocks.append(x)
        x = RMSNorm(sizes.epsilon, sizes.dtype, name='norm')(x)
        return nn.Dropout(sizes.dropout, deterministic=not train)(x), blocks


class Block(nn.Module):
    """x + attention(norm1(x)); in a decoder + cross(norm2(x), context); then + mlp(last norm(x))."""

    sizes: _Sizes
    decoder: bool
    cache_length: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch length width'],
        start: Int[Array, ''] | int,
        mask: Array,
        bias: Float[Array, 'heads length slots'],
        context: Float[Array, 'batch context width'] | None,
        context_mask: Array | None,
        train: bool,
    ) -> Float[Array, 'batch length width']:
        sizes = self.sizes
        drop = nn.Dropout(sizes.dropout, deterministic=not train)
        norm = functools.partial(RMSNorm, sizes.epsilon, sizes.dtype)
        attention = CachedAttention(
            sizes.heads,
            head_dim=sizes.head_dim,
            use_bias=False,
            out_bias=False,
            scale=1.0,
            dropout=sizes.dropout,
            cache_length=self.cache_length,
            dtype=sizes.dtype,
            name='attention',
        )
        x += drop(attention(norm(name='norm1')(x), start, mask=mask, bias=bias, train=train))
        if self.decoder:
            cross = CrossAttention(
                sizes.heads, sizes.head_dim, sizes.dropout, self.cache_length > 0, sizes.dtype, name='cross'
            )
            x += drop(cross(norm(name='norm2')(x), context, context_mask, train))
        kind = GatedMlp if sizes.gated else Mlp
        mlp = kind(
            sizes.mlp_width, sizes.activation, use_bias=False, dropout=sizes.dropout, dtype=sizes.dtype, name='mlp'
        )
        return x + drop(mlp(norm(name='norm3' if self.decoder else 'norm2')(x), train))


class CrossAttention(nn.Module):
    """Attention to `context`, or where that is None to the one remembered. Modules: `query`, `key`, `value`, `out`."""

    heads: int
    head_dim: int
    dropout: float
    remember: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch length width'], context: Array | None, mask: Array, train: bool
    ) -> Float[Array, 'batch length width']:
        def heads(name, inputs):
            y = Dense(self.heads * self.head_dim, False, self.dtype, name=name)(inputs)
            return y.reshape(*inputs.shape[:2], self.heads, self.head_dim)

        query = heads('query', x)
        if context is None:
            key, value = self.get_variable('cache', 'keys'), self.get_variable('cache', 'values')
        else:
            key, value = heads('key', context), heads('value', context)
            if self.remember:
                self.put_variable('cache', 'keys', key)
                self.put_variable('cache', 'values', value)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = attend(query, key, value, mask=mask, scale=1.0, drop=drop, dtype=self.dtype)
        return Dense(x.shape[-1], False, self.dtype, name='out')(y.reshape(*x.shape[:2], -1))


def bucket(distances: Int[Array, '*shape'], buckets: int, max_distance: int, both_sides: bool) -> Int[Array, '*shape']:
    """The bucket of how far a query stands behind a key: one a token at first, ever wider ones up to `max_distance`.

    With `both_sides` the second half of the buckets is for keys behind the query; else those are taken for distance 0.
    """
    offset = 0
    if both_sides:
        buckets //= 2
        offset = jnp.where(distances < 0, buckets, 0)
        distances = jnp.abs(distances)
    exact = buckets // 2
    # A table, in the float32 of the original: the edges of the wide buckets depend on how a logarithm is rounded.
    far = np.log(np.arange(1, max_distance + 1, dtype=np.float32) / exact)
    far = exact + (far / np.float32(math.log(max_distance / exact)) * (buckets - exact)).astype(np.int32)
    near = np.arange(max_distance + 1)
    table = np.where(near < exact, near, np.minimum(np.append(0, far), buckets - 1))
    return offset + jnp.asarray(table, jnp.int32)[jnp.clip(distances, 0, max_distance)]


_V1_1 = functools.partial(T5, gated=True, activation='gelu_tanh', output='dense')
MODELS = {
    't5_small': T5,
    't5_base': functools.partial(T5, width=768, depth=12, heads=12, mlp_width=3072),
    't5_large': functools.partial(T5, width=1024, depth=24, heads=16, mlp_width=4096),
    't5_v1_1_small': functools.partial(_V1_1, depth=8, heads=6, mlp_width=1024),
    't5_v1_1_base': functools.partial(_V1_1, width=768, depth=12, heads=12),
}
