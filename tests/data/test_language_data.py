"""Lines, packed windows, and tagged words."""

import re

import numpy as np
import pytest

from tl_jax.data import open_source
from tl_jax.errors import UserError

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'ann', 'went', 'to', 'new', 'york', '##er', '##s']


def refuses(message):
    return pytest.raises(UserError, match=re.compile(rf'^[^\n]*{message}[^\n]*$'))


@pytest.fixture
def wordpiece(tmp_path):
    (tmp_path / 'vocab.txt').write_text('\n'.join(WORDS) + '\n')
    return dict(name='pretrained', source=str(tmp_path / 'vocab.txt'))


def test_lines(tmp_path, wordpiece):
    (tmp_path / 'a.txt').write_text('Ann went\n\nnew yorkers to york\n')
    source = open_source(f'lines:{tmp_path}/a.txt', tokenizer=wordpiece, length=6)
    assert source.length == 2 and source.lengths.tolist() == [4, 6] and source.labels is None
    assert [WORDS[t] for t in source.get(1)['tokens']] == ['[CLS]', 'new', 'york', '##er', '##s', '[SEP]']
    (tmp_path / 'b.txt').write_text('\n \n')
    with refuses('has no text'):
        open_source(f'lines:{tmp_path}/b.txt')


def test_packed_windows_hold_every_token_in_order(tmp_path, wordpiece):
    (tmp_path / 'a.txt').write_text('ann went\nto new yorkers\nto york\n')
    source = open_source(f'packed:{tmp_path}/a.txt', tokenizer=wordpiece, length=4)
    windows = np.stack([source.get(i)['tokens'] for i in range(source.length)])
    words = ['ann', 'went', '[SEP]', 'to', 'new', 'york', '##er', '##s', '[SEP]', 'to', 'york', '[SEP]']
    assert [WORDS[t] for t in windows.ravel()] == words and windows.shape == (3, 4)
    ids = open_source(f'packed:{tmp_path}/a.txt', tokenizer='bytes', length=5, end=0).get(1)['tokens']
    assert bytes(t - 1 if t else 255 for t in ids.tolist()) == b'ent\xfft'
    with refuses('its tokenizer has no end token'):
        open_source(f'packed:{tmp_path}/a.txt', tokenizer='bytes', length=5)
    with refuses('has 12 tokens, fewer than one window of length=13'):
        open_source(f'packed:{tmp_path}/a.txt', tokenizer=wordpiece, length=13)


def test_tags_stand_on_first_tokens(tmp_path, wordpiece):
    (tmp_path / 'a.conll').write_text('-DOCSTART- -X- O\n\nAnn NNP B-PER\nwent V O\n\n\nNew N B-LOC\nYorkers N I-LOC\n')
    source = open_source(f'conll:{tmp_path}/a.conll', tokenizer=wordpiece, length=7)
    assert source.class_names == ('B-LOC', 'B-PER', 'I-LOC', 'O') and source.length == 2
    assert source.get(0)['token_label'].tolist() == [-1, 1, 3, -1, -1, -1, -1]
    assert [WORDS[t] for t in source.get(1)['tokens']] == ['[CLS]', 'new', 'york', '##er', '##s', '[SEP]', '[PAD]']
    assert source.get(1)['token_label'].tolist() == [-1, 0, 2, -1, -1, -1, -1]
    assert source.lengths.tolist() == [4, 6]
    # The end of a sentence too long goes, its special token stays.
    short = open_source(f'conll:{tmp_path}/a.conll', tokenizer=wordpiece, length=3)
    assert short.get(1)['token_label'].tolist() == [-1, 0, -1]
    parts = open_source(
        f'conll:{tmp_path}/a.conll', tokenizer='bytes', length=9, class_names=['O', 'B-PER', 'B-LOC', 'I-LOC']
    )
    assert parts.get(0)['token_label'].tolist() == [1, -1, -1, 0, -1, -1, -1, -1, -1]
    with refuses("line 7: tag 'B-LOC' is not in class_names"):
        open_source(f'conll:{tmp_path}/a.conll', tokenizer=wordpiece, class_names=['O', 'B-PER'])
    for length in (1, 2):
        with refuses(f'length={length} leaves no room between 2 special tokens'):
            open_source(f'conll:{tmp_path}/a.conll', tokenizer=wordpiece, length=length)
    (tmp_path / 'b.conll').write_text('Ann\n')
    with refuses("line 1: 'Ann' has no word and tag"):
        open_source(f'conll:{tmp_path}/b.conll', tokenizer=wordpiece)
