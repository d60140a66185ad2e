"""BERT and its kin: RoBERTa, DistilBERT, ELECTRA.

Devlin et al. 2018 (arXiv:1810.04805), its miniatures Turc et al. 2019 (arXiv:1908.08962), Liu et al. 2019
(arXiv:1907.11692), Sanh et al. 2019 (arXiv:1910.01108), Clark et al. 2020 (arXiv:2003.10555).

Inputs: tokens int32 [batch, length], those equal to `pad_id` being no text; or `{'tokens', 'mask', 'segments'}`, the
last two optional: mask bool [batch, length], true for what is text, and segments int32 [batch, length], 1 in a pair's
second text. Endpoints: `mask` as above, `embeddings`, `block1`, … [batch, length, width], `features` [batch, width] float32, and
where asked for `block1_query`, `block1_key`, `block1_value`, … [batch, length, heads, head width], and `mlm_logits` [batch,
length, vocabulary] float32, or [batch, count, vocabulary] for the places `masked` int32 [batch, count] alone, if the inputs
have them. Modules: `token`, `position`, `segment`, `norm`, `project`,
`block{i}/{attention,norm1,mlp,norm2}`, `pooler`, `mlm/{dense,norm}`.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from tl_jax.errors import UserError, nearest
from tl_jax.models.fields import check_activation, check_fields, check_heads
from tl_jax.models.text import pool_tokens
from tl_jax.models.transformer import ACTIVATIONS, INIT, Attention, Dense, LayerNorm, Mlp

POOLER = {'bert': 'tanh', 'roberta': 'tanh', 'distilbert': 'relu', 'electra': 'gelu'}


class Bert(nn.Module):
    """Embeddings, post-norm transformer blocks, and one vector a text.

    Attributes:
      kind: 'roberta' counts the positions of tokens that are not `pad_id`, others those of all; ahead of the classifier
        'bert' and 'roberta' have a dense layer with tanh, 'distilbert' with ReLU, 'electra' with GELU.
      vocabulary: number of ids.
      length: the most tokens that a text may have.
      segments: kinds of token; 0 for no such embedding.
      pad_id: of padding.
      width: of a token between blocks.
      embedding_width: of the tables, if it is not `width`: a dense layer follows them.
      depth: number of blocks.
      heads: of the attention; divides `width`.
      mlp_width: of the hidden layer of each block.
      activation: of that layer, in `tl_jax.models.transformer.ACTIVATIONS`.
      epsilon: of the norms.
      pool: the features: 'cls' is the first token, 'pooler' the dense layer on it, 'mean' over the text's tokens.
      mlm_head: whether there are `mlm_logits`, of the masked language model.
      projections: whether there are `block1_query`, …, of which a distillation takes relations of tokens.
      dropout: of the embeddings, the attention weights and each branch, in training.
      dtype: of the computation.
    """

    kind: Literal['bert', 'roberta', 'distilbert', 'electra'] = 'bert'
    vocabulary: int = 30522
    length: int = 512
    segments: int = 2
    pad_id: int = 0
    width: int = 768
    embedding_width: int | None = None
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = 'gelu'
    epsilon: float = 1e-12
    pool: Literal['cls', 'pooler', 'mean'] = 'pooler'
    mlm_head: bool = False
    projections: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        sizes = ('vocabulary', 'length', 'width', 'embedding_width', 'depth', 'mlp_width')
        check_fields(self, sizes=sizes, counts=('segments', 'pad_id'), rates=('dropout',))
        check_heads(self.heads, self.width)
        check_activation(self.activation)

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths from input to output."""
        blocks = (f'block{i}/.*' for i in range(1, self.depth + 1))
        last = [name for name, present in (('pooler', self.pool == 'pooler'), ('mlm', self.mlm_head)) if present]
        return '(token|position|segment|norm|project)/.*', *blocks, *([f'({"|".join(last)})/.*'] if last else [])

    @nn.compact
    def __call__(
        self, inputs: Int[Array, 'batch length'] | Mapping[str, Array], train: bool = False
    ) -> dict[str, Array]:
        inputs, masked = masked_of(inputs)
        tokens, mask, segments = text_inputs(inputs, self.pad_id, self.length)
        token = nn.Embed(self.vocabulary, self._embedding_width, embedding_init=INIT, name='token')
        x = self._embedded(token(tokens), tokens, segments, train)
        endpoints = {'mask': mask, 'embeddings': x}
        for i in range(1, self.depth + 1):
            shown = {}
            attention = Attention(self.heads, dropout=self.dropout, dtype=self.dtype, parent=None)
            block = Block(
                attention, self.mlp_width, self.activation, self.epsilon, self.dropout, self.dtype, name=f'block{i}'
            )
            x = block(x, train, mask=mask[:, None, None, :], projections=shown)
            endpoints[f'block{i}'] = x
            if self.projections:
                endpoints |= {f'block{i}_{name}': heads for name, heads in shown.items()}
        endpoints['features'] = pooled(x, mask, self.pool, POOLER[self.kind], self.dtype)
        if self.mlm_head:
            activation = self.activation if self.kind in ('bert', 'distilbert') else 'gelu'
            head = MlmHead(activation, self.epsilon, self.dtype, name='mlm')
            x = x if masked is None else jnp.take_along_axis(x, masked[..., None], 1)
            endpoints['mlm_logits'] = head(x, token.embedding)
        return endpoints

    @property
    def _embedding_width(self) -> int:
        return self.embedding_width or self.width

    def _embedded(self, x: Array, tokens: Array, segments: Array | None, train: bool) -> Array:
        """Adds positions and segments to the tokens' embeddings; float32 until the norm."""
        # RoBERTa's table has rows for padding and before, which no text's token gets.
        first = self.pad_id + 1 if self.kind == 'roberta' else 0
        table = nn.Embed(self.length + first, self._embedding_width, embedding_init=INIT, name='position')
        if self.kind == 'roberta':
            real = tokens != self.pad_id
            x += table(jnp.where(real, jnp.cumsum(real, 1), 0) + self.pad_id)
        else:
            x += table(jnp.arange(tokens.shape[1]))
        if self.segments:
            table = nn.Embed(self.segments, self._embedding_width, embedding_init=INIT, name='segment')
            x += table.embedding[0] if segments is None else table(segments)
        x = LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        if self._embedding_width != self.width:
            x = Dense(self.width, dtype=self.dtype, name='project')(x)
        return x


