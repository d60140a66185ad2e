"""The raw text of ../shared/data that no evaluation split contains, and a WordPiece vocabulary of it.

    python -m experiments.text_corpus runs/text_corpus        # corpus.txt, vocab.txt; half a minute

One text a line, in a fixed order. AG News is here without its training file: its `dev.tsv`, 10,000 texts of the official
training set, counts as one. Left out: every other file named dev, val or test, and of the rest each text that, by its words
in lower case, is one of theirs, shares 8 words in a row with one, or, if shorter, stands within one: SST-2's training phrases
are parts of the sentences that MR's test file has. The phrases of SST-2's `dev.tsv` are a random tenth of all phrases of the
training sentences, so for them only the first holds. Texts of fewer than 4 words and repetitions go too; long ones are cut
into pieces of 90 words.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from tl_jax.data.text import read_lines

DATA = '../shared/data'
SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
VOCABULARY = 8192
SHARED_WORDS, FEWEST_WORDS, MOST_WORDS, FEWEST_SIGNS = 8, 4, 90, 10


class File(NamedTuple):
    """A file with texts: its columns that hold some, where it has columns, and whether the first line names them."""

    path: str
    columns: tuple[int, ...] = ()
    header: bool = False
    clean: Callable[[str], str] = str.strip


def first_word_off(line: str) -> str:
    return line.partition(' ')[2]


ARCHIVE = f'{DATA}/text.tar.xz'
GLUE, SENTEVAL = f'{ARCHIVE}/glue_cola_rte_wnli/data', f'{ARCHIVE}/senteval_cr_mr_mpqa_subj_sst2'
CAPTIONS = f'{DATA}/multi30k.tar/multi30k/data/task1/raw'
PAIR = dict(columns=(1, 2))
TRAINING = [
    File(f'{ARCHIVE}/sst2_agnews/data/SST-2/train.tsv', (0,), header=True),
    *(File(f'{SENTEVAL}/{name}/train.tsv', (1,)) for name in ('MR', 'SUBJ', 'CR', 'MPQA', 'SST2')),
    File(f'{GLUE}/CoLA/train.tsv', (3,)),
    File(f'{GLUE}/RTE/train.tsv', header=True, **PAIR),
    File(f'{GLUE}/WNLI/train.tsv', header=True, **PAIR),
    File(f'{ARCHIVE}/mrpc/msr_paraphrase_train.txt', (3, 4), header=True),
    File(f'{ARCHIVE}/trec/data/TREC/train.txt', (0,), clean=first_word_off),
    File(f'{ARCHIVE}/sst2_agnews/data/agnews/dev.tsv', (0,)),
    File(f'{CAPTIONS}/train.en.gz'),
]
PHRASES = File(f'{ARCHIVE}/sst2_agnews/data/SST-2/dev.tsv', (0,), header=True)
EVALUATION = [
    File(f'{ARCHIVE}/sst2_agnews/data/SST-2/test.tsv', (0,), header=True),
    *(File(f'{SENTEVAL}/{name}/dev.tsv', (1,)) for name in ('MR', 'SUBJ', 'CR', 'MPQA', 'SST2')),
    File(f'{SENTEVAL}/CoLA/dev.tsv', (0,)),
    File(f'{GLUE}/CoLA/val.tsv', (3,)),
    File(f'{GLUE}/CoLA/dev.tsv', (3,)),
    File(f'{GLUE}/CoLA/test.tsv', (1,), header=True),
    *(File(f'{GLUE}/{name}/val.tsv', **PAIR) for name in ('RTE', 'WNLI')),
    *(File(f'{GLUE}/{name}/{part}.tsv', header=True, **PAIR) for name in ('RTE', 'WNLI') for part in ('dev', 'test')),
    File(f'{ARCHIVE}/mrpc/msr_paraphrase_test.txt', (3, 4), header=True),
    *(File(f'{ARCHIVE}/trec/data/TREC/{part}.txt', (0,), clean=first_word_off) for part in ('dev', 'test')),
    File(f'{ARCHIVE}/sst2_agnews/data/agnews/test.tsv', (0,)),
    *(File(f'{CAPTIONS}/{part}.en.gz') for part in ('val', 'test_2016_flickr', 'test_2017_flickr', 'test_2017_mscoco')),
]


def texts_of(file: File) -> Iterator[str]:
    """The texts of a file, in its order."""
    for line in read_lines(file.path)[file.header :]:
        fields = line.split('\t') if file.columns else [line]
        yield from (file.clean(fields[column]) for column in file.columns or (0,))


def normal(text: str) -> tuple[str, ...]:
    """The words by which texts are compared: letters and digits in lower case."""
    return tuple(re.findall(r'[a-z0-9]+', text.lower()))


def runs_of(words: tuple[str, ...], length: int = SHARED_WORDS) -> Iterator[tuple[str, ...]]:
    """All runs of so many words; none of a shorter text."""
    return (words[i : i + length] for i in range(len(words) - length + 1))


def parts_of(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The runs of words that no text of the corpus may share, nor, of the shorter ones, be."""
    return (run for length in range(FEWEST_WORDS, SHARED_WORDS + 1) for run in runs_of(words, length))


