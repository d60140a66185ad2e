"""Texts to learn a language from: the lines of a file, each by itself, or joined and cut into windows."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tl_jax.data.base import MAX_BYTES, Source
from tl_jax.data.text import Tokenizer, check_length, encode_texts, make_tokenizer, read_lines
from tl_jax.data.tokenizers import PretrainedTokenizer
from tl_jax.errors import UserError

ENDS = ('<|endoftext|>', '</s>', '[SEP]')


def open_lines(
    path: str, *, tokenizer: str | Mapping[str, Any] = 'hashed', length: int = 128, max_bytes: int = MAX_BYTES
) -> Source:
    """`lines:FILE`: a text a line, empty lines aside; FILE may be gzipped or `ARCHIVE.tar.xz/MEMBER`.

    An example is `tokens` int32 [length], the text's own or, of a longer one, its first.
    """
    name = f'lines:{path}'
    texts = [line for line in read_lines(path, max_bytes) if line.strip()]
    if not texts:
        raise UserError(f'{name}: has no text')
    fields, lengths = encode_texts(tokenizer, texts, length, name=name, max_bytes=max_bytes)
    return Source(name, len(texts), lambda i: {field: rows[i] for field, rows in fields.items()}, lengths=lengths)


def open_packed(
    path: str,
    *,
    tokenizer: str | Mapping[str, Any] = 'bytes',
    length: int = 128,
    end: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Source:
    """`packed:FILE`: the lines of a file one after the other, each with an end token, cut into windows.

    An example is `tokens` int32 [length]. Every token is in one window, and none is padding; what does not fill the last
    window is left out, fewer than `length` tokens. A window's texts see one another: nothing marks them apart but the end
    token.

    Args:
      path: as of `lines:`.
      tokenizer: see `tl_jax.data.text.make_tokenizer`.
      length: of a window.
      end: id of the end token; `<|endoftext|>`, `</s>` or `[SEP]` of a pretrained tokenizer unless given.
      max_bytes: of the file.
    """
    name = f'packed:{path}'
    check_length(length)
    encode = make_tokenizer(tokenizer)
    end = _end_token(encode, name) if end is None else end
    if not 0 <= end < encode.vocabulary:
        raise UserError(f'{name}: end={end} is no id of its tokenizer, 0 … {encode.vocabulary - 1}')
    stream = [token for line in read_lines(path, max_bytes) if line.strip() for token in (*_plain(encode, line), end)]
    windows = len(stream) // length
    if not windows:
        raise UserError(f'{name}: has {len(stream)} tokens, fewer than one window of length={length}')
    tokens = np.array(stream[: windows * length], np.int32).reshape(windows, length)
    return Source(name, windows, lambda i: {'tokens': tokens[i]})


def _plain(tokenizer: Tokenizer | PretrainedTokenizer, text: str) -> list[int]:
    """The ids of a text without special tokens."""
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.tokenizer.no_truncation()
        return tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.split(text)


def _end_token(tokenizer: Tokenizer | PretrainedTokenizer, name: str) -> int:
    ids = [tokenizer.tokenizer.token_to_id(t) for t in ENDS] if isinstance(tokenizer, PretrainedTokenizer) else []
    found = next((i for i in ids if i is not None), None)
    if found is None:
        raise UserError(f'{name}: its tokenizer has no end token; name an id with `end`, such as 0 of bytes')
    return found