class Block(nn.Module):
    """`x = norm1(x + attention(x, …))`, then `norm2(x + mlp(x))`."""

    attention: nn.Module
    mlp_width: int
    activation: str
    epsilon: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch length width'], train: bool, **context: Array
    ) -> Float[Array, 'batch length width']:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = self.attention(x, train=train, **context)
        x = LayerNorm(self.epsilon, dtype=self.dtype, name='norm1')(x + drop(y))
        y = Mlp(self.mlp_width, self.activation, dtype=self.dtype, name='mlp')(x)
        return LayerNorm(self.epsilon, dtype=self.dtype, name='norm2')(x + drop(y))


class MlmHead(nn.Module):
    """`norm(activation(dense(x))) @ tableᵀ + bias`: which token stands at a position, by the table of embeddings."""

    activation: str
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch length width'], table: Float[Array, 'vocabulary embedding_width']
    ) -> Float[Array, 'batch length vocabulary']:
        x = ACTIVATIONS[self.activation](Dense(table.shape[1], dtype=self.dtype, name='dense')(x))
        x = LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x).astype(self.dtype)
        bias = self.param('bias', nn.initializers.zeros, (table.shape[0],), jnp.float32)
        rows = x.reshape(-1, x.shape[-1])  # one axis of positions, for the reason in `Dense`
        logits = jnp.matmul(rows, table.T.astype(self.dtype), preferred_element_type=jnp.float32) + bias
        return logits.reshape(*x.shape[:-1], table.shape[0])


