"""Decoders of the LLaMA kind (Touvron et al. 2023, arXiv:2302.13971): RMSNorm, rotary positions, gated MLPs.

With grouped-query attention, biases, norms of queries and keys, sliding windows and soft caps by field: Llama 2 and 3, Mistral
(arXiv:2310.06825), Qwen 2 and 3, Gemma 1 and 2 (arXiv:2403.08295, 2408.00118).

Inputs: tokens int32 [batch, length], or `{'tokens', 'mask', 'positions'}`: `mask` [batch, length] is true where a token is
no padding, which may stand on either side; `positions` count the real tokens unless given. Endpoints: `block1`, …, and
`hidden` [batch, length, width] after the last norm, `features` [batch, width], float32, its last real token, and
`lm_logits` [batch, length, vocabulary], float32, of each next token; with a cache (see generate.py) those of the last real
token alone, [batch, 1, vocabulary].
Modules: `token`, `block{i}/{norm1,attention/{query,key,value,out},norm2,mlp/{gate,dense1,dense2}}`, `norm`, `lm_head` where
`output` is 'dense'; `attention/{query_norm,key_norm}` and `post_norm1`, `post_norm2` where there are such.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from tl_jax.errors import UserError
from tl_jax.models.fields import check_activation, check_fields, check_heads
from tl_jax.models.generate import CachedAttention, Places, place, read_inputs, real_tokens, token_logits
from tl_jax.models.text import pool_tokens
from tl_jax.models.transformer import INIT, Dense, GatedMlp, RMSNorm, outer_dtype


class Llama(nn.Module):
    """Embeddings, pre-norm blocks, a last norm, and logits.

    Attributes:
      vocabulary: number of token ids.
      width: of the embeddings.
      depth: number of blocks.
      heads: of the queries.
      kv_heads: of the keys and values, a divisor of `heads`, which it is unless given.
      head_dim: width of a head; width / heads unless given.
      mlp_width: of the gated hidden layer of each block.
      activation: of its gate, of `transformer.ACTIVATIONS`.
      epsilon: of the norms.
      qkv_bias: whether query, key and value have biases; `out_bias`, the attention's last layer; `mlp_bias`, the MLP's.
      qk_norm: an RMSNorm of each head's query and key (Qwen 3).
      zero_centered: the norms' factors are 1 + scale (Gemma).
      post_norms: norms behind attention and MLP as well (Gemma 2).
      scale_embeddings: by √width (Gemma).
      output: how a token's vector becomes logits: 'dense', a layer `lm_head`; 'tied', the table of the embeddings; 'none'.
      query_scale: attention scores are divided by its root, head_dim unless given (Gemma 2).
      score_cap: soft cap of the attention scores, and `logit_cap` of the logits: cap · tanh(x / cap) (Gemma 2).
      window: how many tokens back a block sees, itself included; all unless given.
      window_blocks: the blocks that have this window, counted from 1; all unless given.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: 'linear' divides every frequency by `rope_factor`; 'llama3' only those whose wavelength is long
        against `rope_length`: more than 1 / `rope_low` of it, and less of the others down to 1 / `rope_high`.
      rope_factor, rope_low, rope_high, rope_length: see there.
      dropout: of attention weights and of both branches of a block, in training.
      pad_id: tokens that are this are padding where no mask is given; None: none are.
      cache_length: slots to remember tokens in, for generation; 0 for none.
      dtype: of the computation.
    """

    vocabulary: int = 32000
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int = 11008
    activation: str = 'silu'
    epsilon: float = 1e-5
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    zero_centered: bool = False
    post_norms: bool = False
    scale_embeddings: bool = False
    output: Literal['dense', 'tied', 'none'] = 'dense'
    query_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    window: int | None = None
    window_blocks: Sequence[int] | None = None
    rope_theta: float = 10000.0
    rope_scaling: Literal['none', 'linear', 'llama3'] = 'none'
    rope_factor: float = 1.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_length: int = 8192
    dropout: float = 0.0
    pad_id: int | None = None
    cache_length: int = 0
    dtype: Any = jnp.float32

    # Of `create_model`: the origin's classification head has no bias.
    head_kind = 'unbiased'

    def __post_init__(self):
        super().__post_init__()
        sizes = ('vocabulary', 'width', 'depth', 'heads', 'kv_heads', 'head_dim', 'mlp_width', 'window', 'rope_length')
        check_fields(self, sizes=sizes, counts=('cache_length',), rates=('dropout',))
        check_activation(self.activation)
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(f'model.kv_heads: {self.kv_heads} does not divide the {self.heads} heads; choose a divisor')
        if self.head_dim is None:
            check_heads(self.heads, self.width)
        if self._dim % 2:
            raise UserError(f'model.head_dim: {self._dim} is odd, and rotary positions turn pairs')

    @property
    def _dim(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths, from the input to the output."""
        last = '(norm|lm_head)/.*' if self.output == 'dense' else 'norm/.*'
        return ('token/.*', *(f'block{i}/.*' for i in range(1, self.depth + 1)), last)

    @nn.compact
    def __call__(
        self, inputs: Int[Array, 'batch length'] | Mapping[str, Array], train: bool = False
    ) -> dict[str, Array]:
        tokens, mask, positions = read_inputs(inputs, ('tokens', 'mask', 'positions')).values()
        real = real_tokens(tokens, mask, self.pad_id)
        places = place(self, real, positions, self.cache_length)
        outer = outer_dtype(self.dtype)
        token = nn.Embed(self.vocabulary, self.width, dtype=outer, embedding_init=INIT, name='token')
        x = token(tokens)
        if self.scale_embeddings:
            x *= jnp.asarray(self.width**0.5, outer)
        rotate = rotation(places.positions, self._frequencies())
        endpoints = {}
        for i in range(1, self.depth + 1):
            windowed = self.window_blocks is None or i in self.window_blocks
            seen = places.mask(self.window if windowed else None)
            x = endpoints[f'block{i}'] = self._block(i)(x, places, seen, rotate, train)
        x = endpoints['hidden'] = RMSNorm(self.epsilon, self.dtype, self.zero_centered, name='norm')(x)
        features = pool_tokens(x.astype(jnp.float32), real, 'last')
        endpoints['features'] = features
        if self.output != 'none':
            endpoints['lm_logits'] = self._logits(features[:, None] if self.cache_length else x, token)
        return endpoints

    def _block(self, number: int) -> nn.Module:
        attention = CachedAttention(
            self.heads,
            self.kv_heads,
            self._dim,
            self.qkv_bias,
            self.out_bias,
            norm_epsilon=self.epsilon if self.qk_norm else None,
            scale=(self.query_scale or self._dim) ** -0.5,
            cap=self.score_cap,
            dropout=self.dropout,
            cache_length=self.cache_length,
            dtype=self.dtype,
            parent=None,
        )
        mlp = GatedMlp(self.mlp_width, self.activation, self.mlp_bias, dtype=self.dtype, parent=None)
        norm = functools.partial(RMSNorm, self.epsilon, self.dtype, self.zero_centered)
        return Block(attention, mlp, norm, self.post_norms, self.dropout, name=f'block{number}')

    def _logits(self, hidden: Array, token: nn.Embed) -> Array:
        if self.output == 'tied':
            logits = token_logits(hidden, token.embedding, self.dtype)
        else:
            logits = Dense(self.vocabulary, use_bias=False, dtype=self.dtype, name='lm_head')(hidden)
            logits = logits.astype(jnp.float32)
        return logits if self.logit_cap is None else self.logit_cap * jnp.tanh(logits / self.logit_cap)

    def _frequencies(self) -> Float[np.ndarray, 'half']:
        """Radians a token of each pair of a head's coordinates."""
        frequencies = self.rope_theta ** (-np.arange(0, self._dim, 2) / self._dim)
        if self.rope_scaling == 'linear':
            frequencies /= self.rope_factor
        elif self.rope_scaling == 'llama3':
            turns = self.rope_length * frequencies / (2 * np.pi)
            kept = np.clip((turns - self.rope_low) / (self.rope_high - self.rope_low), 0, 1)
            frequencies *= kept + (1 - kept) / self.rope_factor
        return frequencies.astype(np.float32)


