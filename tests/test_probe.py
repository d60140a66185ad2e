"""The probe to convergence against scikit-learn, and as a run."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import launch
from tl_jax import probe
from tl_jax.config import resolve
from tl_jax.errors import UserError
from tl_jax.pretrained import read


def examples(classes, count=90, dim=7):
    rng = np.random.default_rng(classes)
    x = rng.normal(size=(count, dim)) * rng.uniform(0.3, 3, dim)
    label = np.argmax(x @ rng.normal(size=(dim, classes)) + rng.gumbel(size=(count, classes)), 1)
    return x, label


@pytest.mark.parametrize('C', [1e-3, 0.7, 50.0])
@pytest.mark.parametrize('classes', [3, 5])
def test_the_fit_is_scikit_learns(classes, C):
    x, label = examples(classes)
    ours = probe.fit(x, label, classes, C=C, tolerance=1e-9)
    theirs = LogisticRegression(C=C, tol=1e-9, max_iter=5000).fit(x, label)
    np.testing.assert_allclose(ours.kernel.T, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(ours.bias, theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)
    loss = -np.mean(theirs.predict_log_proba(x)[np.arange(len(x)), label])
    assert ours.loss == pytest.approx(loss, abs=1e-5) and ours.converged
    assert probe.accuracy(ours, x, label) == theirs.score(x, label)


def test_two_classes_are_scikit_learns_at_twice_the_strength():
    x, label = examples(2)
    ours = probe.fit(x, label, 2, C=0.3)
    theirs = LogisticRegression(C=0.6, tol=1e-9, max_iter=5000).fit(x, label)
    np.testing.assert_allclose(ours.kernel[:, 1] - ours.kernel[:, 0], theirs.coef_[0], atol=1e-4)
    np.testing.assert_allclose(ours.bias[1] - ours.bias[0], theirs.intercept_[0], atol=1e-4)


def test_a_fit_cut_short_says_so_and_goes_on_from_there():
    x, label = examples(4)
    short = probe.fit(x, label, 4, C=10.0, max_iterations=3)
    whole = probe.fit(x, label, 4, C=10.0)
    again = probe.fit(x, label, 4, C=10.0, start=short)
    assert not short.converged and short.iterations == 3 and whole.converged
    np.testing.assert_allclose(again.kernel, whole.kernel, atol=1e-4)


def test_the_search_finds_the_peak_to_an_eighth_of_a_decade():
    tried = []

    def score(exponent):
        tried.append(exponent)
        return -abs(exponent - 2.6)

    scores = probe.search(score, low=-6, high=6, first_step=2, last_step=0.125)
    assert probe.best_of(scores) == 2.625
    assert tried[:7] == [-6, -4, -2, 0, 2, 4, 6] and len(tried) == len(set(tried)) == 7 + 4 * 2
    assert probe.best_of({1.0: 0.5, -1.0: 0.5, 0.0: 0.4}) == -1.0
    edge = probe.search(lambda exponent: exponent, low=-6, high=6, first_step=2, last_step=0.125)
    assert probe.best_of(edge) == 6 and max(edge) == 6


def test_a_probe_is_a_run(digits_config, tmp_path, capsys):
    section = {
        'train_transform': ['flip', 'to_float'],
        'eval_transform': ['to_float'],
        'test': 'sklearn:digits/test[:50]',
    }
    data = {'train': 'sklearn:digits/train[:115]', 'eval': 'sklearn:digits/val[:60]', **section}
    config = resolve(digits_config(data=data, probe={'low': -2, 'high': 4, 'last_step': 1.0}))
    file = tmp_path / 'config.json'
    file.write_text(json.dumps(config))
    launch.jobs.JOBS['probe']({'config': str(file), 'workdir': str(tmp_path / 'run')}, [])
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary['probe']['converged'] and summary['probe']['refit']
    assert summary['metrics']['test/accuracy'] > 0.7
    # The last fit has seen the split that chose, which is therefore judged by the head before it.
    records = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    best = max(r['val/accuracy'] for r in records)
    assert summary['metrics']['val/accuracy'] == pytest.approx(best) and best < 1
    held_out = np.load(tmp_path / 'run' / 'predictions' / 'val.npz')
    assert np.mean(held_out['probabilities'].argmax(1) == held_out['label']) == pytest.approx(best)
    stored = {path: tensor.array() for path, tensor in read(tmp_path / 'run' / 'model.safetensors').tensors.items()}
    predictions = np.load(tmp_path / 'run' / 'predictions' / 'test.npz')
    logits = predictions['features'] @ stored['params/head/kernel'] + stored['params/head/bias']
    np.testing.assert_array_equal(logits.argmax(1), predictions['probabilities'].argmax(1))
    capsys.readouterr()
    launch.jobs.JOBS['eval']({'workdir': str(tmp_path / 'run')}, [])
    assert f'accuracy {summary["metrics"]["test/accuracy"]:.4f}' in capsys.readouterr().out


@pytest.mark.parametrize(('row', 'place'), [(17, 'train: example 13'), (50, 'eval.val: example 13')])
def test_features_beyond_what_is_stored_name_the_example(digits_config, tmp_path, row, place):
    images = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    images[row] = 1e6  # the 14th of its part, which is drawn
    np.savez(tmp_path / 'large.npz', x_train=images, y_train=np.arange(64) % 4)
    data = {field: f'npz:{tmp_path}/large.npz/train[{part}]' for field, part in (('train', ':48'), ('eval', '48:'))}
    with pytest.raises(UserError, match=rf'config\.data\.{place}: its features are not finite'):
        config = digits_config(model={'name': 'mlp', 'dense': [8]}, data=data, cache_dtype='float16')
        probe.probe(resolve(config), tmp_path / 'run')


def test_a_given_penalty_selects_nothing(digits_config, tmp_path):
    summary = probe.probe(resolve(digits_config(probe={'C': 1.0, 'max_iterations': 5})), tmp_path / 'run')
    assert summary['select_by'] == 'last' and 'refit' not in summary['probe'] and 'val/accuracy' in summary['metrics']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'data': {'train': 'sklearn:digits/train[:40]'}}, 'config.data.eval: there is none to choose the penalty by'),
        ({'eval_batch_size': 10, 'mesh': {'data': 4}}, 'config.eval_batch_size: 10 examples cannot be split over 4'),
        ({'probe': {'C': -1.0}}, 'config.probe.C: must be above 0'),
        ({'probe': {'low': 2.0, 'high': 1.0}}, 'config.probe: low must not be above high'),
        ({'probe': {'strength': 1.0}}, r'config\.probe\.strength: unknown field'),
        (
            {'model': {'name': 'convnet', 'widths': [8], 'head': 'cosine'}},
            'config.model.head: a probe fits a kernel and',
        ),
        (
            {'model': {'name': 'convnet', 'widths': [8], 'dense': [4], 'dropout': 0.5}},
            'config.model: its features cannot',
        ),
    ],
)
def test_bad_input(digits_config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        probe.probe(resolve(digits_config(**changes)), tmp_path / 'run')
