"""Whole runs on texts: buckets in training and evaluation, tagged words, numbers of pairs, packed windows."""

import json

import numpy as np
import pytest

from tl_jax.train import train_and_evaluate

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'good', 'bad', 'film', 'a', 'very', 'ann', 'york']
TINY = dict(vocabulary=12, length=16, width=8, depth=1, heads=2)
BERT = dict(name='bert_tiny', mlp_width=16, pool='mean', **TINY)


def run(tmp_path, model, data, objective, num_steps=40):
    adam = dict(name='adam', lr=1e-2)
    config = dict(
        model=model,
        data=data,
        objective=objective,
        stages=[dict(steps=num_steps, train=[('.*', adam)])],
        batch_size=8,
        eval_batch_size=8,
        mesh=dict(data=1),
    )
    train_and_evaluate(config, tmp_path / 'run')
    return json.loads((tmp_path / 'run' / 'summary.json').read_text())['metrics']


@pytest.fixture
def texts(tmp_path):
    (tmp_path / 'vocab.txt').write_text('\n'.join(WORDS) + '\n')
    return dict(tokenizer=dict(name='pretrained', source=str(tmp_path / 'vocab.txt')), length=16, buckets=[8, 16])


def lines(count=40):
    rng = np.random.default_rng(0)
    for i in range(count):
        yield i % 2, 'a ' + 'very ' * rng.integers(0, 11) + ('good film' if i % 2 else 'bad film')


def test_classes_in_buckets(tmp_path, texts, capsys):
    (tmp_path / 'a.tsv').write_text('label\ttext\n' + ''.join(f'{y}\t{text}\n' for y, text in lines()))
    source = dict(spec=f'tsv:{tmp_path}/a.tsv', text='text', **texts)
    found = run(tmp_path, BERT, dict(train=source, test=source), dict(name='supervised'))
    assert found['test/accuracy'] == found['test/mcc'] == 1
    assert 'train: 2 compiled shapes' in capsys.readouterr().out


def test_numbers_of_pairs(tmp_path, texts):
    rows = ''.join(
        f'{text.replace("very ", "")}\t{"good" if i % 3 else "bad"}\t{y + i % 3}\n'
        for i, (y, text) in enumerate(lines())
    )
    (tmp_path / 'a.tsv').write_text(rows)
    source = dict(
        spec=f'tsv:{tmp_path}/a.tsv', columns=['one', 'two', 'score'], text=['one', 'two'], target='score', **texts
    )
    found = run(tmp_path, dict(BERT, num_classes=1), dict(train=source, test=source), dict(name='regression'))
    assert found['test/pearson'] > 0.5 and found['test/spearman'] > 0.5


def test_tagged_words_in_buckets(tmp_path, texts):
    rows = ''.join(''.join('very\tO\n' for _ in range(i % 9)) + 'ann\tB-PER\nyork\tB-LOC\n\n' for i in range(40))
    (tmp_path / 'a.conll').write_text(rows)
    source = dict(spec=f'conll:{tmp_path}/a.conll', **texts)
    found = run(tmp_path, BERT, dict(train=source, test=source), dict(name='token_labelling'))
    assert found['test/f1'] == found['test/accuracy'] == 1


def test_packed_language(tmp_path, texts):
    (tmp_path / 'a.txt').write_text('\n'.join(['a very good film'] * 60) + '\n')
    source = dict(spec=f'packed:{tmp_path}/a.txt', tokenizer=texts['tokenizer'], length=16)
    found = run(tmp_path, dict(name='gpt2', **TINY), dict(train=source, test=source), dict(name='causal_lm'))
    assert found['test/accuracy'] > 0.9 and found['test/perplexity'] == pytest.approx(np.exp(found['test/loss']))


def test_padding_is_nothing_to_tell(tmp_path, texts):
    (tmp_path / 'a.txt').write_text('\n'.join(['a very good film'] * 40) + '\n')
    source = dict(spec=f'lines:{tmp_path}/a.txt', tokenizer=texts['tokenizer'], length=16)
    gpt2 = dict(name='gpt2', pad_id=0, **TINY)
    found = run(tmp_path, gpt2, dict(train=source, test=source), dict(name='causal_lm'), num_steps=1)
    # Ten of sixteen tokens are padding, which an untrained network cannot tell: ln 12 each.
    assert found['test/loss'] == pytest.approx(np.log(12), abs=0.3)
