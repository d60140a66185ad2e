"""T5: the names of transformers."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from tl_jax.errors import UserError
from tl_jax.models.t5 import T5
from tl_jax.pretrained.catalogue import Entry
from tl_jax.pretrained.maps.hub_config import activation, require
from tl_jax.pretrained.names import (
    Family,
    Origin,
    Rule,
    dense,
    embed,
    norm,
    nowhere,
)

_ATTENTION = {'q': 'query', 'k': 'key', 'v': 'value', 'o': 'out'}
# Parts of a block in their order: kind, our module, and the norm before it.
_PARTS = {
    'encoder': (('SelfAttention', 'attention', 'norm1'), ('DenseReluDense', 'mlp', 'norm2')),
    'decoder': (
        ('SelfAttention', 'attention', 'norm1'),
        ('EncDecAttention', 'cross', 'norm2'),
        ('DenseReluDense', 'mlp', 'norm3'),
    ),
}


def _rules(backbone: nn.Module | None) -> list[Rule]:
    gated = getattr(backbone, 'gated', False)
    mlp = {'wi_0': 'gate', 'wi_1': 'dense1', 'wo': 'dense2'} if gated else {'wi': 'dense1', 'wo': 'dense2'}
    rules = [*embed('shared', 'backbone/token')]
    for stack, parts in _PARTS.items():
        block, ours = f'{stack}.block.{{block}}.layer', f'backbone/{stack}/block{{block+1}}'
        # The first block's biases are everybody's.
        rules += embed(f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias', f'backbone/{stack}/relative')
        for i, (theirs, module, before) in enumerate(parts):
            for name, leaf in (mlp if module == 'mlp' else _ATTENTION).items():
                rules += dense(f'{block}.{i}.{theirs}.{name}', f'{ours}/{module}/{leaf}')
            rules += norm(f'{block}.{i}.layer_norm', f'{ours}/{before}')
        rules += norm(f'{stack}.final_layer_norm', f'backbone/{stack}/norm')
    head = dense('lm_head', 'backbone/lm_head')
    return [*rules, *(nowhere(head) if getattr(backbone, 'output', '') == 'tied' else head)]


_IGNORED = (
    (r'(encoder|decoder)\.embed_tokens\.weight', 'the table of the embeddings once more'),
    (
        r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',
        'written by mistake in early files; nothing reads it',
    ),
)


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if config.get('model_type') != 't5':
        return None
    require(config, {'is_encoder_decoder': True})
    gate, _, kind = config.get('feed_forward_proj', 'relu').rpartition('-')
    if gate not in ('', 'gated'):
        raise UserError(f'config.json: feed_forward_proj = {config["feed_forward_proj"]!r} is not supported')
    # 'gated-gelu' means the approximation, as in the code that T5 1.1 was trained with.
    kind = 'gelu_new' if gate and kind == 'gelu' else kind
    # Since transformers 5 every file says that it is tied, and `scale_decoder_outputs` whether it truly is.
    tied = config.get('tie_word_embeddings', True) and config.get('scale_decoder_outputs', True)
    return {
        'vocabulary': config.get('vocab_size', 32128),
        'width': config.get('d_model', 512),
        'depth': config.get('num_layers', 6),
        'decoder_depth': config.get('num_decoder_layers'),
        'heads': config.get('num_heads', 8),
        'head_dim': config.get('d_kv', 64),
        'mlp_width': config.get('d_ff', 2048),
        'gated': bool(gate),
        'activation': activation({'feed_forward_proj': kind}, 'feed_forward_proj'),
        'buckets': config.get('relative_attention_num_buckets', 32),
        'max_distance': config.get('relative_attention_max_distance', 128),
        'output': 'tied' if tied else 'dense',
        'epsilon': config.get('layer_norm_epsilon', 1e-6),
        'start_id': config.get('decoder_start_token_id') or config.get('pad_token_id') or 0,
    }


FAMILIES = (
    Family(
        T5,
        (Origin('transformers', r'encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight', _rules, _IGNORED),),
        fields=_fields,
    ),
)

_CHECKPOINTS = {
    'google-t5/t5-small': 't5_small',
    'google-t5/t5-base': 't5_base',
    'google-t5/t5-large': 't5_large',
    'google/flan-t5-small': 't5_v1_1_small',
}
# What transformers itself names. Their licences are in the cards, on the hub.
CATALOGUE = {repo: Entry(model, f'hf://{repo}', '') for repo, model in _CHECKPOINTS.items()}
