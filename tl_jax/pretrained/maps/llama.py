"""Decoders of the LLaMA kind: the names of transformers for Llama, Mistral, Qwen 2 and 3, Gemma 1 and 2."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from tl_jax.errors import UserError
from tl_jax.models.llama import Llama
from tl_jax.pretrained.catalogue import Entry
from tl_jax.pretrained.maps.gpt2 import SCORE
from tl_jax.pretrained.maps.hub_config import activation
from tl_jax.pretrained.names import (
    Family,
    Origin,
    Rule,
    dense,
    embed,
    norm,
    nowhere,
)

_OURS = 'backbone/block{block+1}'
_ATTENTION = {'q_proj': 'query', 'k_proj': 'key', 'v_proj': 'value', 'o_proj': 'out'}
_MLP = {'gate_proj': 'gate', 'up_proj': 'dense1', 'down_proj': 'dense2'}
_NORMS = {'input_layernorm': 'norm1', 'post_attention_layernorm': 'norm2'}
_FOUR_NORMS = {
    'input_layernorm': 'norm1',
    'post_attention_layernorm': 'post_norm1',
    'pre_feedforward_layernorm': 'norm2',
    'post_feedforward_layernorm': 'post_norm2',
}


def _rules(backbone: nn.Module | None) -> list[Rule]:
    rules = []
    # The first are written; the second read as well: the names of the bare model, or of a file where all had that prefix.
    for model in ('model.', ''):
        block = f'{model}layers.{{block}}'
        rules += embed(f'{model}embed_tokens', 'backbone/token')
        for theirs, ours in _ATTENTION.items():
            rules += dense(f'{block}.self_attn.{theirs}', f'{_OURS}/attention/{ours}')
        for name in ('query', 'key'):
            rules += norm(f'{block}.self_attn.{name[0]}_norm', f'{_OURS}/attention/{name}_norm')
        for theirs, ours in _MLP.items():
            rules += dense(f'{block}.mlp.{theirs}', f'{_OURS}/mlp/{ours}')
        for theirs, ours in (_FOUR_NORMS if getattr(backbone, 'post_norms', False) else _NORMS).items():
            rules += norm(f'{block}.{theirs}', f'{_OURS}/{ours}')
        rules += norm(f'{model}norm', 'backbone/norm')
    head = dense('lm_head', 'backbone/lm_head')
    return [*rules, *(head if getattr(backbone, 'output', 'dense') == 'dense' else nowhere(head)), *SCORE]


_IGNORED = ((r'(model\.)?(.*\.)?rotary_emb\.inv_freq', 'rotary frequencies, which we compute'),)
# What a family's configuration class has where config.json says nothing, and what sets it apart from Llama.
_DEFAULTS = {
    'llama': {},
    'mistral': {'intermediate_size': 14336, 'num_key_value_heads': 8, 'sliding_window': 4096},
    'qwen2': {'vocab_size': 151936, 'intermediate_size': 22016, 'num_key_value_heads': 32, 'sliding_window': 4096},
    'qwen3': {
        'vocab_size': 151936,
        'intermediate_size': 22016,
        'num_key_value_heads': 32,
        'head_dim': 128,
        'sliding_window': 4096,
    },
    'gemma': {
        'num_hidden_layers': 28,
        'hidden_size': 3072,
        'intermediate_size': 24576,
        'num_attention_heads': 16,
        'num_key_value_heads': 16,
    },
    'gemma2': {
        'num_hidden_layers': 26,
        'hidden_size': 2304,
        'intermediate_size': 9216,
        'num_attention_heads': 8,
        'num_key_value_heads': 4,
        'sliding_window': 4096,
        'query_pre_attn_scalar': 256,
        'attn_logit_softcapping': 50.0,
        'final_logit_softcapping': 30.0,
    },
}
_LLAMA = {
    'vocab_size': 32000,
    'hidden_size': 4096,
    'intermediate_size': 11008,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'rms_norm_eps': 1e-6,
}
_GEMMA = {'vocab_size': 256000, 'head_dim': 256, 'tie_word_embeddings': True}


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = config.get('model_type')
    if kind not in _DEFAULTS:
        return None
    gemma = kind.startswith('gemma')
    config = _LLAMA | (_GEMMA if gemma else {}) | _DEFAULTS[kind] | config
    if config.get('use_bidirectional_attention'):
        raise UserError(
            'config.json: use_bidirectional_attention = True is not supported; tokens see those before them'
        )
    bias = bool(config.get('attention_bias', False))
    fields = {
        'vocabulary': config['vocab_size'],
        'width': config['hidden_size'],
        'depth': config['num_hidden_layers'],
        'heads': config['num_attention_heads'],
        'kv_heads': config.get('num_key_value_heads'),
        'head_dim': config.get('head_dim'),
        'mlp_width': config['intermediate_size'],
        'activation': _activation(config),
        'epsilon': config['rms_norm_eps'],
        'qkv_bias': bias or kind == 'qwen2',
        'out_bias': bias,
        'mlp_bias': bool(config.get('mlp_bias', False)),
        'qk_norm': kind == 'qwen3',
        'zero_centered': gemma,
        'scale_embeddings': gemma,
        'output': _output(config),
    }
    return fields | _rope(config) | _windows(config) | (_gemma2(config) if kind == 'gemma2' else {})


def _activation(config: Mapping[str, Any]) -> str:
    if config['model_type'] == 'gemma2':
        return activation(config, 'hidden_activation', 'gelu_pytorch_tanh')
    if config['model_type'] == 'gemma' and config.get('hidden_act') in ('gelu', None):
        return 'gelu_tanh'  # The first files say 'gelu' and mean the approximation.
    return activation(config, 'hidden_act', 'silu')


def _output(config: Mapping[str, Any]) -> str:
    if config.get('tie_word_embeddings', False):
        return 'tied'
    # Classifiers and bare models have no table for the output; files that do not say what they are do.
    return 'dense' if all('CausalLM' in name for name in config.get('architectures') or ()) else 'none'


def _gemma2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        'post_norms': True,
        'query_scale': float(config['query_pre_attn_scalar']),
        'score_cap': config['attn_logit_softcapping'],
        'logit_cap': config['final_logit_softcapping'],
    }


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` with `rope_scaling`, or since transformers 5 `rope_parameters` with both."""
    rope = dict(config.get('rope_parameters') or config.get('rope_scaling') or {})
    kind = rope.get('rope_type', rope.get('type', 'default'))
    theta = float(rope.get('rope_theta', config.get('rope_theta', 10000.0)))
    if rope.get('partial_rotary_factor', config.get('partial_rotary_factor', 1.0)) not in (None, 1.0):
        raise UserError('config.json: partial_rotary_factor is not supported; rotary positions turn whole heads here')
    if kind == 'default':
        return {'rope_theta': theta}
    if kind == 'linear':
        return {'rope_theta': theta, 'rope_scaling': 'linear', 'rope_factor': float(rope['factor'])}
    if kind == 'llama3':
        return {
            'rope_theta': theta,
            'rope_scaling': 'llama3',
            'rope_factor': float(rope['factor']),
            'rope_low': float(rope['low_freq_factor']),
            'rope_high': float(rope['high_freq_factor']),
            'rope_length': int(rope['original_max_position_embeddings']),
        }
    raise UserError(f'config.json: rope_type {kind!r} is not supported; known: default, linear, llama3')


