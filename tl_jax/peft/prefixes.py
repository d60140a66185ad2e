"""Prefix tuning: learned keys and values that every token of a text sees."""

import jax
import jax.numpy as jnp

from tl_jax.errors import UserError
from tl_jax.models.bert import Bert
from tl_jax.models.generate import real_tokens
from tl_jax.models.gpt2 import GPT2
from tl_jax.models.heads import uniform
from tl_jax.models.llama import Llama
from tl_jax.peft.base import Adapter, Call, Parts, Site
from tl_jax.peft.prompts import NETWORK, as_inputs, check_room

FAMILIES = (Bert, GPT2, Llama)
SITES = r'backbone(/position|/block\d+/attention(/key|/value|/key_norm)?)?'


def prefix(*, tokens: int = 20, reparametrise: int = 0) -> Adapter:
    """Prefix tuning (Li & Liang 2021, arXiv:2101.00190, sec. 4): attention over [P_k; keys] and [P_v; values].

    P_k, P_v [tokens, width of a key] are each block's own, P = tanh(E W₁ + b₁) W₂ + b₂ with one E, W₁ for all blocks where
    reparametrised (sec. 4.3). Every token of the text sees the whole prefix, and the text's positions begin behind it,
    as in the authors' code and Hugging Face's peft; keys of the prefix have no rotary position and no norm.

    Args:
      tokens: length of the prefix.
      reparametrise: width of the hidden layer that makes the prefix; 0 learns P itself.
    """
    if tokens < 1:
        raise UserError(f'config.model.peft.tokens: a prefix has at least 1, not {tokens}')
    if reparametrise < 0:
        raise UserError(f'config.model.peft.reparametrise: must be a width, or 0 for none, not {reparametrise}')

    def init(key, site: Site, weights) -> Parts:
        del weights
        role = _role(site)
        if role == 'backbone':
            _check_family(site.module)
        if role == 'backbone' and reparametrise:
            rows, kernel, bias = jax.random.split(key, 3)
            width = site.module.width
            return Parts(
                {
                    'prefix': jax.random.normal(rows, (tokens, width)),
                    'hidden_kernel': uniform(kernel, (width, reparametrise)),
                    'hidden_bias': uniform(bias, (width, reparametrise))[0],
                }
            )
        if role not in ('key', 'value'):
            return Parts({})
        width = site.outputs.shape[-1]
        if not reparametrise:
            return Parts({'prefix': 0.02 * jax.random.normal(key, (tokens, width))})
        kernel, bias = jax.random.split(key)
        drawn = uniform(bias, (reparametrise, width))[0]
        return Parts({'prefix_kernel': uniform(kernel, (reparametrise, width)), 'prefix_bias': drawn})

    def prepare(parts):
        if not reparametrise:
            return parts
        shared = parts[NETWORK].params
        hidden = jnp.tanh(shared['prefix'] @ shared['hidden_kernel'] + shared['hidden_bias'])
        made = {
            path: Parts({'prefix': hidden @ own.params['prefix_kernel'] + own.params['prefix_bias']})
            for path, own in parts.items()
            if path.endswith(('/key', '/value'))
        }
        return {**parts, **made}

    def call(parts: Parts, call: Call, site: Site):
        role = _role(site)
        if role == 'backbone':
            return _placed(call, site, tokens)
        if role == 'position':
            return call.run(call.inputs + tokens)
        if role == 'attention':
            return _attended(call, tokens)
        if role == 'key_norm':
            return _text_only(call.run, tokens)(call.inputs)
        y = call.run(call.inputs)
        rows = jnp.broadcast_to(parts.params['prefix'].astype(y.dtype), (len(y), *parts.params['prefix'].shape))
        return jnp.concatenate([rows, y], 1)

    kinds = ('module', 'dense', 'embed', 'norm')
    suits = ', '.join(family.__name__ for family in FAMILIES)
    return Adapter(init, call, prepare=prepare, kinds=kinds, targets=SITES, identity=False, suits=suits)


def _role(site: Site) -> str:
    return site.path.rpartition('/')[2]


def _check_family(module) -> None:
    if not isinstance(module, FAMILIES):
        raise UserError(
            f"config.model.peft.name: 'prefix' is for Bert, GPT2 and Llama, not {type(module).__name__}: where positions are "
            "relative a prefix has none; take 'prompt', or 'vpt' for images"
        )


def _placed(call: Call, site: Site, tokens: int):
    """The network, its text's positions behind the prefix; where there is a table of them, its own call moves them."""
    module, inputs = site.module, as_inputs(call.inputs)
    check_room(module, tokens, inputs['tokens'].shape[1])
    if isinstance(module, Llama):
        positions = inputs.get('positions')
        if positions is None:
            real = real_tokens(inputs['tokens'], inputs.get('mask'), module.pad_id)
            positions = jnp.maximum(jnp.cumsum(real, 1) - 1, 0)
        inputs['positions'] = positions + tokens
    return call.run(inputs)


def _attended(call: Call, tokens: int):
    """Attention, its mask open towards the prefix."""
    changed = {}
    if call.kwargs.get('mask') is not None:
        mask = call.kwargs['mask']
        changed['mask'] = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(tokens, 0)], constant_values=True)
    if 'rotate' in call.kwargs:
        rotate, length = call.kwargs['rotate'], call.inputs.shape[1]
        text_only = _text_only(rotate, tokens)
        changed['rotate'] = lambda heads: rotate(heads) if heads.shape[1] == length else text_only(heads)
    return call.run(call.inputs, **changed)


def _text_only(run, tokens: int):
    return lambda x: jnp.concatenate([x[:, :tokens], run(x[:, tokens:]).astype(x.dtype)], 1)
