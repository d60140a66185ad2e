import io
import zipfile

import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.report import runs


def test_reads_a_run(tmp_path, make_run):
    run = runs.read_run(make_run(tmp_path / 'run'))
    assert run.notes == () and run.finished and run.splits == ('test',)
    assert runs.number(run.summary, 'metrics', 'test/accuracy') == 0.75
    assert runs.integers(run.summary, 'parameters', 'trainable') == (850, 61706)
    assert runs.stage_starts(run.records) == [20]


@pytest.mark.parametrize('name', ['config.json', 'metrics.jsonl', 'summary.json'])
def test_a_missing_or_broken_file_is_a_note(tmp_path, make_run, name):
    path = make_run(tmp_path / 'run')
    (path / name).write_text('{"step": 1, "tra')
    assert any(name in note for note in runs.read_run(path).notes)
    (path / name).unlink()
    assert any(name in note for note in runs.read_run(path).notes)


def test_a_half_written_file_is_not_a_split(tmp_path, make_run):
    path = make_run(tmp_path / 'run')
    (path / 'predictions/.val.12.partial.npz').write_bytes(b'')
    assert runs.read_run(path).splits == ('test',)


def test_no_run_at_all_is_an_error(tmp_path):
    with pytest.raises(UserError, match='not a run directory'):
        runs.read_run(tmp_path)
    with pytest.raises(UserError, match='not a sweep directory'):
        runs.find_runs(tmp_path)


def test_a_resumed_runs_later_record_counts_and_nan_is_left_out():
    records = [
        {'step': 1, 'loss': 3},
        {'step': 2, 'loss': 9},
        {'step': 2, 'loss': 2},
        {'step': 3, 'loss': float('nan')},
    ]
    steps, values = runs.curve(records, 'loss')
    assert steps.tolist() == [1, 2] and values.tolist() == [3, 2]


@pytest.mark.parametrize('value', [True, 'x', None, float('inf'), [1]])
def test_number_refuses_what_is_no_number(value):
    assert runs.number({'a': value}, 'a') is None


def predictions_file(tmp_path, **changes):
    arrays = {
        'label': np.array([0, 1, 1]),
        'probabilities': np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], np.float32),
        'class_names': np.array(['a', 'b']),
    }
    path = tmp_path / 'test.npz'
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


def test_predictions(tmp_path):
    found, notes = runs.read_predictions(predictions_file(tmp_path))
    assert notes == [] and found.predicted.tolist() == [0, 1, 0] and found.index.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'label': np.array([0, 1])}, 'should be'),
        ({'label': None}, 'label'),
        ({'label': np.array([0.0, 1.0, 1.0])}, 'not integer'),
        ({'label': np.array([5, 5, 5])}, 'no row'),
        ({'probabilities': np.array([{'a': 1}] * 3, object)}, 'cannot be used'),
    ],
)
def test_unusable_predictions_are_a_note(tmp_path, changes, said):
    found, notes = runs.read_predictions(predictions_file(tmp_path, **changes))
    assert found is None and said in notes[0] and 'test.npz' in notes[0]


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'label': np.array([0, -1, 7])}, '2 of 3 rows'),
        ({'class_names': np.array(['only'])}, '1 class names for 2'),
        ({'features': np.zeros((2, 4))}, 'features'),
        ({'worst_images': np.zeros((1, 8, 8)), 'worst_index': np.array([0])}, 'worst_images'),
    ],
)
def test_odd_predictions_are_used_with_a_note(tmp_path, changes, said):
    found, notes = runs.read_predictions(predictions_file(tmp_path, **changes))
    assert found is not None and said in notes[0]


def test_pickled_arrays_are_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / 'owned'), 'w'))

    found, _ = runs.read_predictions(predictions_file(tmp_path, features=np.array([Payload()], object)))
    assert found is None and not (tmp_path / 'owned').exists()


def test_size_is_checked_before_memory_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, 'MAX_ARRAY_BYTES', 100)
    found, notes = runs.read_predictions(predictions_file(tmp_path))
    assert found is None and 'unpacks to' in notes[0]


def test_a_header_that_claims_more_than_there_is(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {'descr': '<f8', 'fortran_order': False, 'shape': (2**50,)})
    with zipfile.ZipFile(tmp_path / 'test.npz', 'w') as archive:
        archive.writestr('label.npy', header.getvalue())
    found, notes = runs.read_predictions(tmp_path / 'test.npz')
    assert found is None and 'cannot be used' in notes[0]


def test_not_a_zip_at_all(tmp_path):
    (tmp_path / 'test.npz').write_bytes(b'no zip')
    assert runs.read_predictions(tmp_path / 'test.npz')[0] is None
