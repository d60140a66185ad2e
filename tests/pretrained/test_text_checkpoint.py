"""A text checkpoint in, adapted on a table of texts with its own tokenizer, evaluated, and out again."""

import json

import jax
import numpy as np
import safetensors.numpy

from tl_jax import jobs
from tl_jax.finished import network, trained
from tl_jax.models import create_model
from tl_jax.pretrained import export_pretrained
from tl_jax.train import train_and_evaluate

WORDS = ['good', 'fine', 'bad', 'dull', 'film', 'a', 'the', 'is']
SIZES = dict(
    vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
)
DESCRIPTION = dict(
    SIZES, model_type='bert', max_position_embeddings=16, type_vocab_size=2, hidden_act='gelu', pad_token_id=0,
    architectures=['BertForSequenceClassification'], layer_norm_eps=1e-12,
)  # fmt: skip


def test_two_strings_of_a_config(tmp_path, capsys):
    folder = tmp_path / 'checkpoint'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(DESCRIPTION))
    (folder / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS]))
    module = create_model(
        'bert_tiny', vocabulary=13, width=16, depth=1, heads=2, mlp_width=32, length=16, pool='pooler'
    )
    variables = jax.jit(module.init)(jax.random.key(0), np.ones((1, 4), np.int32))
    export_pretrained(folder / 'model.safetensors', variables, module, 'transformers')

    table = tmp_path / 'reviews.tsv'
    rows = [(word, f'the film is {word}') for word in ('good', 'bad', 'fine', 'dull')] * 4
    table.write_text('label\tsentence\n' + ''.join(f'{label in ("good", "fine")}\t{text}\n' for label, text in rows))
    texts = dict(spec=f'tsv:{table}', text='sentence', tokenizer=dict(name='pretrained', source=str(folder)), length=8)
    config = dict(
        model=dict(name='bert_tiny', source=str(folder)),
        data=dict(train=texts, eval=texts),
        stages=[dict(steps=30, train=[('.*', dict(name='adam', lr=3e-3))])],
        batch_size=8,
        eval_batch_size=8,
        mesh=dict(data=1),
    )
    run = tmp_path / 'run'
    train_and_evaluate(config, run)
    out = capsys.readouterr().out
    assert 'the file has no head' in out and 'transformers' in out
    assert json.loads((run / 'summary.json').read_text())['metrics']['val/accuracy'] == 1

    jobs.run_eval({'workdir': str(run)}, [])
    assert 'accuracy 1.0000' in capsys.readouterr().out
    jobs.run_export(
        {'workdir': str(run), 'origin': 'transformers', 'output': str(tmp_path / 'adapted.safetensors')}, []
    )
    adapted = safetensors.numpy.load_file(tmp_path / 'adapted.safetensors')
    assert adapted['classifier.weight'].shape == (2, 16) and 'bert.pooler.dense.weight' in adapted
    _, ours = network(run)
    np.testing.assert_array_equal(adapted['classifier.weight'], ours['params']['head']['kernel'].T)
    assert trained(run).class_names == ('False', 'True')
