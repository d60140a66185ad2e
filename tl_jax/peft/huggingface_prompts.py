"""Prompts and prefixes in folders of `peft`: one tensor `prompt_embeddings`, what an encoder made of it in place of that.

PROMPT_TUNING, P_TUNING  [tokens, embedding width]         adapters/…/token/prompt
PREFIX_TUNING            [tokens, blocks · 2 · key width]  adapters/…/block{i}/attention/{key,value}/prefix
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from tl_jax.errors import UserError
from tl_jax.peft.base import Parts
from tl_jax.peft.huggingface_layers import COMMON, Method, Part, defaults
from tl_jax.peft.prefixes import prefix
from tl_jax.peft.prompts import TABLE, p_tuning, prompt

PROMPT = 'prompt_embeddings'
_CONSTRUCTORS = {'prompt': prompt, 'p_tuning': p_tuning, 'prefix': prefix}
_SIZES = {name: ... for name in ('num_virtual_tokens', 'num_layers', 'num_attention_heads', 'token_dim')}
# How an adapter began, or what has made the tensor, changes nothing once it is there.
_START = (
    'encoder_dropout',
    'encoder_hidden_size',
    'encoder_num_layers',
    'encoder_reparameterization_type',
    'init_weights',
    'num_transformer_submodules',
    'prefix_projection',
    'prompt_tuning_init',
    'prompt_tuning_init_text',
    'tokenizer_kwargs',
    'tokenizer_name_or_path',
)
SETTINGS = COMMON | _SIZES | {name: ... for name in _START}


def _read_prompt(config, modules, places, backbone, folder) -> tuple[dict, dict]:
    del places, backbone
    rows = _rows(config, modules, folder)
    return {'': dict(name='prompt', tokens=len(rows))}, {'': {TABLE: {'prompt': rows}}}


def _read_prefix(config, modules, places, backbone, folder) -> tuple[dict, dict]:
    del places
    rows, blocks = _rows(config, modules, folder), getattr(backbone, 'depth', 0)
    if not blocks or rows.shape[1] % (2 * blocks) or config.get('num_layers', blocks) != blocks:
        raise UserError(f'{folder}: has prefixes of {config.get("num_layers")} blocks; the network has {blocks}')
    leaves = {
        _site(number // 2, ('key', 'value')[number % 2]): {'prefix': part}
        for number, part in enumerate(np.split(rows, 2 * blocks, axis=1))
    }
    return {'': dict(name='prefix', tokens=len(rows))}, {'': leaves}


def _rows(config: Mapping[str, Any], modules: Mapping[str, Any], folder: Path) -> np.ndarray:
    rows = modules.get(PROMPT, {}).get(PROMPT)
    if len(modules) != 1 or rows is None or rows.ndim != 2:
        raise UserError(f'{folder}: a folder of {config["peft_type"]} has one matrix, {PROMPT}, and this has not')
    if config.get('num_transformer_submodules') not in (None, 1):
        raise UserError(f'{folder}: has prompts of an encoder and a decoder; here only one of them takes prompts')
    if config.get('num_virtual_tokens') != len(rows):
        raise UserError(f'{folder}: its prompt has {len(rows)} tokens, not {config.get("num_virtual_tokens")!r:.40}')
    return rows


def _write(parts: list[Part], place_at, flat, backbone) -> tuple[dict, dict]:
    del place_at
    if len(parts) > 1:
        raise UserError('--origin=peft: several prompts are not one folder; export one alone')
    ((section, leaves),) = parts
    made = {site: Parts(own) for site, own in leaves.items()}
    adapter = _CONSTRUCTORS[section['name']](**defaults(_CONSTRUCTORS[section['name']], section))
    if adapter.prepare:
        made = adapter.prepare(made)
    if section['name'] == 'prefix':
        order = [_site(block, role) for block in range(backbone.depth) for role in ('key', 'value')]
        rows = np.concatenate([made[site].params['prefix'] for site in order], axis=1)
        sizes = {'num_layers': backbone.depth, 'num_attention_heads': _kv_heads(backbone), 'prefix_projection': False}
        width = rows.shape[1] // len(order)
    else:
        rows, sizes = np.asarray(made[TABLE].params['prompt']), {}
        width = rows.shape[1]
    sizes |= {'num_virtual_tokens': len(rows), 'token_dim': width, 'num_transformer_submodules': 1}
    head = any(path.startswith('params/head/') for path in flat)
    # Without it `peft` would leave the prompt out, silently.
    return {**sizes, 'task_type': 'SEQ_CLS' if head else _bare_task(backbone)}, {PROMPT: rows}


def _site(block: int, role: str) -> str:
    return f'backbone/block{block + 1}/attention/{role}'


def _kv_heads(backbone: nn.Module) -> int:
    return getattr(backbone, 'kv_heads', None) or backbone.heads


def _bare_task(backbone: nn.Module) -> str:
    return 'CAUSAL_LM' if hasattr(backbone, 'cache_length') else 'FEATURE_EXTRACTION'


METHODS: dict[str, Method] = {
    'PROMPT_TUNING': Method(('prompt', 'p_tuning'), _read_prompt, _write, SETTINGS),
    'P_TUNING': Method((), _read_prompt, _write, SETTINGS),
    'PREFIX_TUNING': Method(('prefix',), _read_prefix, _write, SETTINGS),
}
