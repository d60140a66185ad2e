"""The page's sections on a student and its teachers."""

import html
import json
import re

import numpy as np
import pytest
from scipy.special import rel_entr, softmax
from sklearn import metrics

from tl_jax.report import scores, write_run_report

NAMES = ('cat', 'dog', 'eel')


def test_outcomes_are_each_pattern_once():
    label, student, teacher = np.array([[0, 0, 0], [1, 1, 0], [2, 0, 2], [0, 1, 1], [0, 1, 2]]).T
    assert scores.outcomes(label, student, teacher).tolist() == [0, 1, 2, 3, 4]
    found = scores.outcomes(label, teacher, student)  # the other way round, who is alone changes and nothing else
    assert found.tolist() == [0, 2, 1, 3, 4]


def test_divergence_equals_scipy():
    p, q = softmax(3 * np.random.default_rng(0).normal(size=(2, 50, 7)), -1)
    np.testing.assert_allclose(scores.divergence(p, q), rel_entr(p, q).sum(1), rtol=1e-12)
    assert scores.divergence(p, p) == pytest.approx(0)


def test_divergence_of_probabilities_that_underflowed():
    p, q = np.array([[0.5, 0.5, 0.0]], np.float32), np.array([[1.0, 0.0, 0.0]], np.float32)
    assert scores.divergence(q, p) == pytest.approx(np.log(2))
    # log 2^-126 of the smallest normal number.
    assert scores.divergence(p, q) == pytest.approx(np.log(0.5) + 0.5 * 126 * np.log(2))


def teach(run, role, seed=7, **changes):
    """Stores what a teacher says of the run's test split; returns its probabilities."""
    with np.load(run / 'predictions/test.npz') as stored:
        kept = {name: stored[name] for name in ('index', 'label', 'class_names')}
    logits = np.random.default_rng(seed).normal(size=(len(kept['label']), len(kept['class_names'])))
    probabilities = softmax(2 * logits, -1).astype(np.float32)
    (run / 'predictions' / role).mkdir()
    np.savez(run / f'predictions/{role}/test.npz', probabilities=probabilities, **{**kept, **changes})
    return probabilities


def networks(**teachers):
    size = lambda parameters, rate: {
        'parameters': parameters, 'bytes': 4 * parameters, 'examples_per_second': rate, 'batch': 256
    }  # fmt: skip
    return {'student': size(1000, 900.0), **{role: size(*given) for role, given in teachers.items()}}


def words_of(run):
    page = write_run_report(run).read_text()
    return ' '.join(html.unescape(re.sub('<[^>]*>', ' ', page)).split())


@pytest.fixture
def run(tmp_path, make_run):
    return make_run(tmp_path / 'run', networks=networks(teacher=(2_500_000, 45.0)))


def test_a_teacher_stands_beside_its_student(run):
    theirs = teach(run, 'teacher')
    words = words_of(run)
    with np.load(run / 'predictions/test.npz') as stored:
        label, mine = stored['label'], stored['probabilities']
    said, taught = mine.argmax(1), theirs.argmax(1)
    agreement = 100 * metrics.accuracy_score(said, taught)
    forward, backward = rel_entr(theirs, mine).sum(1).mean(), rel_entr(mine, theirs).sum(1).mean()
    row = f'75.00 {100 * metrics.accuracy_score(label, taught):.2f} {agreement:.2f} {forward:.4f} {backward:.4f}'
    assert f'test teacher 40 {row}' in words
    alone = int(np.sum((said == label) & (taught != label)))
    assert f'student alone {alone} {100 * alone / 40:.2f}' in words and 0 < alone < 40
    assert '2,500,000 2,500 10 45 0.05' in words and '1,000 1 0.004 900 1' in words
    assert words.count('Expected calibration error') == 3  # of both, and in the section of the student's classes


def test_the_pairs_on_which_they_disagree_are_counted(tmp_path, make_run):
    run = make_run(tmp_path / 'run', accuracy=1.0, class_names=NAMES, count=6)  # labels 0 1 2 0 1 2, all right
    teach(run, 'teacher')
    path = run / 'predictions/teacher/test.npz'
    with np.load(path) as stored:
        columns = dict(stored)
    np.savez(path, **{**columns, 'probabilities': np.eye(3, dtype=np.float32)[[0, 2, 2, 0, 2, 1]]})
    words = words_of(run)
    assert 'dog eel 2 2 0' in words and 'eel dog 1 1 0' in words and 'both 3 50.00' in words
    assert 'test teacher 6 100.00 50.00 50.00' in words


def test_several_teachers_have_a_row_and_a_diagram_each(tmp_path, make_run):
    sizes = {'teacher': (3000, 300.0), 'teacher2': (5000, 200.0), 'teacher10': (7000, 100.0)}
    run = make_run(tmp_path / 'run', networks=networks(**sizes))
    for seed, role in enumerate(sizes):
        teach(run, role, seed=seed)
    words = words_of(run)
    places = [words.index(f'Student and {role}: who is right') for role in sizes]
    assert places == sorted(places) and words.count('Expected calibration error') == 5


@pytest.mark.parametrize(
    'changes',
    [
        {'index': np.arange(40)},
        {'label': np.zeros(40, int)},
        {'class_names': np.array(['dog', 'cat', 'eel'])},
    ],
)
def test_predictions_of_something_else_are_not_compared(run, changes):
    teach(run, 'teacher', **changes)
    words = words_of(run)
    assert 'teacher/test.npz: other examples, labels or classes than test.npz; not compared.' in words
    assert 'who is right' not in words and '2,500,000' in words  # size and speed are still told


def test_hostile_names_stay_text(tmp_path, make_run):
    run = make_run(tmp_path / 'run', class_names=('<script>', '"><img src=x>'), networks=networks(**{'<b>x': (1, 1.0)}))
    teach(run, 'teacher<i>')
    page = write_run_report(run).read_text()
    assert not any(tag in page for tag in ('<script>', '<img src=x', '<b>', '<i>'))
    assert 'teacher&lt;i&gt;: who is right' in page and '&lt;b&gt;x' in page


def test_a_damaged_file_is_a_note(run):
    teach(run, 'teacher')
    (run / 'predictions/teacher/test.npz').write_bytes(b'PK not an archive')
    words = words_of(run)
    assert 'teacher/test.npz cannot be used' in words and 'who is right' not in words


def test_a_summary_without_measures_leaves_dashes(tmp_path, make_run):
    run = make_run(tmp_path / 'run')
    teach(run, 'teacher')
    summary = json.loads((run / 'summary.json').read_text())
    (run / 'summary.json').write_text(json.dumps(summary | {'networks': ['nonsense']}))
    words = words_of(run)
    assert 'who is right' in words and 'Speed:' not in words


def test_a_run_without_teachers_has_no_such_sections(tmp_path, make_run):
    words = words_of(make_run(tmp_path / 'run'))
    assert 'Student and teacher' not in words and 'Agreement' not in words
