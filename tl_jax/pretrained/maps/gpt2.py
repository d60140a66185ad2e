"""GPT-2: the names of transformers, whose dense layers are [in, out] as ours, query, key and value in one."""

from collections.abc import Mapping
from typing import Any

from tl_jax.models.gpt2 import GPT2
from tl_jax.pretrained.catalogue import Entry
from tl_jax.pretrained.maps.hub_config import activation, require
from tl_jax.pretrained.names import OI, SAME, Family, Origin, Rule, embed, norm, stacked

# The head of *ForSequenceClassification has no bias, nor has ours of kind 'unbiased', the default of decoders.
SCORE = (Rule('score.weight', 'params/head/kernel', OI),)
_BLOCK = 'h.{block}'
_OURS = 'backbone/block{block+1}'


def _dense(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(f'{theirs}.weight', f'params/{ours}/kernel', SAME),
        Rule(f'{theirs}.bias', f'params/{ours}/bias', SAME),
    )


def _fused(theirs: str, leaf: str, axis: int) -> Rule:
    paths = tuple(f'params/{_OURS}/attention/{name}/{leaf}' for name in ('query', 'key', 'value'))
    return Rule(f'{_BLOCK}.attn.c_attn.{theirs}', paths, stacked(3, SAME, axis))


_RULES = (
    *embed('wte', 'backbone/token'),
    *embed('wpe', 'backbone/position'),
    *norm(f'{_BLOCK}.ln_{{i}}', f'{_OURS}/norm{{i}}'),
    _fused('weight', 'kernel', 1),
    _fused('bias', 'bias', 0),
    *_dense(f'{_BLOCK}.attn.c_proj', f'{_OURS}/attention/out'),
    *_dense(f'{_BLOCK}.mlp.c_fc', f'{_OURS}/mlp/dense1'),
    *_dense(f'{_BLOCK}.mlp.c_proj', f'{_OURS}/mlp/dense2'),
    *norm('ln_f', 'backbone/norm'),
    *SCORE,
)


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if config.get('model_type') != 'gpt2':
        return None
    require(
        config,
        {
            'add_cross_attention': False,
            'scale_attn_weights': True,
            'scale_attn_by_inverse_layer_idx': False,
            'tie_word_embeddings': True,
        },
    )
    return {
        'vocabulary': config.get('vocab_size', 50257),
        'length': config.get('n_positions', 1024),
        'width': config.get('n_embd', 768),
        'depth': config.get('n_layer', 12),
        'heads': config.get('n_head', 12),
        'mlp_width': config.get('n_inner'),
        'activation': activation(config, 'activation_function', 'gelu_new'),
        'epsilon': config.get('layer_norm_epsilon', 1e-5),
    }


FAMILIES = (
    Family(
        GPT2,
        (
            Origin(
                'transformers',
                r'h\.0\.attn\.c_attn\.weight',
                lambda _: _RULES,
                (
                    (r'(transformer\.)?h\.[0-9]+\.attn\.(masked_)?bias', 'the causal mask, which we compute'),
                    (r'lm_head\.weight', 'the table of the embeddings once more'),
                ),
                prefix='transformer.',
            ),
        ),
        fields=_fields,
    ),
)

_CHECKPOINTS = {'openai-community/gpt2': 'gpt2', 'distilbert/distilgpt2': 'distilgpt2'}
# What transformers itself names. Their licences are in the cards, on the hub.
CATALOGUE = {repo: Entry(model, f'hf://{repo}', '') for repo, model in _CHECKPOINTS.items()}
