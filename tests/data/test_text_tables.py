"""Tables of texts: names given, pairs, numbers, lines by a pattern, several files, folds; and the sets of ../shared."""

import io
import re
import tarfile

import numpy as np
import pytest

from tl_jax.data import open_source
from tl_jax.errors import UserError
from tl_jax.experiment_data import open_data

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'cat', 'dog', 'saw', '##s', '"', 'the']


def refuses(message):
    return pytest.raises(UserError, match=re.compile(rf'^[^\n]*{message}[^\n]*$'))


@pytest.fixture
def wordpiece(tmp_path):
    (tmp_path / 'vocab.txt').write_text('\n'.join(WORDS) + '\n')
    return dict(name='pretrained', source=str(tmp_path / 'vocab.txt'))


def test_pairs_and_numbers_of_a_table_in_an_archive(tmp_path, wordpiece):
    table = b'"a cat saw\tthe dogs\t2.5\nthe cat\tcat\t-1e-1\n'
    with tarfile.open(tmp_path / 'd.tar.xz', 'w:xz') as tar:
        item = tarfile.TarInfo('./sets/pairs.tsv')
        item.size = len(table)
        tar.addfile(item, io.BytesIO(table))
    pairs = dict(columns=['one', 'two', 'score'], text=['one', 'two'], tokenizer=wordpiece, length=9)
    source = open_source(f'tsv:{tmp_path}/d.tar.xz/sets/pairs.tsv', target='score', **pairs)
    first = source.get(0)
    # A quote is a sign of a text as any other; [CLS] a [SEP] b [SEP], nine tokens in all, of the longer text its end is cut.
    assert [WORDS[t] for t in first['tokens']] == ['[CLS]', '"', 'a', 'cat', '[SEP]', 'the', 'dog', '##s', '[SEP]']
    assert first['segments'].tolist() == [0] * 5 + [1] * 4
    assert first['target'] == np.float32(2.5) and first['target'].dtype == np.float32 and 'label' not in first
    assert source.labels is None and source.class_names is None and source.lengths.tolist() == [9, 6]
    with refuses("line 1: score.*; list numeric|line 1: one='\"a cat saw' is not a number"):
        open_source(f'tsv:{tmp_path}/d.tar.xz/sets/pairs.tsv', target='one', **pairs)
    with refuses("no column 'scor'; did you mean 'score'"):
        open_source(f'tsv:{tmp_path}/d.tar.xz/sets/pairs.tsv', target='scor', **pairs)
    with refuses('a pair of texts is for .*pretrained'):
        open_source(f'tsv:{tmp_path}/d.tar.xz/sets/pairs.tsv', target='score', **{**pairs, 'tokenizer': 'bytes'})


def test_lines_by_a_pattern_each_text_once(tmp_path):
    (tmp_path / 'train.txt').write_text('NUM:dist How far ?\nLOC:city Where ?\nLOC:city Where ?\nNUM:age How old ?\n')
    (tmp_path / 'test.txt').write_text('NUM:age How old ?\nHUM:ind Who ?\n')
    questions = dict(pattern=r'(?P<label>[A-Z]+):\S+ (?P<text>.*)', text='text', tokenizer='bytes', length=16)
    names = ['HUM', 'LOC', 'NUM']
    read = lambda **options: open_source(f'tsv:{tmp_path}/train.txt', class_names=names, **questions, **options)
    assert read().labels.tolist() == [2, 1, 1, 2]
    assert read(unique=True).labels.tolist() == [2, 1, 2]
    assert read(without=f'{tmp_path}/test.txt').labels.tolist() == [2, 1, 1]
    assert read(unique=True, without=[f'{tmp_path}/test.txt']).labels.tolist() == [2, 1]
    both = open_source(f'tsv:{tmp_path}/{{train,test}}.txt', **questions)
    assert both.length == 6 and both.class_names == tuple(names)
    with refuses('test.txt, line 2: label .HUM. is not in class_names'):
        open_source(f'tsv:{tmp_path}/test.txt', **questions, class_names=['LOC', 'NUM'])
    with refuses("line 1: 'NUM:dist How far \\?' does not match"):
        open_source(f'tsv:{tmp_path}/train.txt', **{**questions, 'pattern': r'(?P<text>\d)'})
    with refuses('names no column'):
        open_source(f'tsv:{tmp_path}/train.txt', **{**questions, 'pattern': '.*'})
    with refuses('no row is left'):
        read(without=f'{tmp_path}/train.txt')


