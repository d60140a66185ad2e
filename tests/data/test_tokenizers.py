"""Tokenizers of pretrained models: built from vocabularies, read from tokenizer.json, and as transformers has them."""

import json
import re

import numpy as np
import pytest
import tokenizers

from tl_jax.data.text import make_tokenizer
from tl_jax.data.tokenizers import open_tokenizer
from tl_jax.errors import UserError

WORDS = [
    '[PAD]',
    '[UNK]',
    '[CLS]',
    '[SEP]',
    '[MASK]',
    'the',
    'cat',
    'sat',
    'un',
    '##aff',
    '##able',
    ',',
    '.',
    '!',
    '你',
    '好',
    'e',
    '##t',
    'caf',
    '##e',
    'E',
    'The',
]
MERGES = ['Ġ t', 'Ġt h', 'Ġth e', 'c a', 'ca t', 'Ġ cat', 'Ã ©']
ODD = [
    'The cat sat, unaffable!',
    '',
    '   ',
    'café CAFÉ cafe\u0301',
    '你好cat',
    'the\u00a0cat\u200bsat\tthe\ncat\x00.',
    '[MASK] the [SEP]cat <mask> the <pad></s>x',
    'naïve 🙂 \ufffd ' + 'x' * 150,
    "it's  the   cat'll",
    '\u2028cat\u2029the',
]


def refuses(message):
    return pytest.raises(UserError, match=re.compile(rf'^[^\n]*{message}[^\n]*$'))


@pytest.fixture
def wordpiece(tmp_path):
    (tmp_path / 'vocab.txt').write_text('\n'.join(WORDS) + '\n', 'utf-8')
    return tmp_path


@pytest.fixture
def byte_level(tmp_path):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ['<s>', '<pad>', '</s>', '<unk>', *alphabet, *(m.replace(' ', '') for m in MERGES), '<mask>']
    return write_byte_level(tmp_path, words)


def write_byte_level(folder, words):
    (folder / 'vocab.json').write_text(json.dumps({word: i for i, word in enumerate(words)}), 'utf-8')
    (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(MERGES) + '\n', 'utf-8')
    return folder


def named(ids, words=WORDS):
    return ' '.join(words[i] for i in ids)


def test_wordpiece(wordpiece):
    tokenizer = open_tokenizer(wordpiece)
    assert named(tokenizer.split('The cat, unaffable!')) == '[CLS] the cat , un ##aff ##able ! [SEP]'
    assert named(tokenizer.split('Café 你好 [MASK]dog')) == '[CLS] caf ##e 你 好 [MASK] [UNK] [SEP]'
    assert tokenizer.vocabulary == len(WORDS) and tokenizer.pad_id == 0
    assert tokenizer.decode(tokenizer.split('unaffable cat')) == 'unaffable cat'


def test_cased_by_field_and_by_file(wordpiece):
    assert named(open_tokenizer(wordpiece, lower_case=False).split('The the E')) == '[CLS] The the E [SEP]'
    (wordpiece / 'tokenizer_config.json').write_text('{"do_lower_case": false}')
    assert named(open_tokenizer(wordpiece).split('The the')) == '[CLS] The the [SEP]'
    assert named(open_tokenizer(wordpiece / 'vocab.txt', lower_case=True).split('The')) == '[CLS] the [SEP]'


def test_arrays(wordpiece):
    inputs = open_tokenizer(wordpiece)(['the cat', 'cat ' * 9], 6)
    assert [named(row) for row in inputs['tokens']] == [
        '[CLS] the cat [SEP] [PAD] [PAD]',
        '[CLS] cat cat cat cat [SEP]',
    ]
    assert inputs['mask'].sum(1).tolist() == [4, 6] and inputs['mask'].dtype == bool
    assert inputs['tokens'].dtype == np.int32 and inputs.keys() == {'tokens', 'mask'}
    none = open_tokenizer(wordpiece)([], 6)
    assert none['tokens'].shape == none['mask'].shape == (0, 6)


def test_pairs_are_segments_and_the_longer_is_cut(wordpiece):
    inputs = open_tokenizer(wordpiece)(['the cat', 'cat'], 8, pairs=['sat the sat cat', '.'])
    assert named(inputs['tokens'][0]) == '[CLS] the cat [SEP] sat the sat [SEP]'
    assert inputs['segments'].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]]


def test_byte_level(byte_level):
    tokenizer = open_tokenizer(byte_level)
    words = list(json.loads((byte_level / 'vocab.json').read_text('utf-8')))
    assert named(tokenizer.split('cat the <mask>é'), words) == '<s> cat Ġthe <mask> Ã© </s>'
    inputs = tokenizer(['the', 'cat the'], 9, pairs=['cat', 'the'])
    assert named(inputs['tokens'][1], words) == '<s> cat Ġthe </s> </s> t h e </s>'
    assert named(inputs['tokens'][0], words) == '<s> t h e </s> </s> cat </s> <pad>'
    assert tokenizer.pad_id == 1 and 'segments' not in inputs
    assert tokenizer.encode('cat', 5).tolist() == [0, words.index('cat'), 2, 1, 1]


def test_gpt2_has_no_special_tokens_around(tmp_path):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(merge.replace(' ', '') for merge in MERGES), '<|endoftext|>']
    tokenizer = open_tokenizer(write_byte_level(tmp_path, words))
    assert named(tokenizer.split('cat the<|endoftext|>'), words) == 'cat Ġthe <|endoftext|>'
    assert tokenizer.pad_id == len(words) - 1
    inputs = tokenizer(['', 'cat <|endoftext|>'], 4)
    assert inputs['mask'].sum(1).tolist() == [0, 3]