def pooled(
    x: Float[Array, 'batch length width'], mask: Bool[Array, 'batch length'], pool: str, activation: str, dtype: Any
) -> Float[Array, 'batch width']:
    """The features, by the field `pool`; the dense layer is `pooler` of the module that calls this."""
    if pool == 'mean':
        return pool_tokens(x.astype(jnp.float32), mask, 'mean')
    first = x[:, 0]
    if pool == 'pooler':
        first = ACTIVATIONS[activation](Dense(x.shape[-1], dtype=dtype, name='pooler')(first))
    return first.astype(jnp.float32)


def masked_of(inputs: Any) -> tuple[Any, Int[Array, 'batch count'] | None]:
    """The inputs without `masked`, and those places."""
    if not isinstance(inputs, Mapping) or 'masked' not in inputs:
        return inputs, None
    return {name: value for name, value in inputs.items() if name != 'masked'}, inputs['masked']


def text_inputs(
    inputs: Int[Array, 'batch length'] | Mapping[str, Array], pad_id: int, length: int | None = None
) -> tuple[Int[Array, 'batch length'], Bool[Array, 'batch length'], Int[Array, 'batch length'] | None]:
    """Returns tokens, mask and segments of what a text encoder was given.

    Raises:
      UserError: a name is unknown, tokens are missing, or there are more than `length`, where that is given.
    """
    given = dict(inputs) if isinstance(inputs, Mapping) else {'tokens': inputs}
    known = ('tokens', 'mask', 'segments')
    for name in given:
        if name not in known:
            raise UserError(f'inputs: a text encoder takes no {name!r}; {nearest(name, known)}')
    if 'tokens' not in given:
        raise UserError(f"inputs: a text encoder needs 'tokens', and got {', '.join(given) or 'nothing'}")
    tokens = jnp.asarray(given['tokens'])
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f'inputs: tokens must be integers [batch, length], not {tokens.dtype}{list(tokens.shape)}')
    if length is not None and tokens.shape[1] > length:
        raise UserError(f'model.length: texts have {tokens.shape[1]} tokens, and the model is for {length}; cut them')
    mask = jnp.asarray(given['mask'], bool) if 'mask' in given else tokens != pad_id
    return tokens, mask, given.get('segments')


def _sizes(width: int, depth: int, heads: int, mlp_width: int) -> dict[str, int]:
    return dict(width=width, depth=depth, heads=heads, mlp_width=mlp_width)


TINY, MINI = _sizes(128, 2, 2, 512), _sizes(256, 4, 4, 1024)
SMALL, MEDIUM = _sizes(512, 4, 8, 2048), _sizes(512, 8, 8, 2048)
BASE, LARGE = _sizes(768, 12, 12, 3072), _sizes(1024, 24, 16, 4096)
# What pretraining leaves has no dense layer ahead of the classifier but in BERT, which learns whether texts follow.
_ROBERTA = dict(kind='roberta', vocabulary=50265, segments=1, pad_id=1, epsilon=1e-5, pool='cls')
_ELECTRA = dict(kind='electra', pool='cls')
_DISTILBERT = BASE | dict(kind='distilbert', segments=0, depth=6, pool='cls')

MODELS = {
    'bert_tiny': functools.partial(Bert, **TINY),
    'bert_mini': functools.partial(Bert, **MINI),
    'bert_small': functools.partial(Bert, **SMALL),
    'bert_medium': functools.partial(Bert, **MEDIUM),
    'bert_base': functools.partial(Bert, **BASE),
    'bert_large': functools.partial(Bert, **LARGE),
    'bert_base_cased': functools.partial(Bert, vocabulary=28996, **BASE),
    'roberta_base': functools.partial(Bert, **_ROBERTA, **BASE),
    'roberta_large': functools.partial(Bert, **_ROBERTA, **LARGE),
    'distilbert_base': functools.partial(Bert, **_DISTILBERT),
    'electra_small': functools.partial(Bert, **_ELECTRA, embedding_width=128, **_sizes(256, 12, 4, 1024)),
    'electra_base': functools.partial(Bert, **_ELECTRA, **BASE),
    'electra_large': functools.partial(Bert, **_ELECTRA, **LARGE),
}
