"""Text encoders of transformers: BERT, RoBERTa, DistilBERT, ELECTRA; bare, as classifiers, as masked language models."""

import numpy as np
from parity_harness import CLASSES, Case

VOCABULARY, LENGTH, SEGMENTS = 83, 19, 3
_SIZES = dict(vocabulary=VOCABULARY, length=LENGTH, width=24, depth=3, heads=3, mlp_width=40)
_BLOCKS = ('block1', 'block2', 'block3')


def texts(segments=0, pad_id=0, batch=3, length=17):
    """Texts of three lengths with padding at the end alone, as bare tokens or, with segments, as a dict."""

    def draw(rng):
        tokens = rng.integers(2, VOCABULARY, (batch, length)).astype(np.int32)
        mask = np.arange(length) < rng.integers(length // 2, length + 1, (batch, 1))
        tokens = np.where(mask, tokens, pad_id).astype(np.int32)
        if not segments:
            return tokens
        return dict(tokens=tokens, mask=mask, segments=rng.integers(0, segments, tokens.shape).astype(np.int32))

    return draw


def masked_texts(segments=0):
    """As `texts`, with a mask over tokens that are not padding: their embeddings have gradients in torch as well."""

    def draw(rng):
        tokens = rng.integers(2, VOCABULARY, (3, 17)).astype(np.int32)
        mask = np.arange(17) < rng.integers(8, 18, (3, 1))
        inputs = dict(tokens=tokens, mask=mask)
        return inputs | (dict(segments=rng.integers(0, segments, tokens.shape)) if segments else {})

    return draw


def torch_texts(pad_id=0):
    """Our inputs as the arguments of transformers."""

    def convert(inputs):
        import torch

        inputs = inputs if isinstance(inputs, dict) else dict(tokens=inputs)
        tokens = inputs['tokens']
        arguments = dict(input_ids=tokens, attention_mask=inputs.get('mask', tokens != pad_id))
        if 'segments' in inputs:
            arguments['token_type_ids'] = inputs['segments']
        return {name: torch.from_numpy(np.asarray(value, np.int64)) for name, value in arguments.items()}

    return convert


def config(kind, **changes):
    import transformers

    kinds = dict(bert='Bert', roberta='Roberta', distilbert='DistilBert', electra='Electra')
    sizes = dict(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_labels=CLASSES)
    if kind == 'distilbert':
        sizes |= dict(dim=24, n_layers=3, n_heads=3, hidden_dim=40, dropout=0.0, attention_dropout=0.0)
    else:
        sizes |= dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40)
        sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, type_vocab_size=SEGMENTS)
    if kind == 'roberta':
        sizes |= dict(max_position_embeddings=LENGTH + 2, type_vocab_size=1, layer_norm_eps=1e-5)
    return getattr(transformers, f'{kinds[kind]}Config')(**(sizes | changes))


def reference(kind, task, **changes):
    import transformers

    kinds = dict(bert='Bert', roberta='Roberta', distilbert='DistilBert', electra='Electra')
    return getattr(transformers, f'{kinds[kind]}For{task}')(config(kind, **changes))


def bare(kind, **changes):
    """The bare model, below its name as in whole ones."""
    import torch
    import transformers

    kinds = dict(bert='BertModel', roberta='RobertaModel', distilbert='DistilBertModel', electra='ElectraModel')

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            network = getattr(transformers, kinds[kind])
            extra = {'add_pooling_layer': kind == 'bert'} if kind in ('bert', 'roberta') else {}
            setattr(self, kind, network(config(kind, **changes), **extra))

        def forward(self, **arguments):
            return getattr(self, kind)(**arguments)

    return Whole()


def blocks(result):
    """`embeddings` and every block of an output that has hidden states."""
    return dict(zip(('embeddings', *_BLOCKS), result.hidden_states, strict=True))


def classifier_outputs(model, arguments):
    result = model(**arguments, output_hidden_states=True)
    return blocks(result) | {'logits': result.logits}


def mlm_outputs(model, arguments):
    result = model(**arguments, output_hidden_states=True)
    return blocks(result) | {'features': result.hidden_states[-1][:, 0], 'mlm_logits': result.logits}


def pooled_outputs(model, arguments):
    result = model(**arguments, output_hidden_states=True)
    return blocks(result) | {'features': result.pooler_output}


def mean_outputs(model, arguments):
    result = model(**arguments, output_hidden_states=True)
    mask = arguments['attention_mask'][..., None]
    return blocks(result) | {'features': (result.last_hidden_state * mask).sum(1) / mask.sum(1)}


def _case(name, model, fields, build, outputs, inputs, *, classes=None, pad_id=0, **options):
    return Case(
        name,
        model,
        _SIZES | fields,
        'transformers',
        build,
        outputs,
        inputs,
        torch_texts(pad_id),
        num_classes=classes,
        **options,
    )


