"""DeBERTa v3 (He et al. 2021, arXiv:2111.09543): attention by content and by relative position, told apart.

Inputs and endpoints are those of `tl_jax.models.bert`, without segments and projections. Modules: `token`, `norm`, `relative`,
`relative_norm`, `block{i}/{attention,norm1,mlp,norm2}`, `pooler`.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from tl_jax.errors import UserError
from tl_jax.models.bert import BASE, LARGE, Block, pooled, text_inputs
from tl_jax.models.fields import check_activation, check_fields, check_heads
from tl_jax.models.transformer import INIT, Dense, LayerNorm, attend


class Deberta(nn.Module):
    """Embeddings of tokens alone, blocks whose attention knows relative positions, and one vector a text.

    Attributes:
      vocabulary: number of ids.
      buckets: of relative positions to either side; their embeddings are shared by all blocks.
      max_distance: the first relative position that falls into the last bucket, of log-spaced ones from buckets / 2 on.
      pad_id: of padding.
      width: of a token between blocks.
      depth: number of blocks.
      heads: of the attention; divides `width`.
      mlp_width: of the hidden layer of each block.
      activation: of that layer, in `tl_jax.models.transformer.ACTIVATIONS`.
      pooler_activation: of the dense layer ahead of the classifier.
      epsilon: of the norms.
      pool: the features: 'cls' is the first token, 'pooler' a dense layer on it, 'mean' over the text's tokens.
      dropout: of the embeddings, the attention weights and each branch, in training.
      dtype: of the computation.
    """

    vocabulary: int = 128100
    buckets: int = 256
    max_distance: int = 512
    pad_id: int = 0
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = 'gelu'
    pooler_activation: str = 'gelu'
    epsilon: float = 1e-7
    pool: Literal['cls', 'pooler', 'mean'] = 'cls'
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        sizes = ('vocabulary', 'width', 'depth', 'mlp_width')
        check_fields(self, sizes=sizes, counts=('pad_id',), rates=('dropout',))
        check_heads(self.heads, self.width)
        check_activation(self.activation)
        check_activation(self.pooler_activation, 'pooler_activation')
        if self.buckets < 4 or self.max_distance <= self.buckets // 2 + 1:
            raise UserError(
                f'model.max_distance: {self.max_distance} leaves nothing beyond the {self.buckets // 2} exact distances '
                f'of {self.buckets} buckets (at least 4); raise it'
            )

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths from input to output."""
        blocks = (f'block{i}/.*' for i in range(1, self.depth + 1))
        return '(token|norm|relative|relative_norm)/.*', *blocks, *(['pooler/.*'] if self.pool == 'pooler' else [])

    @nn.compact
    def __call__(
        self, inputs: Int[Array, 'batch length'] | Mapping[str, Array], train: bool = False
    ) -> dict[str, Array]:
        tokens, mask, segments = text_inputs(inputs, self.pad_id)
        if segments is not None:
            raise UserError("inputs: a Deberta tells a pair's texts by their separator; leave out 'segments'")
        x = nn.Embed(self.vocabulary, self.width, embedding_init=INIT, name='token')(tokens)
        x = LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x) * mask[..., None]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        relative = self._relative(tokens.shape[1], train)
        endpoints = {'mask': mask, 'embeddings': x}
        # Padding looks nowhere.
        mask4 = mask[:, None, None, :] & mask[:, None, :, None]
        for i in range(1, self.depth + 1):
            attention = DisentangledAttention(self.heads, self.dropout, self.dtype, parent=None)
            block = Block(
                attention, self.mlp_width, self.activation, self.epsilon, self.dropout, self.dtype, name=f'block{i}'
            )
            x = block(x, train, relative=relative, mask=mask4)
            endpoints[f'block{i}'] = x
        return endpoints | {'features': pooled(x, mask, self.pool, self.pooler_activation, self.dtype)}

    def _relative(self, length: int, train: bool) -> Float[Array, 'distances width']:
        """The embeddings of `query - key` = length - 1, …, 1 - length."""
        table = nn.Embed(2 * self.buckets, self.width, embedding_init=INIT, name='relative').embedding
        table = LayerNorm(self.epsilon, dtype=self.dtype, name='relative_norm')(table)
        bucket = log_buckets(np.arange(length - 1, -length, -1), self.buckets, self.max_distance)
        return table[np.clip(bucket + self.buckets, 0, 2 * self.buckets - 1)]


