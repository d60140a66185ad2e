"""Streams: purity in (seed, step, row), coverage, sharding, restart, errors and threads; exact evaluation."""

import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tl_jax.data import Source, eval_batches, iterate, open_source, train_stream
from tl_jax.data.order import class_balanced, permute, shuffled
from tl_jax.errors import UserError

AUGMENT = [{'name': 'random_crop', 'size': 8, 'padding': 2}, 'flip', {'name': 'noise', 'stddev': 0.1}, 'to_float']


def numbered(length, labels=None):
    """A source whose image at i is filled with i."""
    labels = np.zeros(length, np.int32) if labels is None else np.asarray(labels, np.int32)
    return Source(
        'numbered', length, lambda i: {'image': np.full((2, 2, 1), i, np.uint8), 'label': int(labels[i])}, labels
    )


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for field in first:
        np.testing.assert_array_equal(first[field], second[field])


@pytest.fixture(scope='module')
def digits():
    return open_source('sklearn:digits/train')


def test_batch_fields(digits):
    batch = train_stream(digits, batch_size=16, seed=0, transforms=['to_float']).batch_at(3)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        'image': ((16, 8, 8, 1), 'float32'),
        'label': ((16,), 'int32'),
        'index': ((16,), 'int32'),
    }
    for row, index in enumerate(batch['index']):
        example = digits.get(int(index))
        assert example['label'] == batch['label'][row]
        np.testing.assert_array_equal(batch['image'][row], (example['image'] / np.float32(255)).astype(np.float32))


def test_image_without_to_float_keeps_its_units():
    batch = train_stream(numbered(200), batch_size=4, seed=0).batch_at(0)
    assert batch['image'].dtype == np.float32 and batch['image'][:, 0, 0, 0].tolist() == batch['index'].tolist()


@pytest.mark.parametrize('balance', [None, 'class'])
@pytest.mark.parametrize('processes', [1, 2, 4, 8])
def test_same_batch_on_any_number_of_processes(digits, balance, processes):
    stream = train_stream(digits, batch_size=24, seed=7, transforms=AUGMENT, balance=balance)
    whole = stream.batch_at(41)
    parts = [stream.batch_at(41, p, processes) for p in range(processes)]
    assert_equal({f: np.concatenate([part[f] for part in parts]) for f in whole}, whole)


def test_restart_at_any_step_is_exact(digits):
    streams = {
        'source': train_stream(digits, batch_size=16, seed=1, transforms=AUGMENT),
        'target': train_stream(digits, batch_size=8, seed=2, transforms=AUGMENT),
    }
    run = list(itertools.islice(iterate(streams), 50))
    for start in (0, 1, 37, 49):
        resumed = next(iterate(streams, start))
        for name in streams:
            assert_equal(run[start][name], resumed[name])


@pytest.mark.parametrize('threads', [0, 1, 5])
def test_threads_do_not_change_the_order(digits, threads):
    stream = train_stream(digits, batch_size=16, seed=1, transforms=AUGMENT)
    for step, batch in enumerate(itertools.islice(iterate({'a': stream}, threads=threads), 12)):
        assert_equal(batch['a'], stream.batch_at(step))


@pytest.mark.parametrize('length', [1, 2, 7, 101])
def test_every_epoch_holds_every_example_once(length):
    stream = train_stream(numbered(length), batch_size=5, seed=3)
    order = np.concatenate([stream.batch_at(t)['index'] for t in range(length)]).reshape(5, length)
    assert all(sorted(epoch) == list(range(length)) for epoch in order.tolist())
    if length > 6:
        assert len({tuple(epoch) for epoch in order.tolist()}) == 5


def test_without_shuffle_the_order_is_the_source_s():
    stream = train_stream(numbered(5), batch_size=4, seed=3, shuffle=False)
    assert np.concatenate([stream.batch_at(t)['index'] for t in range(3)]).tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]


def test_seeds_and_epochs_are_unrelated():
    first, second = (shuffled(600, seed)(np.arange(1200)).reshape(2, 600) for seed in (0, 1))
    for a, b in itertools.combinations([*first, *second], 2):
        assert (a == b).sum() < 8  # 1 is expected


def test_permutations_are_uniform():
    draws, length = 20_000, 11
    order = shuffled(length, 0)(np.arange(draws * length)).reshape(draws, length)
    counts = np.stack([np.bincount(place, minlength=length) for place in order.T])
    expected = draws / length
    assert 60 < ((counts - expected) ** 2 / expected).sum() < 150  # χ² of 100 degrees of freedom


def test_order_is_frozen():
    """A stored run must continue with the same examples after an upgrade of this package."""
    assert shuffled(10, 0)(np.arange(20)).tolist() == [7, 9, 4, 6, 5, 8, 1, 2, 0, 3, 9, 0, 8, 2, 4, 7, 3, 6, 1, 5]
    assert shuffled(10**8, 5)(np.array([0, 1, 10**12])).tolist() == [47380632, 61443622, 32807745]
    assert class_balanced(np.array([0, 0, 0, 1, 2, 2]), 0)(np.arange(9)).tolist() == [1, 5, 3, 3, 4, 0, 5, 2, 3]


def test_far_places_of_a_large_set_cost_nothing():
    places = np.arange(10**14, 10**14 + 1000)
    started = time.perf_counter()
    order = shuffled(10**8, 0)(places)
    assert time.perf_counter() - started < 0.5
    assert len(np.unique(order)) == 1000 and order.min() >= 0 and order.max() < 10**8


