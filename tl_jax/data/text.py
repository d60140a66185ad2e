"""Text: from lines of files to token ids. Every tokenizer is a fixed function of its options and gives the same ids anywhere.

Id 0 is padding, except where a pretrained model's tokenizer (`tl_jax.data.tokenizers`) has another. Words are those of the
text in lower case (Unicode NFKC), and every other visible sign by itself.
"""

import collections
import gzip
import lzma
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tl_jax.config import call
from tl_jax.data.base import MAX_BYTES, check_size, existing
from tl_jax.data.tokenizers import PretrainedTokenizer, open_tokenizer
from tl_jax.errors import UserError, nearest

WORD = re.compile(r'\w+|[^\w\s]')
UNKNOWN = 1
ARCHIVED = re.compile(r'(.*?\.(?:tar|tgz)(?:\.\w+)?)/(.+)')


class Tokenizer(NamedTuple):
    """`split(text)` gives ids of 1 … `vocabulary` - 1."""

    split: Callable[[str], list[int]]
    vocabulary: int

    def encode(self, text: str, length: int) -> np.ndarray:
        """The first `length` ids of a text, filled up with 0: int32 [length]."""
        ids = np.zeros(length, np.int32)
        found = self.split(text)[:length]
        ids[: len(found)] = found
        return ids


def make_tokenizer(item: str | Mapping[str, Any]) -> Tokenizer | PretrainedTokenizer:
    """A tokenizer from its name, 'bytes', 'hashed', 'words' or 'pretrained', or from `dict(name=…, **options)`."""
    if not isinstance(item, str | Mapping):
        raise UserError(f'tokenizer: must be a name or a dict with one, not {item!r:.80}')
    options = {'name': item} if isinstance(item, str) else dict(item)
    name = options.pop('name', None)
    if name not in TOKENIZERS:
        raise UserError(f'tokenizer: there is no {name!r}; {nearest(str(name), TOKENIZERS)}')
    return call(TOKENIZERS[name], options, 'tokenizer')


def byte_tokenizer() -> Tokenizer:
    """The bytes of the text in UTF-8, plus 1: 257 ids."""
    return Tokenizer(lambda text: [byte + 1 for byte in text.encode()], 257)


def hashed_tokenizer(*, vocabulary: int = 8192, ngrams: Sequence[int] = ()) -> Tokenizer:
    """The CRC-32 of each word, folded to 1 … vocabulary - 1; nothing is learnt, and words may collide.

    `ngrams=[3, 4]` adds, after all words, each word's parts of 3 and of 4 characters, its ends marked by < and > as in
    Bojanowski et al. 2017 (arXiv:1607.04606, sec. 3.2). A length that cuts the text off thus drops such parts first.
    """
    _check_vocabulary(vocabulary)
    parts: dict[str, list[int]] = {}

    def fold(text: str) -> int:
        return 1 + zlib.crc32(text.encode()) % (vocabulary - 1)

    def parts_of(word: str) -> list[int]:
        if word not in parts:
            marked = f'<{word}>'
            parts[word] = [fold(marked[i : i + n]) for n in ngrams for i in range(len(marked) - n + 1)]
        return parts[word]

    def split(text: str) -> list[int]:
        words = words_of(text)
        return [fold(word) for word in words] + [part for word in words for part in parts_of(word)]

    return Tokenizer(split, vocabulary)


def word_tokenizer(*, text: str, vocabulary: int = 8192, column: int | None = None, spaces: bool = False) -> Tokenizer:
    """The `vocabulary` - 2 most frequent words of the file `text` from id 2 on, ties in order of the alphabet; 1 for others.

    Give the file of the training text to the sources of every split, so that ids mean the same. `text` may be several files,
    `{train,dev}.tsv`; of tables, `column` is the one with text, from 0. `spaces` takes for words what spaces separate,
    in texts that are split already (`do n't`).
    """
    _check_vocabulary(vocabulary)
    split = (lambda line: line.lower().split()) if spaces else words_of
    files = in_braces(text)
    texts = (text for file in files for text in _column(file, column))
    counts = collections.Counter(word for text in texts for word in split(text))
    kept = sorted(counts, key=lambda word: (-counts[word], word))[: vocabulary - 2]
    ids = {word: i for i, word in enumerate(kept, start=UNKNOWN + 1)}
    return Tokenizer(lambda line: [ids.get(word, UNKNOWN) for word in split(line)], vocabulary)


TOKENIZERS: dict[str, Callable[..., Tokenizer | PretrainedTokenizer]] = {
    'bytes': byte_tokenizer,
    'hashed': hashed_tokenizer,
    'words': word_tokenizer,
    'pretrained': open_tokenizer,
}


