"""Prompts: learned vectors that stand before a text's tokens, or among an image's patches.

A prompt is there from the first step, so an adapted network does not start as the plain one does.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax, nn
from jaxtyping import Array

from tl_jax.errors import UserError
from tl_jax.models.bert import Bert
from tl_jax.models.deberta import Deberta
from tl_jax.models.gpt2 import GPT2
from tl_jax.models.heads import uniform
from tl_jax.models.llama import Llama
from tl_jax.models.t5 import T5
from tl_jax.models.text import TextTransformer
from tl_jax.peft.base import Adapter, Call, Parts, Site

FAMILIES = (Bert, Deberta, GPT2, Llama, T5, TextTransformer)
NETWORK, TABLE = 'backbone', 'backbone/token'
# Stands in the tokens for a place of the prompt: no token's id, and no family's padding.
PLACE = -1


def prompt(
    *, tokens: int = 20, start: Literal['vocabulary', 'uniform'] = 'vocabulary', token_ids: Sequence[int] = ()
) -> Adapter:
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691, sec. 2): the network reads [P; X], P [tokens, width] learned.

    As in Hugging Face's peft, P counts as text in positions, masks and pooling: a first token's features are then those of
    P's first. Endpoints of the text's positions keep them; those of the prompt are taken off. An encoder-decoder has it
    before the encoder's text.

    Args:
      tokens: length of the prompt.
      start: 'vocabulary' copies the embeddings of tokens drawn at random; 'uniform' draws from ± 0.5.
      token_ids: copies the embeddings of these instead, repeated or cut to the length.
    """

    def init(key, site: Site, weights) -> Parts:
        if site.path == NETWORK:
            return Parts({})
        table = weights['embedding']
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < len(table):
            raise UserError(f'config.model.peft.token_ids: must be 0 … {len(table) - 1}, not {list(token_ids)}')
        if token_ids:
            return Parts({'prompt': table[jnp.resize(jnp.asarray(token_ids), tokens)]})
        if start == 'uniform':
            return Parts({'prompt': jax.random.uniform(key, (tokens, table.shape[1]), minval=-0.5, maxval=0.5)})
        return Parts({'prompt': table[jax.random.randint(key, (tokens,), 0, len(table))]})

    return _prompted(init, tokens)


def p_tuning(
    *, tokens: int = 20, encoder: Literal['mlp', 'lstm'] = 'mlp', width: int = 128, layers: int = 2
) -> Adapter:
    """P-tuning (Liu et al. 2021, arXiv:2103.10385, sec. 3.2): a prompt as `prompt`'s, from vectors through an encoder.

    'lstm': P = MLP(BiLSTM(E)), the MLP of 2 · width hidden units; 'mlp': two hidden layers of `width`. E [tokens, embedding
    width]; ReLU; sizes and start as peft's PromptEncoder has them.

    Args:
      tokens: length of the prompt.
      encoder: which of the two.
      width: of its hidden layers.
      layers: of the LSTM.
    """

    def init(key, site: Site, weights) -> Parts:
        if site.path == NETWORK:
            return Parts({})
        size = weights['embedding'].shape[1]
        embedding, recurrent, dense = jax.random.split(key, 3)
        learned = {'prompt': jax.random.normal(embedding, (tokens, size))}
        if encoder == 'lstm':
            learned |= _lstm_start(recurrent, size, width, layers)
            return Parts(learned | _mlp_start(dense, (2 * width, 2 * width, size)))
        return Parts(learned | _mlp_start(dense, (size, width, width, size)))

    def prepare(parts):
        params = parts[TABLE].params
        x = params['prompt']
        if encoder == 'lstm':
            for layer in range(layers):
                x = jnp.concatenate([_lstm(x, params, layer, way) for way in ('forward', 'backward')], -1)
        return {**parts, TABLE: Parts({'prompt': _mlp(x, params)})}

    return _prompted(init, tokens)._replace(prepare=prepare)


def _prompted(init, tokens: int) -> Adapter:
    """What a prompt of so many vectors does, however they come to be."""
    if tokens < 1:
        raise UserError(f'config.model.peft.tokens: a prompt has at least 1, not {tokens}')

    def checked(key, site: Site, weights) -> Parts:
        if site.path == NETWORK and not isinstance(site.module, FAMILIES):
            raise UserError(
                f"config.model.peft.name: {_listed(FAMILIES)} take prompts before a text; images take 'vpt'"
            )
        return init(key, site, weights)

    def call(parts: Parts, call: Call, site: Site):
        return _around(call, site, tokens) if site.path == NETWORK else _embedded(parts.params['prompt'], call)

    return Adapter(
        checked,
        call,
        kinds=('module', 'embed'),
        targets=f'{NETWORK}|{TABLE}',
        identity=False,
        suits=_listed(FAMILIES),
    )


