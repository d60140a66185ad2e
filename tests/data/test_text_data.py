"""Tokenizers and the reading of text files, plain, gzipped and within archives."""

import binascii
import gzip
import io
import re
import tarfile

import numpy as np
import pytest

from tl_jax.data.text import make_tokenizer, read_lines, words_of
from tl_jax.errors import UserError


def refuses(message):
    return pytest.raises(UserError, match=re.compile(rf'^[^\n]*{message}[^\n]*$'))


def test_words():
    assert words_of('Zwei junge Männer, ﬁn d’été.') == ['zwei', 'junge', 'männer', ',', 'fin', 'd', '’', 'été', '.']
    assert words_of('  \t ') == []


def test_bytes():
    tokenizer = make_tokenizer('bytes')
    ids = tokenizer.encode('é7', 5)
    assert ids.tolist() == [0xC3 + 1, 0xA9 + 1, ord('7') + 1, 0, 0] and ids.dtype == np.int32
    assert tokenizer.encode('abc', 2).tolist() == [98, 99]
    assert tokenizer.vocabulary == 257 and max(tokenizer.split(bytes(range(128)).decode())) == 128


def test_hashed_words_then_their_parts():
    fold = lambda text: 1 + binascii.crc32(text.encode()) % 99
    tokenizer = make_tokenizer(dict(name='hashed', vocabulary=100, ngrams=[3, 4]))
    parts = ['<ho', 'hot', 'ot>', '<hot', 'hot>', '<a>']
    assert tokenizer.split('Hot a') == [fold(p) for p in ('hot', 'a', *parts)]
    assert tokenizer.split('Hot a') == tokenizer.split('hot A')
    assert tokenizer.encode('Hot a', 2).tolist() == [fold('hot'), fold('a')]
    many = make_tokenizer(dict(name='hashed', vocabulary=5)).split(' '.join(map(str, range(100))))
    assert set(many) == {1, 2, 3, 4}


def test_words_of_a_training_text(tmp_path):
    file = tmp_path / 'train.txt'
    file.write_text('the cat\nthe dog the cat\nant\n')
    tokenizer = make_tokenizer(dict(name='words', text=str(file), vocabulary=5))
    # the 3×, cat 2×, then of the rest 'ant' is first in the alphabet; 'dog' no longer fits.
    assert tokenizer.encode('Ant the cat dog emu', 6).tolist() == [4, 2, 3, 1, 1, 0]


def test_tokenizer_refusals():
    with refuses("there is no 'byte'; did you mean 'bytes'"):
        make_tokenizer('byte')
    with refuses("tokenizer.vocab: unknown field; did you mean 'vocabulary'"):
        make_tokenizer(dict(name='hashed', vocab=3))
    with refuses('tokenizer.text: is required'):
        make_tokenizer('words')
    with refuses('tokenizer.vocabulary: must be int, not str'):
        make_tokenizer(dict(name='hashed', vocabulary='many'))
    with refuses('tokenizer: must be a name or a dict with one, not 3'):
        make_tokenizer(3)
    with refuses('vocabulary=2 must be at least 3'):
        make_tokenizer(dict(name='hashed', vocabulary=2))


TEXT = 'Ein Mann.\nZwei Männer.\n\nx\x0by\n'
LINES = ['Ein Mann.', 'Zwei Männer.', '', 'x\x0by']


def archived(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, data in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(data)
            tar.addfile(item, io.BytesIO(data))
        link = tarfile.TarInfo('set/link.txt')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        tar.addfile(link)


def test_lines_of_every_kind_of_file(tmp_path):
    (tmp_path / 'a.txt').write_bytes(TEXT.encode('utf-8-sig'))
    (tmp_path / 'b.txt').write_bytes(TEXT.replace('\n', '\r\n').rstrip('\r\n').encode())
    (tmp_path / 'c.txt.gz').write_bytes(gzip.compress(TEXT.encode()))
    members = {'./set/a.txt': TEXT.encode(), 'set/c.gz': gzip.compress(TEXT.encode())}
    archived(tmp_path / 'd.tar', members)
    for path in ('a.txt', 'b.txt', 'c.txt.gz', 'd.tar/set/a.txt', 'd.tar/set/c.gz'):
        assert read_lines(str(tmp_path / path)) == LINES, path
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.txt', 'b.txt', 'c.txt.gz', 'd.tar']


def test_file_refusals(tmp_path):
    archived(tmp_path / 'd.tar', {'set/a.txt': TEXT.encode()})
    with refuses("has no file 'set/b.txt'; did you mean 'set/a.txt'"):
        read_lines(str(tmp_path / 'd.tar/set/b.txt'))
    with refuses("has no file 'set/link.txt'"):
        read_lines(str(tmp_path / 'd.tar/set/link.txt'))
    (tmp_path / 'e.gz').write_bytes(gzip.compress(b'0' * 5000)[:-9])
    with refuses('not a readable file'):
        read_lines(str(tmp_path / 'e.gz'))
    (tmp_path / 'bomb.gz').write_bytes(gzip.compress(b'0' * 50_000))
    with refuses('bomb.gz'):
        read_lines(str(tmp_path / 'bomb.gz'), max_bytes=1000)
    (tmp_path / 'latin.txt').write_bytes('Männer'.encode('latin-1'))
    with refuses('UTF-8'):
        read_lines(str(tmp_path / 'latin.txt'))
    (tmp_path / 'broken.tar').write_bytes(b'no archive')
    with refuses('broken.tar/a.txt: not a readable'):
        read_lines(str(tmp_path / 'broken.tar/a.txt'))
    with refuses('absent.txt'):
        read_lines(str(tmp_path / 'absent.txt'))