def _windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which blocks have a sliding window: those that `layer_types` says, else as the kind of model has it."""
    kind, depth, window = config['model_type'], config['num_hidden_layers'], config.get('sliding_window')
    if (
        window is None
        or kind in ('llama', 'gemma')
        or (kind.startswith('qwen') and not config.get('use_sliding_window'))
    ):
        return {}
    if types := config.get('layer_types'):
        if unknown := set(types) - {'sliding_attention', 'full_attention'}:
            raise UserError(
                f'config.json: layer_types has {sorted(unknown)[0]!r}; known: sliding_attention, full_attention'
            )
        blocks = tuple(i for i, each in enumerate(types, start=1) if each == 'sliding_attention')
    elif kind == 'gemma2':
        blocks = tuple(range(1, depth + 1, 2))
    elif kind == 'mistral':
        return {'window': window}
    else:
        blocks = tuple(range(config.get('max_window_layers', 28) + 1, depth + 1))
    return {'window': window, 'window_blocks': blocks}


FAMILIES = (
    Family(
        Llama,
        (Origin('transformers', r'(model\.)?layers\.0\.self_attn\.q_proj\.weight', _rules, _IGNORED),),
        fields=_fields,
    ),
)

_CHECKPOINTS = {'meta-llama/Llama-3.2-1B': 'llama3_2_1b'}
# What transformers itself names. The licence is in the card, on the hub.
CATALOGUE = {repo: Entry(model, f'hf://{repo}', '') for repo, model in _CHECKPOINTS.items()}
