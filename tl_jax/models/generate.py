"""Text, token by token: attention that remembers what it has read, and the loop that continues prompts.

A decoder whose field `cache_length` is positive keeps every block's keys and values in the collection `cache`, in so many
slots, and each call goes on where the last one ended. The collection also holds `start`, the next free slot, and `places`,
which token of its text lies in each slot (-1: none, or padding).

    module = create_model('gpt2')
    tokens = generate(module, variables, prompt, mask=mask, max_new_tokens=20)
"""

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tl_jax.errors import UserError, nearest
from tl_jax.models.transformer import Dense, RMSNorm, attend


def generate(
    module: nn.Module,
    variables: Mapping[str, Any],
    prompt: Int[Array, 'batch length'],
    *,
    max_new_tokens: int,
    mask: Bool[Array, 'batch length'] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int = 0,
    key: Array | None = None,
) -> Int[Array, 'batch new']:
    """Continues prompts, or answers them where the model is an encoder-decoder. Compiled once for each set of arguments.

    Args:
      module: of `create_model`, a decoder or an encoder-decoder.
      variables: its own; only `params/backbone` is read.
      prompt: token ids; padding may stand on either side.
      max_new_tokens: how many to write.
      mask: true where the prompt is no padding; unless given, where it is not the module's `pad_id`, if that has one.
      temperature: divides the logits before drawing; 0 takes the likeliest token, of several the one of the lowest id.
      top_k: draw among so many likeliest tokens, and any that are as likely as the last of them.
      top_p: draw among the fewest tokens whose probabilities sum to this (Holtzman et al. 2020, arXiv:1904.09751), and any that
        are as likely as the last of them.
      eos_id: the id, or one of several, that ends a text.
      pad_id: what follows the end.
      key: of the draws.

    Returns:
      The new tokens alone.

    Raises:
      UserError: an argument is out of range, or the module writes no text.
    """
    backbone = getattr(module, 'backbone', module)
    if not hasattr(backbone, 'cache_length') or getattr(backbone, 'output', '') == 'none':
        raise UserError(f'generate: this {type(backbone).__name__} writes no text; choose a decoder with lm_logits')
    if 'adapters' in variables['params']:
        raise UserError(
            'generate: the adapters of these variables would not act; give the weights of tl_jax.peft.merged'
        )
    rule = _rule(backbone.vocabulary, max_new_tokens, temperature, top_k, top_p, eos_id, pad_id)
    if rule.temperature and key is None:
        raise UserError('generate.key: drawing tokens needs one, such as jax.random.key(0); or leave temperature 0')
    prompt, mask = _prompt(prompt, mask, getattr(backbone, 'pad_id', None))
    key = jax.random.key(0) if key is None else _key(key)
    return _generate(backbone, rule, variables['params']['backbone'], prompt, mask, key)


class _Rule(NamedTuple):
    """What of `generate`'s arguments a compiled function depends on."""

    temperature: float
    top_k: int | None
    top_p: float | None
    eos: tuple[int, ...]
    pad_id: int
    count: int


def _rule(vocabulary, max_new_tokens, temperature, top_k, top_p, eos_id, pad_id) -> _Rule:
    """The arguments as plain numbers.

    Raises:
      UserError: one is of another type, or out of range.
    """
    count = _number('max_new_tokens', max_new_tokens, int)
    if count < 1:
        raise UserError(f'generate.max_new_tokens: must be at least 1, not {count}')
    temperature = _number('temperature', temperature, float)
    if not 0 <= temperature < math.inf:
        raise UserError(f'generate.temperature: must not be negative, as {temperature} is; 0 takes the likeliest token')
    if top_k is not None and not 1 <= (top_k := _number('top_k', top_k, int)) <= vocabulary:
        raise UserError(f'generate.top_k: must be 1 … {vocabulary} (the vocabulary), not {top_k}')
    if top_p is not None and not 0 < (top_p := _number('top_p', top_p, float)) <= 1:
        raise UserError(f'generate.top_p: must be above 0 and at most 1, not {top_p}')
    for name, value in (('top_k', top_k), ('top_p', top_p)):
        if value is not None and not temperature:
            raise UserError(f'generate.{name}: nothing is drawn at temperature 0; leave it out, or raise that')
    ids = () if eos_id is None else eos_id if isinstance(eos_id, list | tuple) else (eos_id,)
    eos = tuple(_number('eos_id', i, int) for i in ids)
    return _Rule(temperature, top_k, top_p, eos, _number('pad_id', pad_id, int), count)


def _number(name: str, value: Any, kind: type) -> Any:
    allowed = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, allowed):
        wanted = 'an integer' if kind is int else 'a number'
        raise UserError(f'generate.{name}: must be {wanted}, not {value!r:.80}')
    return kind(value)