def test_permute_is_a_bijection_for_mixed_lengths():
    lengths = np.repeat([1, 2, 5, 97], [1, 2, 5, 97])
    places = np.concatenate([np.arange(n) for n in (1, 2, 5, 97)])
    sent = permute(places, lengths, np.uint64(99))
    assert [sorted(sent[lengths == n]) for n in (1, 2, 5, 97)] == [list(range(n)) for n in (1, 2, 5, 97)]


def test_class_balance():
    labels = [0] * 50 + [1] * 3 + [4] * 10
    stream = train_stream(numbered(63, labels), batch_size=30, seed=0, balance='class')
    batches = [stream.batch_at(t) for t in range(10)]
    assert all(np.bincount(batch['label'], minlength=5).tolist() == [10, 10, 0, 0, 10] for batch in batches)
    order = np.concatenate([batch['index'] for batch in batches])
    rare = order[(order >= 50) & (order < 53)]
    assert all(sorted(turn) == [50, 51, 52] for turn in rare[:99].reshape(-1, 3).tolist())
    assert sorted(order[order < 50][:50]) == list(range(50))


@pytest.mark.parametrize('length', [1, 13, 101])
@pytest.mark.parametrize('processes', [1, 2, 3, 6])
def test_evaluation_counts_every_example_once(length, processes):
    source = numbered(length, np.arange(length) % 3)
    batches = [
        list(eval_batches(source, batch_size=6, process_index=p, process_count=processes)) for p in range(processes)
    ]
    assert len({len(b) for b in batches}) == 1
    assert {b['image'].shape for p in batches for b in p} == {(6 // processes, 2, 2, 1)}
    everything = {
        field: np.concatenate([p[t][field] for t in range(len(batches[0])) for p in batches])
        for field in ('image', 'label', 'index', 'mask')
    }
    real = everything['mask'] == 1
    assert everything['index'][real].tolist() == list(range(length))
    assert everything['label'][real].tolist() == (np.arange(length) % 3).tolist()
    assert everything['image'][real, 0, 0, 0].tolist() == list(range(length))
    assert set(everything['index'][~real]) <= {-1} and not everything['image'][~real].any()
    assert everything['mask'].dtype == np.float32 and real.sum() == length


def test_evaluation_without_labels():
    source = numbered(5)
    unlabelled = source._replace(get=lambda i: {'image': source.get(i)['image']}, labels=None)
    batches = list(eval_batches(unlabelled, batch_size=4))
    assert [set(batch) for batch in batches] == [{'image', 'index', 'mask'}] * 2


def test_user_errors_reach_the_consumer_in_their_place():
    def get(i):
        if i == 9:
            raise UserError('cat/9.png: not a readable image')
        return {'image': np.zeros((2, 2, 1), np.uint8), 'label': 0}

    source = Source('broken', 20, get, np.zeros(20, np.int32))
    batches = iterate({'a': train_stream(source, batch_size=4, seed=0, shuffle=False)})
    assert [next(batches)['a']['index'][0] for _ in range(2)] == [0, 4]
    with pytest.raises(UserError, match=r'cat/9\.png'):
        next(batches)
    with pytest.raises(UserError, match=r'cat/9\.png'):
        list(eval_batches(source, batch_size=4))


def prefetch_threads():
    return [t for t in threading.enumerate() if 'prefetch' in t.name]


@pytest.mark.parametrize('how', ['close', 'drop'])
def test_threads_end_with_the_iterator(digits, how):
    batches = iterate({'a': train_stream(digits, batch_size=4, seed=0)}, threads=3)
    next(batches)
    assert prefetch_threads()
    if how == 'close':
        batches.close()
    del batches
    for _ in range(100):
        if not prefetch_threads():
            return
        time.sleep(0.02)
    pytest.fail(f'still running: {prefetch_threads()}')


def test_process_ends_while_batches_are_read():
    code = (
        'from tl_jax.data import *; '
        's = train_stream(open_source("sklearn:digits"), batch_size=64, seed=0); '
        'b = iterate({"a": s}); next(b); print("done")'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == 'done\n' and done.stderr == ''


def test_import_is_light():
    code = (
        'import sys, tl_jax.data; '
        'print([m for m in ("jax", "grain", "sklearn", "tensorflow_datasets", "tensorflow") if m in sys.modules])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == '[]\n'


def test_bad_input(digits):
    with pytest.raises(UserError, match='batch_size=10 is not a multiple of the 3 processes'):
        train_stream(digits, batch_size=10, seed=0).batch_at(0, 0, 3)
    with pytest.raises(UserError, match="balance='classes'; known"):
        train_stream(digits, batch_size=10, seed=0, balance='classes')
    with pytest.raises(UserError, match='balance needs labels'):
        train_stream(digits._replace(labels=None), batch_size=10, seed=0, balance='class')
    with pytest.raises(UserError, match='must be positive'):
        train_stream(digits, batch_size=0, seed=0)
    ragged = Source('ragged', 9, lambda i: {'image': np.zeros((i + 1, 2, 1), np.uint8), 'label': 0})
    with pytest.raises(UserError, match=r'example 1 is \[2, 2, 1\], of example 0 \[1, 2, 1\]; add a transform'):
        train_stream(ragged, batch_size=2, seed=0, shuffle=False).batch_at(0)