def encode_texts(
    item: str | Mapping[str, Any],
    texts: Sequence[str],
    length: int,
    pairs: Sequence[str] | None = None,
    *,
    name: str,
    max_bytes: int = MAX_BYTES,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Encodes texts, or pairs of them, by the tokenizer that `item` describes; one too long loses its end.

    `name` is the source's, for error messages, and `max_bytes` the most that the tokens may take.

    Returns:
      the fields of examples: `tokens` int32 [texts, length], of pairs also `segments`, and `token_mask` bool, true for what
      is not padding, where the tokenizer pads with a token that texts have too (GPT-2's does); and how many tokens each text
      has, int32 [texts].
    """
    check_length(length)
    check_size(len(texts) * length * 4, name, max_bytes)
    tokenizer = make_tokenizer(item)
    if isinstance(tokenizer, Tokenizer):
        if pairs is not None:
            raise UserError(
                "tokenizer: a pair of texts is for tokenizer=dict(name='pretrained', source=…), which marks where one ends"
            )
        tokens = np.stack([tokenizer.encode(text, length) for text in texts])
        return {'tokens': tokens}, (tokens != 0).sum(1).astype(np.int32)
    fields = tokenizer(texts, length, pairs)
    mask = fields.pop('mask')
    if pairs is not None:
        fields.setdefault('segments', np.zeros_like(fields['tokens']))
    if not tokenizer.has_padding:
        fields['token_mask'] = mask
    return fields, mask.sum(1).astype(np.int32)


def words_of(text: str) -> list[str]:
    """`'Zwei Männer, ﬁn.'` -> `['zwei', 'männer', ',', 'fin', '.']`."""
    return WORD.findall(unicodedata.normalize('NFKC', text).lower())


def in_braces(path: str) -> list[str]:
    """`'{train,dev}.tsv'` -> `['train.tsv', 'dev.tsv']`."""
    match = re.fullmatch(r'(.*)\{([^{}]+)\}(.*)', path)
    return [f'{match[1]}{part}{match[3]}' for part in match[2].split(',')] if match else [path]


def read_lines(path: str, max_bytes: int = MAX_BYTES) -> list[str]:
    """The lines of a text file in UTF-8, which `read_bytes` reads."""
    try:
        text = read_bytes(path, max_bytes).decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not a text file in UTF-8 ({error})') from error
    lines = text.split('\n')
    return [line.rstrip('\r') for line in (lines[:-1] if lines[-1] == '' else lines)]


def read_bytes(path: str, max_bytes: int = MAX_BYTES) -> bytes:
    """A file, gzipped (`.gz`) or not, or a member of an archive: `DATA.tar[.gz|.xz|.bz2]/MEMBER`.

    Members are read in place: nothing is unpacked to disk.
    """
    archive = ARCHIVED.fullmatch(path)
    try:
        if archive:
            return _read_member(existing(archive[1], path), archive[2], max_bytes)
        with existing(path, path).open('rb') as stream:
            return _read(stream, path, max_bytes)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise UserError(f'{path}: not a readable file ({" ".join(str(error).split())})') from error


def _read_member(archive: Path, member: str, max_bytes: int) -> bytes:
    names = []
    with tarfile.open(archive) as tar:
        for item in tar:  # a compressed archive is read no further than it must be
            name = item.name.removeprefix('./')
            if item.isreg() and name == member.removeprefix('./'):
                with tar.extractfile(item) as stream:
                    return _read(stream, member, max_bytes)
            names += [name] if item.isreg() else []
        raise UserError(f'{archive}: has no file {member!r}; {nearest(member, names)}')


def _read(stream: BinaryIO, name: str, max_bytes: int) -> bytes:
    if name.endswith('.gz'):
        stream = gzip.GzipFile(fileobj=stream)
    data = stream.read(max_bytes + 1)
    check_size(len(data), name, max_bytes)
    return data


def check_length(length: int) -> None:
    """Refuses texts of no tokens."""
    if not isinstance(length, int) or length < 1:
        raise UserError(f'length={length!r:.80}: must be a whole number of tokens, at least 1')


def _column(file: str, column: int | None) -> Iterator[str]:
    """The lines of a file, or what stands in a column of its table."""
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        fields = [line] if column is None else line.split('\t')
        if column is not None and not 0 <= column < len(fields):
            raise UserError(
                f'{file}, line {number}: has {len(fields)} columns; tokenizer.column={column} counts from 0'
            )
        yield fields[column or 0]


def _check_vocabulary(vocabulary: int) -> None:
    if vocabulary < 3:
        raise UserError(f'tokenizer: vocabulary={vocabulary} must be at least 3: padding, unknown words and one more')
