"""BERT, RoBERTa, DistilBERT and ELECTRA: the names of transformers, and those of Google's first conversions."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from tl_jax.errors import UserError
from tl_jax.models.bert import Bert
from tl_jax.pretrained.catalogue import Entry
from tl_jax.pretrained.maps.hub_config import activation
from tl_jax.pretrained.names import (
    SAME,
    Family,
    Fit,
    Origin,
    Rule,
    dense,
    embed,
    nowhere,
)

_OURS = 'backbone/block{block+1}'
_BERT_BLOCK = {
    'attention.self.query': 'attention/query',
    'attention.self.key': 'attention/key',
    'attention.self.value': 'attention/value',
    'attention.output.dense': 'attention/out',
    'attention.output.LayerNorm': 'norm1',
    'intermediate.dense': 'mlp/dense1',
    'output.dense': 'mlp/dense2',
    'output.LayerNorm': 'norm2',
}
_DISTILBERT_BLOCK = {
    'attention.q_lin': 'attention/query',
    'attention.k_lin': 'attention/key',
    'attention.v_lin': 'attention/value',
    'attention.out_lin': 'attention/out',
    'sa_layer_norm': 'norm1',
    'ffn.lin1': 'mlp/dense1',
    'ffn.lin2': 'mlp/dense2',
    'output_layer_norm': 'norm2',
}
# The masked language model: dense layer, norm, and the bias of the vocabulary.
_MLM = {
    'bert': ('cls.predictions.transform.dense', 'cls.predictions.transform.LayerNorm', 'cls.predictions.bias'),
    'roberta': ('lm_head.dense', 'lm_head.layer_norm', 'lm_head.bias'),
    'distilbert': ('vocab_transform', 'vocab_layer_norm', 'vocab_projector.bias'),
    'electra': ('generator_predictions.dense', 'generator_predictions.LayerNorm', 'generator_lm_head.bias'),
}
# The dense layer ahead of the classifier. RoBERTa's bare model has one as well, under another name.
_POOLER = {
    'bert': ('bert.pooler.dense', 'pooler.dense'),
    'roberta': ('classifier.dense', 'roberta.pooler.dense', 'pooler.dense'),
    'distilbert': ('pre_classifier',),
    'electra': ('classifier.dense',),
}
_HEAD = {
    'bert': 'classifier',
    'roberta': 'classifier.out_proj',
    'distilbert': 'classifier',
    'electra': 'classifier.out_proj',
}


def encoder_norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A norm of transformers; older files call its parameters as TensorFlow did."""
    return (
        Rule(f'{theirs}.weight', f'params/{ours}/scale', SAME),
        Rule(f'{theirs}.bias', f'params/{ours}/bias', SAME),
        Rule(f'{theirs}.gamma', f'params/{ours}/scale', SAME),
        Rule(f'{theirs}.beta', f'params/{ours}/bias', SAME),
    )


def _body(kind: str) -> tuple[Rule, ...]:
    """Embeddings and blocks, by the names of the bare model."""
    layer, block = ('transformer.layer', _DISTILBERT_BLOCK) if kind == 'distilbert' else ('encoder.layer', _BERT_BLOCK)
    rules = [
        *embed('embeddings.word_embeddings', 'backbone/token'),
        *embed('embeddings.position_embeddings', 'backbone/position'),
        *embed('embeddings.token_type_embeddings', 'backbone/segment'),
        *encoder_norm('embeddings.LayerNorm', 'backbone/norm'),
        *dense('embeddings_project', 'backbone/project'),
    ]
    for theirs, ours in block.items():
        layout = encoder_norm if ours.startswith('norm') else dense
        rules += layout(f'{layer}.{{block}}.{theirs}', f'{_OURS}/{ours}')
    return tuple(rules)


def _rules(backbone: Bert | None) -> tuple[Rule, ...]:
    kind = backbone.kind if backbone else 'bert'
    body = _body(kind)
    pooler = [rule for theirs in _POOLER[kind] for rule in dense(theirs, 'backbone/pooler')]
    layer, norm, bias = _MLM[kind]
    mlm = (
        *dense(layer, 'backbone/mlm/dense'),
        *encoder_norm(norm, 'backbone/mlm/norm'),
        Rule(bias, 'params/backbone/mlm/bias', SAME),
    )
    return (
        *prefixed(f'{kind}.', body),
        *(pooler if not backbone or backbone.pool == 'pooler' else nowhere(pooler)),
        *(mlm if backbone and backbone.mlm_head else nowhere(mlm)),
        *dense(_HEAD[kind], 'head'),
        *body,
    )