def rotation(
    positions: Int[Array, 'batch length'], frequencies: Float[np.ndarray, 'half']
) -> Callable[[Float[Array, 'batch length heads dim']], Float[Array, 'batch length heads dim']]:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): coordinates i and i + dim / 2 turn as one pair."""
    angles = positions[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def rotate(heads):
        a, b = jnp.split(heads.astype(jnp.float32), 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(heads.dtype)

    return rotate


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), each branch normalised once more where `post_norms` says so."""

    attention: nn.Module
    mlp: nn.Module
    norm: Callable[..., nn.Module]
    post_norms: bool
    dropout: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch length width'],
        places: Places,
        mask: Array,
        rotate: Callable[[Array], Array],
        train: bool,
    ) -> Float[Array, 'batch length width']:
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def after(number, y):
            return drop(self.norm(name=f'post_norm{number}')(y) if self.post_norms else y)

        y = self.norm(name='norm1')(x)
        x += after(1, self.attention(y, places.start, mask=mask, rotate=rotate, train=train))
        return x + after(2, self.mlp(self.norm(name='norm2')(x), train))


_LLAMA3_2 = functools.partial(
    Llama,
    vocabulary=128256,
    kv_heads=8,
    mlp_width=8192,
    output='tied',
    rope_theta=500000.0,
    rope_scaling='llama3',
    rope_factor=32.0,
)
_QWEN = functools.partial(Llama, vocabulary=151936, epsilon=1e-6, output='tied', rope_theta=1000000.0)
_QWEN2 = functools.partial(_QWEN, kv_heads=2, qkv_bias=True)
MODELS = {
    'llama': Llama,
    'llama3_2_1b': functools.partial(_LLAMA3_2, width=2048, depth=16, heads=32),
    'llama3_2_3b': functools.partial(_LLAMA3_2, width=3072, depth=28, heads=24),
    'tinyllama': functools.partial(Llama, width=2048, depth=22, heads=32, kv_heads=4, mlp_width=5632),
    'qwen2_0_5b': functools.partial(_QWEN2, width=896, depth=24, heads=14, mlp_width=4864),
    'qwen2_1_5b': functools.partial(_QWEN2, width=1536, depth=28, heads=12, mlp_width=8960),
    'qwen3_0_6b': functools.partial(
        _QWEN, width=1024, depth=28, heads=16, kv_heads=8, head_dim=128, mlp_width=3072, qk_norm=True
    ),
    'gemma_2b': functools.partial(
        Llama,
        vocabulary=256000,
        width=2048,
        depth=18,
        heads=8,
        kv_heads=1,
        head_dim=256,
        mlp_width=16384,
        activation='gelu_tanh',
        epsilon=1e-6,
        zero_centered=True,
        scale_embeddings=True,
        output='tied',
    ),
}