def test_empty_texts_and_labels_that_differ(tmp_path):
    (tmp_path / 'a.tsv').write_text('label\ttext\n0\tgood\n1\t \n1\tbad\n')
    (tmp_path / 'b.tsv').write_text('label\ttext\n2\tworse\n')
    (tmp_path / 'c.tsv').write_text('label\ttext\nneg\tworse\n')
    texts = lambda name, **o: dict(spec=f'tsv:{tmp_path}/{name}.tsv', text='text', length=4, **o)
    with refuses("a.tsv, line 3: its text is empty; .*unreadable='skip'"):
        open_source(**texts('a'))
    train = texts('a', unreadable='skip')
    assert open_source(**train).labels.tolist() == [0, 1]
    run = dict(run_seed=0, batch_size=2, eval_batch_size=2)
    with refuses(r'config.data.test.test: label 2 is out of range; there are 2 classes'):
        open_data(train=train, test=texts('b'), **run)
    with refuses('config.data.test.test: its classes differ from the training data’s'):
        open_data(train={**train, 'class_names': ['neg', 'pos']}, test=texts('c'), **run)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(spec='jsonl:null.jsonl'), 'null.jsonl, line 1: its text is empty'),
        (dict(spec='jsonl:huge.jsonl'), 'huge.jsonl, line 1: not JSON'),
        (dict(spec='tsv:a.tsv', length=0), 'length=0: must be a whole number of tokens'),
        (dict(spec='tsv:a.tsv', length=2.5), 'length=2.5: must be'),
        (dict(spec='tsv:a.tsv', length=10**11), 'tsv:a.tsv: would take 372.5 GiB of memory'),
        (dict(spec='jsonl:null.jsonl', unreadable='skip'), 'null.jsonl, line 1: this text is empty, and so is every'),
        (dict(spec='lines:a.tsv', length=-1), 'length=-1: must be'),
        (dict(spec='lines:a.tsv', length=10**11), 'lines:a.tsv: would take 745.1 GiB of memory'),
        (dict(spec='packed:a.tsv', length=0, end=0), 'length=0: must be'),
        (dict(spec='packed:a.tsv', length=2, end=-1), 'end=-1 is no id of its tokenizer, 0 … 256'),
        (dict(spec='conll:a.tsv', length=0), 'length=0: must be'),
        (dict(spec='tsv:a.tsv', without='b.tsv'), "b.tsv, line 2: no column 'text'"),
        (
            dict(spec='tsv:a.tsv', tokenizer=dict(name='words', text='a.tsv', column=2)),
            'a.tsv, line 1: has 2 columns; tokenizer.column=2',
        ),
    ],
)
def test_refused_in_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.tsv').write_text('label\ttext\n0\tgood\n')
    (tmp_path / 'b.tsv').write_text('label\tbody\n0\tgood\n')
    (tmp_path / 'null.jsonl').write_text('{"text": null, "label": 0}\n')
    (tmp_path / 'huge.jsonl').write_text('{"text": 1' + '0' * 5000 + ', "label": 0}\n')
    with refuses(re.escape(message)):
        open_source(**({} if options['spec'][0] in 'lpc' else dict(text='text')) | options)


def test_folds(tmp_path):
    (tmp_path / 'a.tsv').write_text('label\ttext\n' + ''.join(f'{i}\tword{i}\n' for i in range(23)))
    opened = lambda part: open_source(f'tsv:{tmp_path}/a.tsv{part}', text='text', length=4)
    folds = [opened(f'[{k}/5]').labels for k in range(1, 6)]
    assert sorted(np.concatenate(folds)) == list(range(23)) and {len(fold) for fold in folds} == {4, 5}
    rest = opened('[^2/5]')
    assert sorted([*rest.labels, *folds[1]]) == list(range(23))
    parts = [opened('[^2/5][:90%]'), opened('[^2/5][90%:]')]
    assert sorted(np.concatenate([p.labels for p in parts])) == sorted(rest.labels) and parts[0].length == 16
    np.testing.assert_array_equal(rest.lengths, 1)
    for wrong in ('[0/5]', '[6/5]', '[1/24]'):
        with refuses('there is no fold'):
            opened(wrong)


@pytest.mark.shared
def test_the_sets_at_hand(shared):
    archive = shared('data/text.tar.xz')
    senteval = f'{archive}/senteval_cr_mr_mpqa_subj_sst2'
    counted = lambda spec, **o: np.bincount(open_source(spec, tokenizer='bytes', length=8, **o).labels).tolist()
    plain = dict(columns=['label', 'text'], text='text')
    # The sizes that Kim 2014, table 1, states: MR 10662, CR 3775 (the copy lacks five).
    assert counted(f'tsv:{senteval}/MR/{{train,dev}}.tsv', **plain) == [5331, 5331]
    assert sum(counted(f'tsv:{senteval}/CR/{{train,dev}}.tsv', unreadable='skip', **plain)) == 3770
    mrpc = dict(label='Quality', text='#1 String')
    assert counted(f'tsv:{archive}/mrpc/msr_paraphrase_test.txt', **mrpc) == [578, 1147]
    cola = dict(columns=['source', 'label', 'mark', 'text'], text='text')
    assert counted(f'tsv:{archive}/glue_cola_rte_wnli/data/CoLA/dev.tsv', **cola) == [322, 721]
    trec = dict(pattern=r'\S+ (?P<text>.*\S)\s*\t(?P<label>\w+)', text='text')
    questions = f'{archive}/trec/data/TREC'
    assert counted(f'tsv:{questions}/test.txt', **trec) == [9, 138, 94, 65, 81, 113]
    once = counted(f'tsv:{questions}/{{train,dev}}.txt', unique=True, without=f'{questions}/test.txt', **trec)
    assert sum(once) == 5368
