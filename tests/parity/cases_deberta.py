"""DeBERTa v3 of transformers, bare and with a classifier, texts longer than its finest buckets."""

import numpy as np
from cases_bert import blocks, classifier_outputs, mean_outputs, torch_texts
from parity_harness import CLASSES, Case

VOCABULARY = 83
_SIZES = dict(vocabulary=VOCABULARY, width=24, depth=3, heads=3, mlp_width=40)


def texts(length):
    def draw(rng):
        tokens = rng.integers(2, VOCABULARY, (3, length))
        return np.where(np.arange(length) < [[length], [length // 2], [length - 1]], tokens, 0).astype(np.int32)

    return draw


def config(buckets, positions, distance=-1):
    """Tiny sizes, and what microsoft/deberta-v3-base states besides its sizes."""
    import transformers

    return transformers.DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
        **V3 | dict(position_buckets=buckets, max_relative_positions=distance),
    )


V3 = dict(
    type_vocab_size=0,
    layer_norm_eps=1e-7,
    relative_attention=True,
    position_buckets=256,
    norm_rel_ebd='layer_norm',
    share_att_key=True,
    pos_att_type=['p2c', 'c2p'],
    position_biased_input=False,
    pooler_dropout=0,
    pooler_hidden_act='gelu',
)


def classifier(*positions):
    import transformers

    return transformers.DebertaV2ForSequenceClassification(config(*positions))


def bare(*positions):
    """The bare model, below its name as in whole ones."""
    import torch
    import transformers

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.deberta = transformers.DebertaV2Model(config(*positions))

        def forward(self, **arguments):
            return self.deberta(**arguments)

    return Whole()


def cls_outputs(model, arguments):
    result = model(**arguments, output_hidden_states=True)
    return blocks(result) | {'features': result.last_hidden_state[:, 0]}


def _case(name, fields, build, outputs, length, **options):
    return Case(
        name,
        'deberta_v3_small',
        _SIZES | fields,
        'transformers',
        build,
        outputs,
        texts(length),
        torch_texts(),
        **{'num_classes': None} | options,
    )


CASES = (
    _case(
        'deberta_classifier',
        dict(buckets=8, max_distance=24, pool='pooler'),
        lambda: classifier(8, 24),
        classifier_outputs,
        19,
        num_classes=CLASSES,
        golden=True,
    ),
    # Beyond the last bucket.
    _case('deberta_far', dict(buckets=8, max_distance=13, pool='mean'), lambda: bare(8, 40, 13), mean_outputs, 29),
    _case('deberta_one_token', dict(buckets=4, max_distance=16), lambda: bare(4, 16), cls_outputs, 1),
)


def meta(width, depth, heads, mlp_width):
    import transformers

    return transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp_width,
            num_labels=CLASSES,
            **V3,
        )
    )


SIZES = tuple(
    (name, CLASSES, dict(pool='pooler'), 'transformers', lambda sizes=sizes: meta(*sizes), np.ones((1, 8), np.int32))
    for name, sizes in (
        ('deberta_v3_xsmall', (384, 12, 6, 1536)),
        ('deberta_v3_small', (768, 6, 12, 3072)),
        ('deberta_v3_base', (768, 12, 12, 3072)),
        ('deberta_v3_large', (1024, 24, 16, 4096)),
    )
)