def _prompt(prompt: Any, mask: Any, pad_id: int | None) -> tuple[Array, Array]:
    shape, dtype = jnp.shape(prompt), jnp.result_type(prompt)
    if len(shape) != 2 or 0 in shape or not jnp.issubdtype(dtype, jnp.integer):
        raise UserError(f'generate.prompt: must be integers [batch, length] and not empty, not {dtype}{list(shape)}')
    prompt = jnp.asarray(prompt, jnp.int32)
    if mask is not None and jnp.shape(mask) != shape:
        raise UserError(f'generate.mask: is {list(jnp.shape(mask))}, and the prompt {list(shape)}; give them one shape')
    return prompt, real_tokens(prompt, mask, pad_id)


def _key(key: Any) -> Array:
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if typed and key.shape == ():
        return key
    if not typed and jnp.shape(key) == (2,) and jnp.result_type(key) == jnp.uint32:
        return jnp.asarray(key)
    raise UserError('generate.key: must be one key, such as jax.random.key(0)')


class _State(NamedTuple):
    written: Array
    token: Array
    tokens: Array
    done: Array
    cache: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(backbone: nn.Module, rule: _Rule, params: Any, prompt: Array, mask: Array, key: Array) -> Array:
    start = getattr(backbone, 'start_id', None)
    if start is None:
        backbone = backbone.clone(cache_length=prompt.shape[1] + rule.count - 1)
        opening, stream = {'tokens': prompt, 'mask': mask}, ('tokens', 'mask')
    else:
        backbone = backbone.clone(cache_length=rule.count)
        first = jnp.full((len(prompt), 1), start, jnp.int32)
        opening, stream = {'tokens': prompt, 'mask': mask, 'decoder_tokens': first}, ('decoder_tokens', 'decoder_mask')

    def step(collections, inputs, written, done):
        endpoints, collections = backbone.apply({'params': params, **collections}, inputs, mutable=['cache'])
        token = pick(
            endpoints['lm_logits'][:, -1], jax.random.fold_in(key, written), rule.temperature, rule.top_k, rule.top_p
        )
        token = jnp.where(done, rule.pad_id, token)
        return token, done | jnp.isin(token, jnp.array(rule.eos, jnp.int32)), collections

    def write(state):
        # What was written is text, also where it is the module's `pad_id`.
        inputs = dict(zip(stream, (state.token[:, None], jnp.ones((len(prompt), 1), bool)), strict=True))
        token, done, cache = step(state.cache, inputs, state.written, state.done)
        return _State(state.written + 1, token, state.tokens.at[:, state.written].set(token), done, cache)

    token, done, cache = step({}, opening, 0, jnp.zeros(len(prompt), bool))
    tokens = jnp.full((len(prompt), rule.count), rule.pad_id, jnp.int32).at[:, 0].set(token)
    state = _State(jnp.asarray(1), token, tokens, done, cache)
    return lax.while_loop(lambda s: (s.written < rule.count) & ~jnp.all(s.done), write, state).tokens