class DisentangledAttention(nn.Module):
    """Scores of content to content, to position, and of position to content (He et al. 2020, arXiv:2006.03654, eq. 4).

    score(q, k) = (query_q · key_k + query_q · key_{q - k} + query_{q - k} · key_k) / √(3 · head width)

    where query_{d} and key_{d} are projections of the embedding of distance d, by the layers that serve content (as v3
    has it). Modules: `query`, `key`, `value`, `out`.
    """

    heads: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch length width'],
        relative: Float[Array, 'distances width'],
        mask: Bool[Array, 'batch 1 length length'],
        train: bool,
    ) -> Float[Array, 'batch length width']:
        width = x.shape[-1]
        query_layer, key_layer, value_layer = (
            Dense(width, dtype=self.dtype, name=n) for n in ('query', 'key', 'value')
        )
        query, key, value = (self._split(layer(x)) for layer in (query_layer, key_layer, value_layer))
        scale = (3 * width // self.heads) ** -0.5
        # Distances fall along the keys of a query, and rise along the queries of a key.
        to_position = shifted(self._product(query, self._split(key_layer(relative))))
        from_position = shifted(self._product(key, self._split(query_layer(relative[::-1]))))
        bias = scale * (to_position + from_position.swapaxes(2, 3))
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = attend(query, key, value, mask=mask, bias=bias, scale=scale, drop=drop, dtype=self.dtype)
        return Dense(width, dtype=self.dtype, name='out')(y.reshape(x.shape))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)

    def _product(self, x: Array, relative: Array) -> Float[Array, 'batch heads length distances']:
        return jnp.einsum(
            'blhd,rhd->bhlr', x.astype(self.dtype), relative.astype(self.dtype), preferred_element_type=jnp.float32
        )


def shifted(scores: Float[Array, '... length distances']) -> Float[Array, '... length length']:
    """`result[i, j] = scores[i, length - 1 - i + j]` of 2 · length - 1 distances, by reshapes: no gather, no scatter.

    A row of one more column, read as if it had one less, moves by one a row.
    """
    *batch, length, distances = scores.shape
    flat = jnp.pad(scores, [(0, 0)] * (len(batch) + 1) + [(0, 1)]).reshape(*batch, length * (distances + 1))
    flat = flat[..., length - 1 : length - 1 + length * distances]
    return flat.reshape(*batch, length, distances)[..., :length]


def log_buckets(distance: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """The signed bucket of each distance: itself up to half of `buckets`, then log-spaced up to `max_distance` - 1.

    In float32, as transformers does, so that distances at a bucket's edge fall as they do there.
    """
    middle = buckets // 2
    size = np.maximum(np.abs(distance), middle).astype(np.float32)
    span = np.log(np.float32((max_distance - 1) / middle))
    log = np.ceil(np.log(size / np.float32(middle)) / span * np.float32(middle - 1)) + middle
    return np.where(np.abs(distance) <= middle, distance, np.sign(distance) * log).astype(np.int32)


MODELS = {
    'deberta_v3_xsmall': functools.partial(Deberta, width=384, depth=12, heads=6, mlp_width=1536),
    'deberta_v3_small': functools.partial(Deberta, **(BASE | {'depth': 6})),
    'deberta_v3_base': functools.partial(Deberta, **BASE),
    'deberta_v3_large': functools.partial(Deberta, **LARGE),
}