def _classifier(kind, model, fields, *, golden=False, pad_id=0, **changes):
    return _case(
        f'{kind}_classifier',
        model,
        dict(pool='pooler') | fields,
        lambda: reference(kind, 'SequenceClassification', **changes),
        classifier_outputs,
        texts(fields.get('segments', 0), pad_id),
        classes=CLASSES,
        pad_id=pad_id,
        golden=golden,
    )


def _mlm(kind, model, fields, decoder, embeddings, **changes):
    return _case(
        f'{kind}_mlm',
        model,
        dict(pool='cls', mlm_head=True) | fields,
        lambda: reference(kind, 'MaskedLM', **changes),
        mlm_outputs,
        masked_texts(fields.get('segments', 0)),
        tied={f'{decoder}.weight': f'{kind}.{embeddings}', f'{decoder}.bias': 'the bias'},
    )


_WORDS = 'embeddings.word_embeddings.weight'
_NARROW = dict(embedding_width=16, segments=SEGMENTS)
CASES = (
    _classifier('bert', 'bert_tiny', dict(segments=SEGMENTS), golden=True),
    _classifier('roberta', 'roberta_base', {}, golden=True, pad_id=1),
    _classifier('distilbert', 'distilbert_base', {}),
    _classifier('electra', 'electra_small', _NARROW, embedding_size=16),
    _case('bert_bare', 'bert_tiny', dict(segments=SEGMENTS), lambda: bare('bert'), pooled_outputs, texts(SEGMENTS)),
    _case(
        'roberta_mean',
        'roberta_base',
        dict(pool='mean'),
        lambda: bare('roberta'),
        mean_outputs,
        texts(0, 1),
        pad_id=1,
    ),
    _case('distilbert_mean', 'distilbert_base', dict(pool='mean'), lambda: bare('distilbert'), mean_outputs, texts()),
    _case(
        'electra_mean',
        'electra_base',
        dict(pool='mean', segments=SEGMENTS, activation='gelu_tanh'),
        lambda: bare('electra', embedding_size=24, hidden_act='gelu_new'),
        mean_outputs,
        texts(SEGMENTS),
    ),
    _mlm('bert', 'bert_tiny', dict(segments=SEGMENTS), 'cls.predictions.decoder', _WORDS),
    _mlm('roberta', 'roberta_base', {}, 'lm_head.decoder', _WORDS),
    _mlm('distilbert', 'distilbert_base', {}, 'vocab_projector', _WORDS),
    _mlm('electra', 'electra_small', _NARROW, 'generator_lm_head', _WORDS, embedding_size=16),
)


def meta(kind, sizes, **changes):
    """A classifier of full size."""
    import transformers

    kinds = dict(bert='Bert', roberta='Roberta', distilbert='DistilBert', electra='Electra')
    if kind == 'distilbert':
        fields = {}
    else:
        names = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size')
        fields = dict(zip(names, sizes, strict=True))
    if kind == 'roberta':
        fields |= dict(max_position_embeddings=514, type_vocab_size=1)
    made = getattr(transformers, f'{kinds[kind]}Config')(**fields, **changes, num_labels=CLASSES)
    return getattr(transformers, f'{kinds[kind]}ForSequenceClassification')(made)


_BASE, _LARGE = (768, 12, 12, 3072), (1024, 24, 16, 4096)
SIZES = tuple(
    (
        name,
        CLASSES,
        dict(pool='pooler'),
        'transformers',
        lambda kind=kind, sizes=sizes, changes=changes: meta(kind, sizes, **changes),
        np.ones((1, 8), np.int32),
    )
    for name, kind, sizes, changes in (
        ('bert_tiny', 'bert', (128, 2, 2, 512), {}),
        ('bert_mini', 'bert', (256, 4, 4, 1024), {}),
        ('bert_small', 'bert', (512, 4, 8, 2048), {}),
        ('bert_medium', 'bert', (512, 8, 8, 2048), {}),
        ('bert_base', 'bert', _BASE, {}),
        ('bert_large', 'bert', _LARGE, {}),
        ('bert_base_cased', 'bert', _BASE, dict(vocab_size=28996)),
        ('roberta_base', 'roberta', _BASE, {}),
        ('roberta_large', 'roberta', _LARGE, {}),
        ('distilbert_base', 'distilbert', (), {}),
        ('electra_small', 'electra', (256, 12, 4, 1024), dict(embedding_size=128)),
        ('electra_base', 'electra', _BASE, dict(embedding_size=768)),
        ('electra_large', 'electra', _LARGE, dict(embedding_size=1024)),
    )
)
