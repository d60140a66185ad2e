"""DeBERTa v3: the names of transformers."""

from collections.abc import Mapping
from typing import Any

from tl_jax.errors import UserError
from tl_jax.models.deberta import Deberta
from tl_jax.pretrained.catalogue import Entry
from tl_jax.pretrained.maps.bert import activation_of, encoder_norm, pool_of, prefixed
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


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes from a `config.json`, absent ones by the defaults of transformers.

    Raises:
      UserError: it asks for what version 3 does not have.
    """
    if config.get('model_type') != 'deberta-v2':
        return {}
    terms = config.get('pos_att_type') or ()
    wanted = {
        'relative_attention': config.get('relative_attention', False) is True,
        'pos_att_type': set(terms.lower().split('|') if isinstance(terms, str) else terms) == {'c2p', 'p2c'},
        'share_att_key': config.get('share_att_key', False) is True,
        'norm_rel_ebd': config.get('norm_rel_ebd') == 'layer_norm',
        'position_buckets': config.get('position_buckets', -1) > 0,
        'position_biased_input': config.get('position_biased_input', True) is False,
        'type_vocab_size': config.get('type_vocab_size', 0) == 0,
        'conv_kernel_size': config.get('conv_kernel_size', 0) == 0,
    }
    for name, good in wanted.items():
        if not good:
            raise UserError(f'config.json: {name} = {config.get(name)!r:.80} is not that of DeBERTa v3, all we have')
    names = dict(
        vocabulary='vocab_size',
        buckets='position_buckets',
        width='hidden_size',
        depth='num_hidden_layers',
        heads='num_attention_heads',
        mlp_width='intermediate_size',
        epsilon='layer_norm_eps',
        pad_id='pad_token_id',
    )
    fields = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    distance = config.get('max_relative_positions', -1)
    return (
        fields
        | dict(
            max_distance=distance if distance >= 1 else config.get('max_position_embeddings', 512),
            activation=activation_of(config, 'hidden_act'),
            pooler_activation=activation_of(config, 'pooler_hidden_act'),
        )
        | pool_of(config)
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
            ),
        ),
        fields=_fields,
    ),
)

CATALOGUE = {
    f'microsoft/deberta-v3-{size}': Entry(f'deberta_v3_{size}', f'hf://microsoft/deberta-v3-{size}', 'mit')
    for size in ('xsmall', 'small', 'base', 'large')
}
