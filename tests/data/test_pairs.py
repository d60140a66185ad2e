"""Pairs: images with captions of their classes, aligned sentences, and what they refuse."""

import re

import numpy as np
import pytest

from tl_jax.data import open_source
from tl_jax.data.streams import eval_batches, train_stream
from tl_jax.data.text import make_tokenizer
from tl_jax.errors import UserError

NAMES = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
BYTES = make_tokenizer('bytes')


def refuses(message):
    return pytest.raises(UserError, match=re.compile(rf'^[^\n]*{message}[^\n]*$'))


def text_of(tokens):
    return bytes(int(t) - 1 for t in tokens if t).decode()


def test_captions_follow_labels_and_templates_take_turns():
    templates = ['{}', 'the digit {}']
    source = open_source('pairs:sklearn:digits/train', captions=NAMES, templates=templates, length=20)
    plain = open_source('sklearn:digits/train')
    assert source.length == 600 and source.class_names == tuple(NAMES)
    np.testing.assert_array_equal(source.labels, plain.labels)
    for i in (0, 1, 2, 599):
        example = source.get(i)
        name = NAMES[plain.labels[i]]
        assert text_of(example['other_tokens']) == (f'the digit {name}' if i % 2 else name)
        assert example['label'] == plain.labels[i] and example['other_tokens'].dtype == np.int32
        np.testing.assert_array_equal(example['image'], plain.get(i)['image'])


def test_slices_shots_and_own_names():
    source = open_source('pairs:sklearn:digits/train[:50%]', shots=3)
    assert source.length == 30 and text_of(source.get(0)['other_tokens']) == str(source.labels[0])


def test_batches_of_pairs():
    source = open_source('pairs:sklearn:digits/val', captions=NAMES, length=6)
    batch = train_stream(source, batch_size=8, seed=0, transforms=['to_float']).batch_at(0)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        'image': ((8, 8, 8, 1), 'float32'),
        'label': ((8,), 'int32'),
        'other_tokens': ((8, 6), 'int32'),
        'index': ((8,), 'int32'),
    }
    last = list(eval_batches(source, batch_size=128, transforms=['to_float']))[-1]
    assert last['mask'].sum() == 300 - 256 and not last['other_tokens'][44:].any()


def test_a_pattern_merges_classes_and_drops_others(tmp_path):
    from PIL import Image

    for name in ('Old_Greek-alpha', 'Old_Greek-beta', 'Latin-a', 'Backup'):
        (tmp_path / name).mkdir()
        Image.new('L', (4, 4)).save(tmp_path / name / '0.png')
    source = open_source(f'pairs:folder:{tmp_path}', class_pattern='([^-]*)-', options=dict(channels=1), length=9)
    assert source.class_names == ('Latin', 'Old Greek') and source.labels.tolist() == [0, 1, 1]
    assert source.get(0)['image'].shape == (4, 4, 1)
    assert [text_of(source.get(i)['other_tokens']) for i in range(3)] == ['Latin', 'Old Greek', 'Old Greek']


def test_pairs_refusals(tmp_path):
    digits = 'pairs:sklearn:digits'
    with refuses('2 captions for 10 classes'):
        open_source(digits, captions=['a', 'b'])
    with refuses(r"class_pattern='x\(\.\)' finds nothing in any name, such as '0'"):
        open_source(digits, class_pattern='x(.)')
    with refuses("class_pattern='.' is no regex with a group"):
        open_source(digits, class_pattern='.')
    with refuses('need a {} for the name'):
        open_source(digits, templates=['a digit'])
    with refuses("'digit 0' and 'digit 1' have the same tokens; raise length"):
        open_source(digits, templates=['digit {}'], length=6)
    with refuses("unknown option 'caption'; did you mean 'captions'"):
        open_source(digits, caption=NAMES)
    with refuses('length=-1: must be a whole number of tokens'):
        open_source(digits, length=-1)
    with refuses('pairs:sklearn:digits: would take .* GiB of memory'):
        open_source(digits, length=10**11)
    np.savez(tmp_path / 'a.npz', x_train=np.zeros((3, 2, 2), np.uint8), y_train=np.arange(3))
    with refuses(r'its classes have no names; give captions=\[…\], one for each of the 3'):
        open_source(f'pairs:npz:{tmp_path}/a.npz/train')


def write_pair(folder, first, other):
    (folder / 'a.en').write_text(first)
    (folder / 'a.de').write_text(other)
    return f'bitext:{folder}/a.{{en,de}}'


def test_bitext(tmp_path):
    spec = write_pair(tmp_path, 'a dog\ntwo men\n', 'ein Hund\nzwei Männer\n')
    source = open_source(spec, tokenizer='bytes', length=8)
    assert source.length == 2 and source.labels is None
    example = source.get(1)
    assert set(example) == {'tokens', 'other_tokens'}
    np.testing.assert_array_equal(example['tokens'], BYTES.encode('two men', 8))
    np.testing.assert_array_equal(example['other_tokens'], BYTES.encode('zwei Männer', 8))
    other = open_source(spec, tokenizer='bytes', other_tokenizer=dict(name='hashed', vocabulary=50), length=8)
    assert other.get(1)['other_tokens'].max() < 50 and not other.get(1)['other_tokens'][2:].any()
    assert open_source(spec + '[:1]').length == 1


def test_batches_of_sentences(tmp_path):
    source = open_source(write_pair(tmp_path, 'a dog\ntwo men\n', 'ein Hund\nzwei Männer\n'), length=4)
    batch = train_stream(source, batch_size=4, seed=0).batch_at(0)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        'tokens': ((4, 4), 'int32'),
        'other_tokens': ((4, 4), 'int32'),
        'index': ((4,), 'int32'),
    }


def test_bitext_refusals(tmp_path):
    with refuses(r'name two files by braces, as in train\.{en,de}\.gz'):
        open_source('bitext:train.en')
    with refuses('2 lines in .*a.en and 1 in .*a.de; align them'):
        open_source(write_pair(tmp_path, 'a\nb\n', 'a\n'))
    with refuses('a.de, line 2: is empty; remove it from both files'):
        open_source(write_pair(tmp_path, 'a\nb\n', 'a\n \n'))
    with refuses('a.en: has no lines'):
        open_source(write_pair(tmp_path, '', ''))
    spec = write_pair(tmp_path, 'a\n', 'b\n')
    for length in (0, -1):
        with refuses(f'length={length}: must be a whole number of tokens'):
            open_source(spec, length=length)
    with refuses('would take 372.5 GiB of memory'):
        open_source(spec, length=10**11)


@pytest.mark.shared
def test_multi30k(shared):
    """Line counts of the published task 1, read within the archive."""
    root = f'bitext:{shared("data/multi30k.tar")}/multi30k/data/task1/raw'
    for split, count in (('val', 1014), ('test_2016_flickr', 1000)):
        source = open_source(f'{root}/{split}.{{en,de}}.gz', tokenizer='bytes', length=256)
        assert source.length == count
    first = source.get(0)
    assert text_of(first['tokens']) == 'A man in an orange hat starring at something.'
    assert text_of(first['other_tokens']) == 'Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt.'


@pytest.mark.shared
def test_mnist_pairs(shared):
    source = open_source(f'pairs:npz:{shared("data/mnist.npz")}/test', captions=NAMES)
    label = open_source(f'npz:{shared("data/mnist.npz")}/test').labels
    assert source.length == 10_000
    for i in range(0, 10_000, 1111):
        assert text_of(source.get(i)['other_tokens']) == NAMES[label[i]]
