"""DeBERTa v3: the names of transformers."""

from collections.abc import Mapping
from typing import Any

from tl_jax.errors import UserError
from tl_jax.models.deberta import Deberta
from tl_jax.pretrained.catalogue import Entry
from tl_jax.pretrained.maps.bert import encoder_norm, other_pool, pool_of, prefixed
from tl_jax.pretrained.maps.hub_config import activation, require
from tl_jax.pretrained.names import (
    Family,
    Origin,
    Rule,
    dense,
    embed,
    nowhere,
)

_OURS = 'backbone/block{block+1}'
_BLOCK = {
    'attention.self.query_proj': 'attention/query',
    'attention.self.key_proj': 'attention/key',
    'attention.self.value_proj': 'attention/value',
    'attention.output.dense': 'attention/out',
    'attention.output.LayerNorm': 'norm1',
    'intermediate.dense': 'mlp/dense1',
    'output.dense': 'mlp/dense2',
    'output.LayerNorm': 'norm2',
}


def _body() -> tuple[Rule, ...]:
    """Embeddings and blocks, by the names of the bare model."""
    rules = [
        *embed('embeddings.word_embeddings', 'backbone/token'),
        *encoder_norm('embeddings.LayerNorm', 'backbone/norm'),
        *embed('encoder.rel_embeddings', 'backbone/relative'),
        *encoder_norm('encoder.LayerNorm', 'backbone/relative_norm'),
    ]
    for theirs, ours in _BLOCK.items():
        layout = encoder_norm if ours.startswith('norm') else dense
        rules += layout(f'encoder.layer.{{block}}.{theirs}', f'{_OURS}/{ours}')
    return tuple(rules)


def _rules(backbone: Deberta | None) -> tuple[Rule, ...]:
    body, pooler = _body(), dense('pooler.dense', 'backbone/pooler')
    if backbone and backbone.pool != 'pooler':
        pooler = nowhere(pooler)
    return (*prefixed('deberta.', body), *pooler, *dense('classifier', 'head'), *body)


# Of DebertaV2Config.
_DEFAULTS = {
    'vocab_size': 128100,
    'hidden_size': 1536,
    'num_hidden_layers': 24,
    'num_attention_heads': 24,
    'intermediate_size': 6144,
    'max_position_embeddings': 512,
    'max_relative_positions': -1,
    'position_buckets': -1,
    'layer_norm_eps': 1e-7,
    'pad_token_id': 0,
    'relative_attention': False,
    'pos_att_type': (),
    'share_att_key': False,
    'norm_rel_ebd': 'none',
    'position_biased_input': True,
}
_V3 = {
    'relative_attention': True,
    'pos_att_type': ['c2p', 'p2c'],
    'share_att_key': True,
    'norm_rel_ebd': 'layer_norm',
    'position_biased_input': False,
    'type_vocab_size': 0,
    'conv_kernel_size': 0,
}


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sizes from a `config.json`, absent ones by the defaults of transformers.

    Raises:
      UserError: it asks for what version 3 does not have.
    """
    if config.get('model_type') != 'deberta-v2':
        return None
    config = _DEFAULTS | config
    terms = config['pos_att_type'] or ()
    terms = terms.lower().split('|') if isinstance(terms, str) else terms
    require(config | {'pos_att_type': sorted(set(terms))}, _V3)
    if config['position_buckets'] < 1:
        raise UserError(
            'config.json: position_buckets is missing or below 1; only DeBERTa v3, which has them, is known'
        )
    distance = config['max_relative_positions']
    return dict(
        vocabulary=config['vocab_size'],
        buckets=config['position_buckets'],
        max_distance=distance if distance >= 1 else config['max_position_embeddings'],
        pad_id=config['pad_token_id'],
        width=config['hidden_size'],
        depth=config['num_hidden_layers'],
        heads=config['num_attention_heads'],
        mlp_width=config['intermediate_size'],
        activation=activation(config, 'hidden_act'),
        pooler_activation=activation(config, 'pooler_hidden_act'),
        epsilon=config['layer_norm_eps'],
        **pool_of(config),
    )


FAMILIES = (
    Family(
        Deberta,
        (
            Origin(
                'transformers',
                r'(deberta\.)?encoder\.layer\.0\.attention\.self\.query_proj\.weight',
                _rules,
                (
                    (r'(.*\.)?embeddings\.position_ids', 'a table of 0, 1, 2, …'),
                    (r'lm_predictions\..*|cls\.predictions\..*', 'of the masked language model'),
                    (r'mask_predictions\..*', 'which tokens were replaced'),
                ),
                refuses_head=other_pool,
            ),
        ),
        fields=_fields,
    ),
)

CATALOGUE: dict[str, Entry] = {}  # The known files' names are in no library that we could check them by.
