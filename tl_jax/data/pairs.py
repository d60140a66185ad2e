"""Pairs of two views of one thing: images and captions of their classes, sentences and their translations.

An example holds what the first tower reads (`image`, `inputs` or `tokens`) and `other_tokens` int32 [length] for the second.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax.data.base import MAX_BYTES, Source, need_labels, num_classes, select
from tl_jax.data.text import encode_texts, read_lines
from tl_jax.errors import UserError


def open_pairs(
    path: str,
    *,
    captions: Sequence[str] | None = None,
    class_pattern: str = '(.*)',
    templates: Sequence[str] = ('{}',),
    tokenizer: str | Mapping[str, Any] = 'bytes',
    length: int = 32,
    options: Mapping[str, Any] | None = None,
) -> Source:
    """`pairs:SPEC`: the examples of a labelled source, each with a caption made from the name of its class.

    Args:
      path: the spec of the labelled source, such as `npz:mnist.npz/train`.
      captions: a name for each class, in place of the source's own, whose underscores become spaces.
      class_pattern: regex; what its first group finds in a name is the class. Classes that agree become one, and those in
        which it finds nothing are left out: `'([^/]*)/.*rot000'` makes Omniglot's upright characters
        (`Greek/character01/rot000`) examples of their alphabets.
      templates: sentences with `{}` for the name; example i gets template i modulo their number.
      tokenizer: 'bytes', 'hashed' or 'words', or with options; see `tl_jax.data.text`.
      length: tokens of a caption.
      options: of the labelled source.
    """
    from tl_jax.data.sources import open_source  # sources.py lists this module's kinds

    name = f'pairs:{path}'
    source = open_source(path, **(options or {}))
    labels = need_labels(source, 'a caption')
    names, merged = _class_captions(name, source, captions, class_pattern)
    source = select(source, np.flatnonzero(merged[labels] >= 0))
    labels = merged[source.labels]
    texts = [[template.replace('{}', caption) for caption in names] for template in templates]
    if not texts or any('{}' not in template for template in templates):
        raise UserError(f"{name}: templates={list(templates)!r} need a {{}} for the name, such as 'a photo of {{}}'")
    tokens = _encode(texts, tokenizer, length, name)

    def get(i: int) -> dict:
        return {**source.get(i), 'label': int(labels[i]), 'other_tokens': tokens[i % len(templates), labels[i]]}

    return Source(name, source.length, get, labels, names)


def open_bitext(
    path: str,
    *,
    tokenizer: str | Mapping[str, Any] = 'hashed',
    other_tokenizer: str | Mapping[str, Any] | None = None,
    length: int = 32,
    max_bytes: int = MAX_BYTES,
) -> Source:
    """`bitext:DIR/train.{en,de}`: two files whose lines belong together; gzipped or not, also within a tar archive.

    Multi30k: `bitext:multi30k.tar/multi30k/data/task1/raw/train.{en,de}.gz`. An example is `tokens` int32 [length] of the
    first file's line and `other_tokens` of the second's, by `other_tokenizer` where that is given.
    """
    name = f'bitext:{path}'
    match = re.fullmatch(r'(.*)\{([^{},]+),([^{},]+)\}(.*)', path)
    if not match:
        raise UserError(f'{name}: name two files by braces, as in train.{{en,de}}.gz')
    files = [match[1] + part + match[4] for part in (match[2], match[3])]
    texts = [read_lines(file, max_bytes) for file in files]
    if len(texts[0]) != len(texts[1]):
        raise UserError(f'{name}: {len(texts[0])} lines in {files[0]} and {len(texts[1])} in {files[1]}; align them')
    for file, lines in zip(files, texts, strict=True):
        if not lines:
            raise UserError(f'{file}: has no lines')
        empty = next((i for i, line in enumerate(lines, 1) if not line.strip()), None)
        if empty:
            raise UserError(f'{file}, line {empty}: is empty; remove it from both files')
    tokens, other_tokens = (
        encode_texts(item, lines, length, name=name, max_bytes=max_bytes)[0]['tokens']
        for item, lines in zip((tokenizer, other_tokenizer or tokenizer), texts, strict=True)
    )
    return Source(name, len(tokens), lambda i: {'tokens': tokens[i], 'other_tokens': other_tokens[i]})


def _class_captions(
    name: str, source: Source, captions: Sequence[str] | None, pattern: str
) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the pairs' classes, and the new class of each of the source's, int32 [classes]; -1: left out."""
    classes = num_classes(source)
    if captions is None and source.class_names is None:
        raise UserError(f'{name}: its classes have no names; give captions=[…], one for each of the {classes}')
    if captions is not None and len(captions) != classes:
        raise UserError(f'{name}: {len(captions)} captions for {classes} classes')
    given = list(captions) if captions is not None else [c.replace('_', ' ') for c in source.class_names]
    try:
        found = [re.search(pattern, text) for text in given]
        texts = [match[1] if match else None for match in found]
    except (re.error, IndexError) as error:
        raise UserError(f'{name}: class_pattern={pattern!r} is no regex with a group ({error})') from None
    names = tuple(dict.fromkeys(text for text in texts if text))
    if not names:
        raise UserError(f'{name}: class_pattern={pattern!r} finds nothing in any name, such as {given[0]!r}')
    if len(names) < len(texts):  # the order of merged classes should not depend on which a split has
        names = tuple(sorted(names))
    return names, np.array([names.index(text) if text else -1 for text in texts], np.int32)


def _encode(texts: Sequence[Sequence[str]], tokenizer: str | Mapping[str, Any], length: int, name: str) -> np.ndarray:
    """Tokens int32 [templates, classes, length]; two classes whose captions have the same ones are refused."""
    fields, _ = encode_texts(tokenizer, [text for row in texts for text in row], length, name=name)
    tokens = fields['tokens'].reshape(len(texts), -1, length)
    for row, ids in zip(texts, tokens, strict=True):
        seen: dict[bytes, str] = {}
        for text, key in zip(row, map(np.ndarray.tobytes, ids), strict=True):
            if key in seen:
                raise UserError(f'{name}: {seen[key]!r} and {text!r} have the same tokens; raise length ({length})')
            seen[key] = text
    return tokens
