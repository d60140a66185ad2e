"""The corpus that the text encoder learns from holds no part of a text that is judged."""

from collections import Counter

import pytest

from experiments.text_corpus import kept, normal, parts_of

JUDGED = 'The film , though long , is a warm and funny look at people who never quite grew up .'
PHRASE = 'a phrase to choose by'


def kept_of(*texts):
    same = {normal(text) for text in (JUDGED, PHRASE)}
    return list(kept(texts, same, set(parts_of(normal(JUDGED))), Counter()))


@pytest.mark.parametrize(
    'text',
    [
        JUDGED.upper(),
        'Is a warm, and funny',  # SST-2's phrases are parts of MR's sentences
        'a warm and funny look at people',
        'a warm and funny look at people who',
        'they call it a warm and funny look at people who shout',
        'A phrase to choose by!',
        'too few words',
    ],
)
def test_left_out(text):
    assert kept_of(text) == []


@pytest.mark.parametrize(
    'text',
    [
        'a warm and clever look',
        'they call it a warm and funny look at people',  # seven words in a row, and more of its own
        'here a phrase to choose by',
    ],
)
def test_stays_once(text):
    assert kept_of(text, text.upper()) == [text]
