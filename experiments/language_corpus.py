"""What configs/language.py reads, from AG News of ../shared/data: its texts, and their words with the capitals as tags.

    python -m experiments.language_corpus runs/language        # news.txt, capitals.{train,test}.conll; seconds

No set of named entities is at hand, but in news most runs of capitalised words are names. So words are in lower case, and the
tags say where such a run was (as truecasing teaches taggers, Mayhew et al. 2020, arXiv:1912.07095): B-NAME begins it, I-NAME
goes on. A text's first word has a capital anyway and is always O; those of its later sentences are not known to be firsts and
count as names. `dev.tsv`, a part of the official training set, is learnt from; `test.tsv` is one of the official test set.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tl_jax.data.text import read_lines

NEWS = '../shared/data/text.tar.xz/sst2_agnews/data/agnews'


def texts_of(name: str) -> list[str]:
    return [line.partition('\t')[0] for line in read_lines(f'{NEWS}/{name}.tsv')]


def tagged(text: str) -> Iterator[tuple[str, str]]:
    """The words and signs of a text in lower case, with the tags of its capitals."""
    before = 'O'
    for number, word in enumerate(re.findall(r"\w+(?:['’]\w+)?|[^\w\s]", text)):
        capital = word[0].isupper()
        tag = 'O' if not capital or not number else 'I-NAME' if before != 'O' else 'B-NAME'
        yield word.lower(), tag
        before = tag


def main(folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / 'news.txt').write_text('\n'.join(texts_of('dev')) + '\n')
    for part, name in (('train', 'dev'), ('test', 'test')):
        sentences = ['\n'.join(f'{word}\t{tag}' for word, tag in tagged(text)) for text in texts_of(name)]
        (out / f'capitals.{part}.conll').write_text('\n\n'.join(sentences) + '\n')


if __name__ == '__main__':
    main(*sys.argv[1:])