def other_pool(backbone: nn.Module) -> str:
    """What has a ForSequenceClassification's head, which stands on the pooler, take other features than ours."""
    return '' if backbone.pool == 'pooler' else f'model.pool={backbone.pool!r}'


def prefixed(prefix: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of a bare model inside a whole one."""
    return tuple(rule._replace(theirs=prefix + rule.theirs) for rule in rules)


IGNORED = (
    (r'(.*\.)?embeddings\.(position_ids|token_type_ids)', 'a table of 0, 1, 2, …'),
    (
        r'(cls\.predictions|lm_head)\.decoder\..*|(lm_head|vocab_projector|generator_lm_head)\.weight',
        'the token embeddings and the bias again',
    ),
    (r'cls\.seq_relationship\..*', 'whether two texts follow each other'),
    (r'discriminator_predictions\..*', 'which tokens were replaced'),
)


def pool_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The field `pool` where the file is a classifier's, which always has the dense layer; else {}."""
    architecture = str((config.get('architectures') or [''])[0])
    return {'pool': 'pooler'} if architecture.endswith('ForSequenceClassification') else {}


_KINDS = {kind: kind for kind in _HEAD} | {'xlm-roberta': 'roberta', 'camembert': 'roberta'}


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sizes from a `config.json`, absent ones by the defaults of transformers."""
    kind = _KINDS.get(config.get('model_type'))
    if kind is None:
        return None
    if kind == 'distilbert':
        names = dict(width='dim', depth='n_layers', heads='n_heads', mlp_width='hidden_dim')
        depth = 6
    else:
        names = dict(
            width='hidden_size', depth='num_hidden_layers', heads='num_attention_heads', mlp_width='intermediate_size'
        )
        depth = 12
    sizes = dict(width=768, depth=depth, heads=12, mlp_width=3072)
    if kind == 'electra':
        sizes = dict(width=256, depth=12, heads=4, mlp_width=1024)
    if config.get('is_decoder') or config.get('position_embedding_type', 'absolute') != 'absolute':
        raise UserError('config.json: only encoders with absolute positions are known here; choose another checkpoint')
    pad_id = config.get('pad_token_id', 1 if kind == 'roberta' else 0)
    length = config.get('max_position_embeddings', 512)
    fields = {ours: config.get(theirs, sizes[ours]) for ours, theirs in names.items()} | dict(
        kind=kind,
        vocabulary=config.get('vocab_size', 50265 if config['model_type'] == 'roberta' else 30522),
        length=length - pad_id - 1 if kind == 'roberta' else length,
        segments=0 if kind == 'distilbert' else config.get('type_vocab_size', 2),
        pad_id=pad_id,
        activation=activation(config, 'activation' if kind == 'distilbert' else 'hidden_act'),
        epsilon=1e-12 if kind == 'distilbert' else config.get('layer_norm_eps', 1e-12),
    )
    if kind == 'electra':
        width = config.get('embedding_size', 128)
        fields['embedding_width'] = None if width == fields['width'] else width
    return fields | pool_of(config)


def _first_positions(table, shape):
    if len(table) < shape[0] or table.shape[1:] != tuple(shape[1:]):
        raise ValueError(f'{table.shape} has not the positions of {shape}')
    return table[: shape[0]]


FAMILIES = (
    Family(
        Bert,
        (
            Origin(
                'transformers',
                r'((bert|roberta|electra)\.)?encoder\.layer\.0\.attention\.self\.query\.weight'
                r'|(distilbert\.)?transformer\.layer\.0\.attention\.q_lin\.weight',
                _rules,
                IGNORED,
                refuses_head=other_pool,
            ),
        ),
        fits=lambda _: (Fit('params/backbone/position/embedding', _first_positions, 'cut to the first positions'),),
        fields=_fields,
    ),
)

_CHECKPOINTS = {
    'google-bert/bert-base-uncased': 'bert_base',
    'google-bert/bert-large-uncased': 'bert_large',
    'google-bert/bert-base-cased': 'bert_base_cased',
    'FacebookAI/roberta-base': 'roberta_base',
    'google/electra-small-discriminator': 'electra_small',
    'google/electra-base-discriminator': 'electra_base',
}
# What transformers itself names. Their licences are in the cards, on the hub.
CATALOGUE = {repo: Entry(model, f'hf://{repo}', '') for repo, model in _CHECKPOINTS.items()}
