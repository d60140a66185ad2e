"""svmlight files, alone and within archives, and what they refuse."""

import tarfile

import numpy as np
import pytest
from sklearn.datasets import dump_svmlight_file

from tl_jax.data import open_source
from tl_jax.errors import UserError


@pytest.fixture
def table(tmp_path):
    rng = np.random.RandomState(0)
    inputs = rng.poisson(0.3, (20, 7)).astype(np.float32)
    inputs[0, 6] = 3  # the last feature occurs
    labels = rng.randint(0, 2, 20)
    dump_svmlight_file(inputs, labels, str(tmp_path / 'books.svmlight'))
    with tarfile.open(tmp_path / 'reviews.tar.xz', 'w:xz') as archive:
        archive.add(tmp_path / 'books.svmlight', 'data/books.svmlight')
    return tmp_path, inputs, labels


@pytest.mark.parametrize('path', ['books.svmlight', 'reviews.tar.xz/data/books.svmlight'])
def test_rows_are_the_dense_table(table, path):
    folder, inputs, labels = table
    source = open_source(f'svmlight:{folder}/{path}', features=9)
    assert source.length == 20
    np.testing.assert_array_equal(source.labels, labels)
    for i in range(20):
        np.testing.assert_array_equal(source.get(i)['inputs'], np.pad(inputs[i], (0, 2)))


def test_labels_of_both_signs_become_0_and_1(tmp_path):
    (tmp_path / 'a.svmlight').write_text('-1 0:1\n1 1:2\n')
    assert open_source(f'svmlight:{tmp_path}/a.svmlight').labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ('content', 'options', 'message'),
    [
        ('no table', {}, 'not an svmlight file'),
        ('', {}, 'has no examples|not an svmlight file'),
        ('1 5:1\n0 2:1', {'features': 3}, 'not an svmlight file'),
        ('1 0:1\n0 900000000:1', {}, 'would take .* GiB of memory'),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, options, message):
    (tmp_path / 'bad.svmlight').write_text(content)
    with pytest.raises(UserError, match=message):
        open_source(f'svmlight:{tmp_path}/bad.svmlight', **options)


def test_a_missing_member_is_named(table):
    with pytest.raises(UserError, match="has no file 'data/book.svmlight'; did you mean 'data/books.svmlight'"):
        open_source(f'svmlight:{table[0]}/reviews.tar.xz/data/book.svmlight')


def test_a_member_as_tar_writes_it_of_a_folder(table):
    with tarfile.open(table[0] / 'dot.tar', 'w') as archive:
        archive.add(table[0] / 'books.svmlight', './books.svmlight')
    for member in ('books.svmlight', './books.svmlight'):
        assert open_source(f'svmlight:{table[0]}/dot.tar/{member}').length == 20


@pytest.mark.parametrize('kind', ['xz', 'gz', 'bz2', 'none'])
def test_a_damaged_archive_is_named(table, kind):
    path = table[0] / f'damaged.tar.{kind}'
    if kind == 'none':
        path.write_bytes(b'no archive')
    else:
        with tarfile.open(path, f'w:{kind}') as archive:
            archive.add(table[0] / 'books.svmlight', 'books.svmlight')
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + b'\xff' * 40 + whole[len(whole) // 2 :])
    with pytest.raises(UserError, match=f'damaged.tar.{kind}/b.svmlight: not a readable file'):
        open_source(f'svmlight:{path}/b.svmlight')
