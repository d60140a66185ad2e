"""Length buckets: nothing is lost, every process sees one width, and there are as many shapes as buckets."""

import collections
import itertools
import re

import jax
import numpy as np
import pytest

from tl_jax.data import eval_batches, open_source, train_stream
from tl_jax.data.buckets import describe
from tl_jax.errors import UserError

BUCKETS = [4, 9, 16]


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.choice([1, 2, 3, 5, 7, 11, 16, 20], 103)
    lines = [' '.join(f'w{i}x{j}' for j in range(n)) for i, n in enumerate(lengths)]
    (tmp_path / 'text.txt').write_text('\n'.join(lines) + '\n')
    return open_source(f'lines:{tmp_path}/text.txt', length=16, buckets=BUCKETS)


def test_an_epoch_has_every_example_once_whatever_the_buckets(source):
    stream = train_stream(source, batch_size=8, seed=3)
    plain = train_stream(source._replace(buckets=()), batch_size=8, seed=3)
    # Three epochs of 103 are 38 whole batches and the first five places of the next.
    ends = [103 * k // 8 for k in range(4)]
    for first, end in itertools.pairwise(ends):
        ours, theirs = (
            np.concatenate([s.batch_at(step)['index'] for step in range(first, end)]) for s in (stream, plain)
        )
        assert collections.Counter(ours.tolist()) == collections.Counter(theirs.tolist())
        assert ours.tolist() != theirs.tolist()
    seen = np.concatenate([stream.batch_at(step)['index'] for step in range(ends[1])])
    assert len(set(seen.tolist())) == len(seen) >= 103 - 8


def test_batches_are_of_like_length_in_an_order_that_says_nothing(source):
    stream = train_stream(source, batch_size=8, seed=3)
    batches = [stream.batch_at(step) for step in range(24)]
    widths = [b['tokens'].shape[1] for b in batches]
    assert set(widths) == set(BUCKETS) and widths != sorted(widths)
    for batch in batches:
        width, longest = batch['tokens'].shape[1], source.lengths[batch['index']].max()
        assert width == min(b for b in BUCKETS if b >= longest)
        for row, index in zip(batch['tokens'], batch['index'], strict=True):
            whole = source.get(index)['tokens']
            np.testing.assert_array_equal(row, whole[:width])
            assert not whole[width:].any()
    padding = lambda batches: np.mean([np.mean(b['tokens'] == 0) for b in batches])
    plain = train_stream(source._replace(buckets=()), batch_size=8, seed=3)
    assert padding(batches) < 0.7 * padding([plain.batch_at(step) for step in range(24)])
    again = train_stream(source, batch_size=8, seed=3).batch_at(17)
    np.testing.assert_array_equal(again['tokens'], batches[17]['tokens'])
    assert train_stream(source, batch_size=8, seed=4).batch_at(17)['index'].tolist() != again['index'].tolist()


def test_processes_agree(source):
    stream = train_stream(source, batch_size=8, seed=0)
    for step in range(15):
        whole = stream.batch_at(step)
        parts = [stream.batch_at(step, p, 4) for p in range(4)]
        np.testing.assert_array_equal(np.concatenate([p['tokens'] for p in parts]), whole['tokens'])
    batches = [list(eval_batches(source, batch_size=8, process_index=p, process_count=4, threads=0)) for p in range(4)]
    assert len({tuple(b['tokens'].shape for b in mine) for mine in batches}) == 1


def test_evaluation_counts_everything_once(source):
    batches = list(eval_batches(source, batch_size=10, threads=0))
    index = np.concatenate([b['index'][b['mask'] > 0] for b in batches])
    assert sorted(index.tolist()) == list(range(103)) and len(batches) == 11
    assert [b['tokens'].shape[1] for b in batches] == sorted(b['tokens'].shape[1] for b in batches)


def test_as_many_compiled_shapes_as_buckets(source):
    compiled = jax.jit(lambda batch: batch['tokens'].sum())
    stream = train_stream(source, batch_size=8, seed=0)
    for step in range(40):
        compiled(stream.batch_at(step))
    assert compiled._cache_size() == len(BUCKETS)
    counts = [(np.searchsorted(BUCKETS, source.lengths) == i).sum() for i in range(3)]
    said = describe(source)
    assert said.startswith(f'3 compiled shapes: {counts[0]} of ≤ 4 tokens, {counts[1]} of ≤ 9 tokens')
    padding = 1 - source.lengths.sum() / (counts @ np.array(BUCKETS))
    assert f'{padding:.0%} padding; {(source.lengths == 16).sum()} fill all 16: what a text has beyond is cut' in said


def test_selection_keeps_lengths(source, tmp_path):
    half = open_source(f'lines:{tmp_path}/text.txt[50%:]', length=16, buckets=BUCKETS)
    assert half.length == 52
    assert half.lengths.tolist() == [(half.get(i)['tokens'] > 0).sum() for i in range(52)]


def test_refusals(source, tmp_path):
    def refuses(message):
        return pytest.raises(UserError, match=re.compile(rf'^[^\n]*{message}[^\n]*$'))

    lines = f'lines:{tmp_path}/text.txt'
    with refuses(r'the last of buckets=\[4, 8\] must be length=16'):
        open_source(lines, length=16, buckets=[4, 8])
    with refuses('must be lengths in ascending order'):
        open_source(lines, length=16, buckets=[8, 4, 16])
    with refuses('buckets are for texts'):
        open_source('sklearn:digits/train', buckets=[4])
    with refuses('take away `poisson`'):
        train_stream(source, batch_size=8, seed=0, rate=0.1)
