"""Entities against seqeval, whose answers entities_from_seqeval.py has stored."""

import json
from pathlib import Path

import pytest

from tl_jax.entities import entities_of, entity_figures

CASES = json.loads(Path(__file__).with_name('entities_seqeval.json').read_text())


@pytest.mark.parametrize('case', CASES)
def test_as_seqeval(case):
    for tags, expected in zip(case['true'], case['entities'], strict=True):
        assert [list(entity) for entity in entities_of(tags)] == expected
    assert entity_figures(case['true'], case['predicted']) == pytest.approx(case['figures'], rel=1e-12)
    assert 0.1 < case['figures']['f1'] < 0.9


def test_by_hand():
    true = [['O', 'B-PER', 'I-PER', 'O', 'I-LOC']]
    assert [tuple(e) for e in entities_of(true[0])] == [('PER', 1, 2), ('LOC', 4, 4)]
    found = entity_figures(true, [['O', 'B-PER', 'O', 'O', 'B-LOC']])
    assert found == {'precision': 0.5, 'recall': 0.5, 'f1': 0.5}
    assert entity_figures([['O']], [['O']])['f1'] == 0