def kept(texts: Iterable[str], same: set[tuple[str, ...]], shared: set[tuple[str, ...]], why: Counter) -> Iterator[str]:
    """The texts that are neither in `same` nor share a run of words in `shared`, each once; counts the others in `why`.

    Of a text of fewer than 8 words the run is all of it.
    """
    seen = set()
    for text in texts:
        words = normal(text)
        if words in same:
            why['an evaluation text'] += 1
        elif any(run in shared for run in runs_of(words, min(len(words), SHARED_WORDS))):
            why[f'{SHARED_WORDS} words of an evaluation text, or a shorter part'] += 1
        elif len(words) < FEWEST_WORDS:
            why[f'fewer than {FEWEST_WORDS} words'] += 1
        elif words in seen:
            why['repeated'] += 1
        else:
            seen.add(words)
            yield text


def pieces(text: str) -> Iterator[str]:
    """A long text in parts."""
    words = text.split()
    return (' '.join(words[i : i + MOST_WORDS]) for i in range(0, len(words), MOST_WORDS))


def train_wordpiece(texts: list[str], size: int = VOCABULARY) -> list[str]:
    """The vocabulary of a WordPiece of lower-case words, in the order of its ids; the same in every run.

    The trainer of `tokenizers` numbers the signs within words as its hash table yields them, and breaks ties between pairs
    by number. Named as special tokens, in order, they have their numbers beforehand.
    """
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    signs = Counter(sign for text in texts for sign in tokenizer.normalizer.normalize_str(text))
    common = sorted(sign for sign, count in signs.items() if count >= FEWEST_SIGNS and not sign.isspace())
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, *(f'##{sign}' for sign in common)],
        limit_alphabet=len(common),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def main(folder: str) -> None:
    same = {normal(text) for file in [*EVALUATION, PHRASES] for text in texts_of(file)}
    shared = {run for file in EVALUATION for text in texts_of(file) for run in parts_of(normal(text))}
    why: Counter = Counter()
    texts = list(kept((text for file in TRAINING for text in texts_of(file)), same, shared, why))
    lines = [piece for text in texts for piece in pieces(text) if len(piece.split()) >= FEWEST_WORDS]
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / 'corpus.txt').write_text('\n'.join(lines) + '\n')
    (out / 'vocab.txt').write_text('\n'.join(train_wordpiece(lines)) + '\n')
    left_out = ', '.join(f'{count:,} {reason}' for reason, count in why.items())
    print(f'{len(lines):,} texts of {sum(len(line.split()) for line in lines):,} words; left out: {left_out}')


if __name__ == '__main__':
    main(*sys.argv[1:])