def test_tokenizer_json_as_it_is_but_for_its_length(wordpiece, tmp_path):
    built = open_tokenizer(wordpiece)
    built.tokenizer.enable_truncation(3)
    built.tokenizer.enable_padding(pad_id=4, pad_token='[MASK]', length=50)
    file = tmp_path / 'tokenizer.json'
    built.tokenizer.save(str(file))
    read = open_tokenizer(tmp_path)  # Before vocab.txt, which is there too.
    assert read.pad_id == 4
    again = open_tokenizer(file, pad_token='[PAD]')
    np.testing.assert_array_equal(again(ODD, 40)['tokens'], open_tokenizer(wordpiece / 'vocab.txt')(ODD, 40)['tokens'])


def test_texts_are_cut_where_the_files_say(wordpiece, tmp_path):
    built = open_tokenizer(wordpiece)
    built.tokenizer.enable_truncation(3, direction='left')
    file = tmp_path / 'tokenizer.json'
    built.tokenizer.save(str(file))
    read = open_tokenizer(file)
    read.split('the cat')  # which cuts nothing, and forgets nothing
    assert named(read.encode('the cat sat', 4)) == '[CLS] cat sat [SEP]'
    (tmp_path / 'tokenizer_config.json').write_text('{"truncation_side": "right"}')
    assert named(open_tokenizer(file).encode('the cat sat', 4)) == '[CLS] the cat [SEP]'
    (tmp_path / 'tokenizer_config.json').write_text('{"truncation_side": "middle"}')
    with refuses("truncation_side is 'left' or 'right', not 'middle'"):
        open_tokenizer(file)


def test_as_a_data_set_names_it(wordpiece):
    tokenizer = make_tokenizer(dict(name='pretrained', source=str(wordpiece)))
    assert tokenizer.encode('the cat sat', 4).tolist() == [2, 5, 6, 3]
    assert tokenizer.vocabulary == len(WORDS)


def test_refusals(wordpiece, byte_level, tmp_path):
    tokenizer = open_tokenizer(wordpiece / 'vocab.txt')
    with refuses('length=2 leaves no room between 2 special tokens'):
        tokenizer(['x'], 2)
    with refuses('1 second texts for 2'):
        tokenizer(['x', 'y'], 9, pairs=['z'])
    with refuses('give a list of texts'):
        tokenizer('x', 9)
    with refuses("pad_token 'nope' is not in the vocabulary"):
        open_tokenizer(wordpiece / 'vocab.txt', pad_token='nope')
    with refuses('lower_case is for vocab.txt'):
        open_tokenizer(byte_level / 'vocab.json', lower_case=True)
    with refuses('there is no .*nowhere'):
        open_tokenizer(tmp_path / 'nowhere')
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'spm.model').write_bytes(b'')
    with refuses('has none of tokenizer.json, vocab.txt, vocab.json; it has spm.model: convert it'):
        open_tokenizer(other)
    (other / 'vocab.txt').write_text('a\nb\n')
    with refuses(r'has no \[UNK\]'):
        open_tokenizer(other)
    (other / 'vocab.txt').write_bytes(b'\xff\xfe')
    with refuses('not a tokenizer .*utf-8'):
        open_tokenizer(other)
    (other / 'tokenizer.json').write_text('{"version": "1.0",\n "model": {"type": "Nope"}}')
    with refuses('tokenizer.json: not a tokenizer'):
        open_tokenizer(other)
    (byte_level / 'merges.txt').write_text('a nope\n')
    with refuses('vocab.json: not a tokenizer'):
        open_tokenizer(byte_level / 'vocab.json')
    (byte_level / 'merges.txt').unlink()
    with refuses('no merges.txt beside it'):
        open_tokenizer(byte_level / 'vocab.json')
    (other / 'tokenizer_config.json').write_text('[]')
    with refuses('tokenizer_config.json: not a JSON object'):
        open_tokenizer(other)


@pytest.mark.parametrize('kind', ['uncased', 'cased', 'roberta', 'gpt2'])
def test_as_transformers(kind, tmp_path):
    transformers = pytest.importorskip('transformers')
    if kind in ('uncased', 'cased'):
        (tmp_path / 'vocab.txt').write_text('\n'.join(WORDS) + '\n', 'utf-8')
        theirs = transformers.BertTokenizer.from_pretrained(tmp_path, do_lower_case=kind == 'uncased')
        ours = open_tokenizer(tmp_path, lower_case=kind == 'uncased')
    else:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        special = ['<s>', '<pad>', '</s>', '<unk>'] if kind == 'roberta' else []
        last = '<mask>' if kind == 'roberta' else '<|endoftext|>'
        write_byte_level(tmp_path, [*special, *alphabet, *(m.replace(' ', '') for m in MERGES), last])
        theirs = transformers.RobertaTokenizer if kind == 'roberta' else transformers.GPT2Tokenizer
        mask = dict(mask_token=tokenizers.AddedToken('<mask>', lstrip=True)) if kind == 'roberta' else {}
        pad = dict(pad_token='<|endoftext|>') if kind == 'gpt2' else {}
        theirs, ours = theirs.from_pretrained(tmp_path, **mask, **pad), open_tokenizer(tmp_path)
    for pairs in (None, ODD[::-1]):
        for length in (7, 60):
            wanted = theirs(ODD, pairs, padding='max_length', truncation='longest_first', max_length=length)
            got = ours(ODD, length, pairs)
            np.testing.assert_array_equal(got['tokens'], wanted['input_ids'])
            np.testing.assert_array_equal(got['mask'], wanted['attention_mask'])
            if 'token_type_ids' in wanted:
                segments = got.get('segments', np.zeros_like(got['tokens']))
                np.testing.assert_array_equal(segments, wanted['token_type_ids'])