def pick(
    logits: Float[Array, 'batch vocabulary'],
    key: Array,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, 'batch']:
    """Draws a token from each row of logits; the likeliest at temperature 0.

    First `top_k` cuts, then `top_p`; what is as likely as the last token that stays, stays.
    """
    if temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / temperature
    if top_k is not None:
        logits = jnp.where(logits < lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    if top_p is not None:
        falling = -jnp.sort(-logits, -1)
        probabilities = nn.softmax(falling)
        # A token stays as long as those before it sum to less: the likeliest always does.
        stays = jnp.cumsum(probabilities, -1) - probabilities < top_p
        logits = jnp.where(logits < jnp.min(falling, -1, where=stays, initial=jnp.inf, keepdims=True), -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


class Places(NamedTuple):
    """Where the tokens of one call stand.

    Attributes:
      start: slot of the first of them; the slots before it are those of earlier calls.
      positions: which token of its text each of them is, from 0, padding not counted.
      seen: the same for every slot, -1 where there is no token or padding.
    """

    start: Int[Array, '']
    positions: Int[Array, 'batch length']
    seen: Int[Array, 'batch slots']

    def distances(self) -> Int[Array, 'length slots']:
        """How many slots a token stands after each slot; negative: before it."""
        queries = self.start + jnp.arange(self.positions.shape[1])
        return queries[:, None] - jnp.arange(self.seen.shape[1])

    def mask(self, window: int | None = None) -> Bool[Array, 'batch 1 length slots']:
        """A token sees itself and those before it: all, or the last `window`."""
        visible = (self.distances() >= 0) & (self.seen >= 0)[:, None]
        if window is not None:
            visible &= self.positions[:, :, None] - self.seen[:, None] < window
        return visible[:, None]


def place(module: nn.Module, real: Bool[Array, 'batch length'], positions: Array | None, cache_length: int) -> Places:
    """Places the tokens of a call of `module`, which remembers them if `cache_length` is positive."""
    batch, length = real.shape
    if not cache_length:
        positions = jnp.maximum(jnp.cumsum(real, 1) - 1, 0) if positions is None else positions
        return Places(jnp.zeros((), jnp.int32), positions, jnp.where(real, positions, -1))
    if length > cache_length:
        raise UserError(f'model.cache_length: {length} tokens at once do not fit into {cache_length}; raise it')
    start = module.variable('cache', 'start', jnp.zeros, (), jnp.int32)
    seen = module.variable('cache', 'places', jnp.full, (batch, cache_length), -1, jnp.int32)
    now = start.value
    if positions is None:
        past = jnp.max(seen.value, 1, keepdims=True) + 1
        positions = jnp.maximum(past + jnp.cumsum(real, 1) - 1, 0)
    seen.value = lax.dynamic_update_slice(seen.value, jnp.where(real, positions, -1).astype(jnp.int32), (0, now))
    start.value = now + length
    return Places(now, positions, seen.value)


class CachedAttention(nn.Module):
    """Self-attention that can remember. Modules: `query`, `key`, `value`, `out`, and `query_norm`, `key_norm` if any.

    Attributes:
      heads: of the queries.
      kv_heads: of the keys and values; `heads` unless given.
      head_dim: width of a head; the input's width / heads unless given.
      use_bias: of query, key and value; `out_bias` of the last layer.
      norm_epsilon: of an RMSNorm of each head's query and key, before `rotate`; None for no norm.
      scale: of the scores; 1 / √head_dim unless given.
      cap: of the scores, see `attend`.
      dropout: of the attention weights.
      cache_length: slots of keys and values to remember; 0 for none.
      dtype: of the computation.
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    use_bias: bool = True
    out_bias: bool = True
    norm_epsilon: float | None = None
    scale: float | None = None
    cap: float | None = None
    dropout: float = 0.0
    cache_length: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch length width'],
        start: Int[Array, ''],
        *,
        mask: Bool[Array, 'batch 1 length slots'],
        bias: Float[Array, '...'] | None = None,
        rotate: Callable[[Array], Array] = lambda heads: heads,
        train: bool = False,
    ) -> Float[Array, 'batch length width']:
        dim = self.head_dim or x.shape[-1] // self.heads
        kv_heads = self.kv_heads or self.heads
        query, key, value = (
            Dense(heads * dim, self.use_bias, self.dtype, name=name)(x).reshape(x.shape[0], -1, heads, dim)
            for name, heads in (('query', self.heads), ('key', kv_heads), ('value', kv_heads))
        )
        if self.norm_epsilon is not None:
            query = RMSNorm(self.norm_epsilon, self.dtype, name='query_norm')(query)
            key = RMSNorm(self.norm_epsilon, self.dtype, name='key_norm')(key)
        query, key = rotate(query), rotate(key)
        if self.cache_length:
            key, value = self._remembered('key', key, start), self._remembered('value', value, start)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = attend(query, key, value, mask=mask, bias=bias, scale=self.scale, cap=self.cap, drop=drop, dtype=self.dtype)
        return Dense(x.shape[-1], self.out_bias, self.dtype, name='out')(y.reshape(*x.shape[:2], -1))

    def _remembered(self, name: str, new: Array, start: Array) -> Array:
        """Writes this call's keys or values after the earlier ones, and returns all slots."""
        shape = (new.shape[0], self.cache_length, *new.shape[2:])
        # A variable may not be called as a submodule is.
        kept = self.variable('cache', f'{name}s', jnp.zeros, shape, new.dtype)
        kept.value = lax.dynamic_update_slice(kept.value, new, (0, start, 0, 0))
        return kept.value


def read_inputs(inputs: Array | Mapping[str, Array], known: Sequence[str]) -> dict[str, Array | None]:
    """Returns the known inputs, None where one is absent; an array alone is `tokens`.

    Raises:
      UserError: there is another.
    """
    inputs = inputs if isinstance(inputs, Mapping) else {'tokens': inputs}
    if unknown := [name for name in inputs if name not in known]:
        raise UserError(f"inputs: a decoder takes no '{unknown[0]}'; {nearest(unknown[0], known)}")
    return {name: inputs.get(name) for name in known}


def real_tokens(
    tokens: Int[Array, 'batch length'], mask: Array | None, pad_id: int | None = None
) -> Bool[Array, 'batch length']:
    """The mask; unless given, true for every token but `pad_id`."""
    if mask is not None:
        return jnp.asarray(mask, bool)
    return jnp.ones(tokens.shape, bool) if pad_id is None else jnp.asarray(tokens) != pad_id


def token_logits(
    hidden: Float[Array, 'batch length width'], embedding: Float[Array, 'vocabulary width'], dtype: Any
) -> Float[Array, 'batch length vocabulary']:
    """The next token's logits, float32, by the table of the embeddings."""
    return jnp.matmul(hidden.astype(dtype), embedding.T.astype(dtype), preferred_element_type=jnp.float32)
