"""Sentences of tagged words: a word and its tag a line, an empty line between sentences (CoNLL-2003's form)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax.data.base import MAX_BYTES, Source, check_size
from tl_jax.data.text import Tokenizer, check_length, make_tokenizer, read_lines
from tl_jax.data.tokenizers import PretrainedTokenizer
from tl_jax.errors import UserError, nearest

IGNORED = -1  # the label of what is no word's first token


def open_conll(
    path: str,
    *,
    tokenizer: str | Mapping[str, Any] = 'hashed',
    length: int = 128,
    word_column: int = 0,
    tag_column: int = -1,
    class_names: Sequence[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Source:
    """`conll:FILE`: an example is a sentence, `tokens` int32 [length] and `token_label` int32 [length].

    A word's first token has the word's tag, every other one, and what stands around words, `IGNORED`. Of a sentence of more
    than `length` tokens the last words are left out, of the figures too. Lines that begin with -DOCSTART- are skipped.

    Args:
      path: of the file; gzipped or not, also within an archive.
      tokenizer: see `tl_jax.data.text.make_tokenizer`.
      length: tokens of a sentence.
      word_column: of a line's fields, which tabs or spaces separate.
      tag_column: the same.
      class_names: the tags, in their order; those of the file, sorted, unless given. Splits want the same.
      max_bytes: of the file.
    """
    name = f'conll:{path}'
    sentences = _sentences(path, read_lines(path, max_bytes), word_column, tag_column)
    if not sentences:
        raise UserError(f'{name}: has no sentences')
    check_length(length)
    check_size(2 * len(sentences) * length * 4, name, max_bytes)
    names = list(class_names) if class_names else sorted({tag for sentence in sentences for _, tag, _ in sentence})
    for sentence in sentences:
        for _, tag, place in sentence:
            if tag not in names:
                raise UserError(f'{place}: tag {tag!r} is not in class_names; {nearest(tag, names)}')
    encode = make_tokenizer(tokenizer)
    pad = encode.pad_id if isinstance(encode, PretrainedTokenizer) else 0
    tokens = np.full((len(sentences), length), pad, np.int32)
    labels = np.full((len(sentences), length), IGNORED, np.int32)
    lengths = np.zeros(len(sentences), np.int32)
    for row, sentence in enumerate(sentences):
        ids, words = split_words(encode, [word for word, _, _ in sentence], length)
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
        for place, word in enumerate(words):
            if word is not None and (place == 0 or words[place - 1] != word):
                labels[row, place] = names.index(sentence[word][1])
    get = lambda i: {'tokens': tokens[i], 'token_label': labels[i]}
    return Source(name, len(sentences), get, class_names=tuple(names), lengths=lengths)


def split_words(
    tokenizer: Tokenizer | PretrainedTokenizer, words: Sequence[str], length: int
) -> tuple[list[int], list[int | None]]:
    """The ids of words, at most `length`, and for each the number of its word; None for what is of none, as [CLS]."""
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.check_room(length)
        tokenizer.tokenizer.enable_truncation(length, direction='right')
        found = tokenizer.tokenizer.encode(list(words), is_pretokenized=True)
        return found.ids, found.word_ids
    pairs = [(token, i) for i, word in enumerate(words) for token in tokenizer.split(word)][:length]
    return [token for token, _ in pairs], [i for _, i in pairs]


def _sentences(path: str, lines: list[str], word_column: int, tag_column: int) -> list[list[tuple[str, str, str]]]:
    """For each sentence its words: the word, its tag, and where they stand."""
    sentences: list[list[tuple[str, str, str]]] = [[]]
    for number, line in enumerate(lines, 1):
        fields = line.split('\t') if '\t' in line else line.split()
        if not line.strip() or fields[0] == '-DOCSTART-':
            sentences.append([])
            continue
        columns = (word_column, tag_column)
        if len(fields) < 2 or any(not -len(fields) <= column < len(fields) for column in columns):
            raise UserError(f'{path}, line {number}: {line[:60]!r} has no word and tag in columns {columns}')
        word, tag = (fields[column].strip() for column in columns)
        if not word or not tag:
            raise UserError(f'{path}, line {number}: its word or tag is empty; fill or remove the line')
        sentences[-1].append((word, tag, f'{path}, line {number}'))
    return [sentence for sentence in sentences if sentence]