def _around(call: Call, site: Site, tokens: int) -> dict[str, Any]:
    """The network with places for the prompt among its tokens, and its endpoints without them."""
    inputs = as_inputs(call.inputs)
    check_room(site.module, tokens, inputs['tokens'].shape[1])
    longer = _lengthened(inputs, tokens)
    endpoints = call.run(longer if isinstance(call.inputs, Mapping) else longer['tokens'])
    length = longer['tokens'].shape[1]

    def has_prompt(name, x):
        if x.ndim < 3 or x.shape[1] != length:
            return False
        # These have the places of a decoder's text, and those that were asked for.
        others = isinstance(site.module, T5) and not name.startswith('encoder')
        return not (others or (name == 'mlm_logits' and 'masked' in inputs))

    return {name: x[:, tokens:] if has_prompt(name, x) else x for name, x in endpoints.items()}


def _embedded(prompt: Array, call: Call) -> Array:
    """The embeddings, the prompt's where the tokens have its places."""
    x = call.run(jnp.maximum(call.inputs, 0))
    rows = prompt[: x.shape[1]].astype(x.dtype)
    # No gather: its gradient would be a scatter.
    rows = jnp.pad(rows, ((0, x.shape[1] - len(rows)), (0, 0)))
    return jnp.where(call.inputs[..., None] == PLACE, rows, x)


def as_inputs(inputs: Any) -> dict[str, Any]:
    """A text's inputs by name; an array alone is its tokens."""
    return dict(inputs) if isinstance(inputs, Mapping) else {'tokens': inputs}


def check_room(module: Any, tokens: int, length: int) -> None:
    """Refuses a prompt and a text that together have more positions than the table, and a cache, which counts calls."""
    most = getattr(module, 'length', None)
    if getattr(module, 'cache_length', 0):
        raise UserError(
            'config.model.cache_length: a cache has no slots for a prompt or a prefix, which each call would add anew; take 0'
        )
    if most is not None and tokens + length > most:
        raise UserError(
            f'config.model.peft.tokens: {tokens} of a prompt and {length} of a text are more than the {most} positions of the '
            'network; take fewer, or cut the texts'
        )


def _lengthened(inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The inputs with places for the prompt on the left."""
    fill = {'tokens': PLACE, 'mask': True, 'segments': 0}
    longer = {
        name: jnp.pad(jnp.asarray(x), ((0, 0), (tokens, 0)), constant_values=fill[name]) if name in fill else x
        for name, x in inputs.items()
    }
    if 'masked' in inputs:
        longer['masked'] = inputs['masked'] + tokens
    if inputs.get('positions') is not None:
        first = jnp.broadcast_to(jnp.arange(tokens), (len(inputs['positions']), tokens))
        longer['positions'] = jnp.concatenate([first, inputs['positions'] + tokens], 1)
    return longer


def _listed(families: Sequence[type]) -> str:
    return ', '.join(family.__name__ for family in families)


def _lstm_start(key, size: int, width: int, layers: int) -> dict[str, Any]:
    """U(-1/√width, 1/√width), as torch starts it."""
    learned = {}
    for layer in range(layers):
        rows = size if layer == 0 else 2 * width
        for way in ('forward', 'backward'):
            key, *keys = jax.random.split(key, 4)
            for own, leaf, shape in zip(keys, ('kernel', 'recurrent', 'bias'), ((rows,), (width,), ()), strict=True):
                bound = width**-0.5
                drawn = jax.random.uniform(own, (*shape, 4 * width), minval=-bound, maxval=bound)
                learned[f'lstm{layer + 1}_{way}_{leaf}'] = drawn
    return learned


def _lstm(x, params, layer: int, way: str):
    """One direction of a layer: x [length, rows] -> [length, width]. Gates i, f, g, o side by side, as torch has them."""
    kernel, recurrent, bias = (params[f'lstm{layer + 1}_{way}_{leaf}'] for leaf in ('kernel', 'recurrent', 'bias'))

    def step(state, row):
        hidden, cell = state
        i, f, g, o = jnp.split(row + hidden @ recurrent, 4)
        cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
        hidden = nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden

    zeros = jnp.zeros(len(recurrent))
    return lax.scan(step, (zeros, zeros), x @ kernel + bias, reverse=way == 'backward')[1]


def _mlp_start(key, sizes: Sequence[int]) -> dict[str, Any]:
    learned = {}
    for number, shape in enumerate(itertools.pairwise(sizes), start=1):
        key, kernel, bias = jax.random.split(key, 3)
        learned[f'dense{number}_kernel'] = uniform(kernel, shape)
        learned[f'dense{number}_bias'] = uniform(bias, (shape[0], shape[1]))[0]
    return learned


def _mlp(x, params):
    """Dense layers `dense1`, … with ReLU in between."""
    count = sum(name.startswith('dense') for name in params) // 2
    for number in range(1, count + 1):
        x = x @ params[f'dense{number}_kernel'] + params[f'dense{number}_bias']
        x = nn.relu(x) if number < count else x
    return x
