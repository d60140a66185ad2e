"""Poisson sampling, hidden labels, and labels that a run predicted."""

import numpy as np
import pytest

from tl_jax.data import open_source, train_stream
from tl_jax.errors import UserError

DIGITS = 'sklearn:digits/train'  # 600 examples


def poisson_stream(batch_size=60, rate=0.05, seed=3):
    return train_stream(open_source(DIGITS), batch_size=batch_size, seed=seed, transforms=['to_float'], rate=rate)


def test_every_example_joins_each_batch_by_itself():
    stream = poisson_stream()
    steps = 400
    joined = np.zeros((steps, 600))
    for step in range(steps):
        batch = stream.batch_at(step)
        drawn = batch['index'][batch['mask'] > 0]
        assert len(set(drawn)) == len(drawn) and batch['mask'].shape == (60,)
        joined[step, drawn] = 1
    sizes = joined.sum(1)
    # Binomial(600, 0.05): mean 30, variance 28.5; five standard errors.
    assert abs(sizes.mean() - 30) < 5 * np.sqrt(28.5 / steps)
    assert abs(sizes.var() / 28.5 - 1) < 5 * np.sqrt(2 / steps)
    assert np.abs(joined.mean(0) - 0.05).max() < 5 * np.sqrt(0.05 * 0.95 / steps)
    assert abs(np.corrcoef(joined[:-1].ravel(), joined[1:].ravel())[0, 1]) < 0.01


def test_processes_share_the_rows_of_one_draw():
    stream = poisson_stream()
    whole, parts = stream.batch_at(7), [stream.batch_at(7, p, 3) for p in range(3)]
    for field in whole:
        np.testing.assert_array_equal(whole[field], np.concatenate([part[field] for part in parts]))


def test_a_sample_without_room_is_refused():
    with pytest.raises(UserError, match='raise config.batch_size'):
        poisson_stream(batch_size=10).batch_at(0)


def test_unlabelled_examples_have_no_label():
    source = open_source(DIGITS, unlabelled=True)
    assert source.labels is None and set(source.get(0)) == {'image'}


def test_unlabelled_texts_have_neither_tags_nor_numbers(tmp_path):
    (tmp_path / 'a.conll').write_text('Ann B-PER\nwent O\n')
    (tmp_path / 'a.tsv').write_text('score\ttext\n2.5\tgood\n')
    tags = open_source(f'conll:{tmp_path}/a.conll', length=4, unlabelled=True)
    numbers = open_source(f'tsv:{tmp_path}/a.tsv', text='text', target='score', length=4, unlabelled=True)
    assert set(tags.get(0)) == set(numbers.get(0)) == {'tokens'}


def test_predicted_labels_take_the_place_of_the_source_s(tmp_path):
    probabilities = np.random.RandomState(0).rand(600, 10)
    names = np.array([str(i) for i in range(10)])
    path = tmp_path / 'p.npz'
    np.savez(path, index=np.arange(600), probabilities=probabilities, class_names=names)
    source = open_source(DIGITS, labels=str(path))
    np.testing.assert_array_equal(source.labels, probabilities.argmax(1))
    assert source.get(5)['label'] == probabilities[5].argmax() and source.class_names == tuple(names)
    np.savez(path, index=np.arange(10), probabilities=probabilities[:10], class_names=names)
    with pytest.raises(UserError, match=r'predicts 10 examples; .* has 600'):
        open_source(DIGITS, labels=str(path))
    np.savez(path, index=np.arange(600), probabilities=probabilities[:, :9], class_names=names)
    with pytest.raises(UserError, match=r'probabilities \[600, 9\] and class_names \[10\] are no predictions'):
        open_source(DIGITS, labels=str(path))
    np.savez(path, index=np.arange(600), scores=probabilities)
    with pytest.raises(UserError, match="no array 'probabilities'"):
        open_source(DIGITS, labels=str(path))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r'p\.npz: not a readable npz file'):
        open_source(DIGITS, labels=str(path))
