"""Merging after training: each formula in float64, batch norm measured anew, and runs merged by the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import jobs, merging, train, trees
from tl_jax.errors import UserError
from tl_jax.models import create_model
from tl_jax.step import averaging

UNEQUAL = ('eval_batch_size=10', 'mesh.data=4')


@pytest.fixture
def networks():
    """A start and three that moved from it; two leaves each."""
    draw = np.random.RandomState(0)
    start = {
        'backbone': {'kernel': draw.normal(size=(4, 6)).astype(np.float32)},
        'head': {'bias': np.zeros(5, np.float32)},
    }
    move = lambda w: (w + draw.normal(size=w.shape)).astype(np.float32)
    return start, [jax.tree.map(move, start) for _ in range(3)]


def vector(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in trees.flatten(tree).values()])


def test_wise_ft_soup_and_task_arithmetic(networks):
    start, tuned = networks
    w0, ws = vector(start), [vector(w) for w in tuned]
    close = lambda tree, wanted: np.testing.assert_allclose(vector(tree), wanted, rtol=1e-6, atol=1e-6)
    for alpha in (0, 0.3, 1):
        close(merging.wise_ft(start, tuned[:1], alpha=alpha), (1 - alpha) * w0 + alpha * ws[0])
    close(merging.uniform_soup(tuned), np.mean(ws, 0))
    close(merging.task_arithmetic(start, tuned, scale=0.4), w0 + 0.4 * (np.sum(ws, 0) - 3 * w0))
    close(merging.task_arithmetic(start, tuned[:1], scale=-1), 2 * w0 - ws[0])
    assert merging.uniform_soup(tuned)['backbone']['kernel'].dtype == np.float32
    with pytest.raises(UserError, match='one tuned network, not to 3'):
        merging.wise_ft(start, tuned)


def ties_one_number_at_a_time(w0, ws, density, scale):
    """Algorithm 1 as it is written, by loops."""
    deltas = []
    for w in ws:
        delta = w - w0
        order = sorted(range(len(delta)), key=lambda i: -abs(delta[i]))[: int(len(delta) * density)]
        deltas.append([delta[i] if i in order else 0.0 for i in range(len(delta))])
    merged = []
    for i in range(len(w0)):
        column = [d[i] for d in deltas]
        sign = np.sign(sum(column))
        agreeing = [x for x in column if x * sign > 0]
        merged.append(w0[i] + scale * (np.mean(agreeing) if agreeing else 0))
    return merged


@pytest.mark.parametrize('density', [0.2, 0.5, 1.0])
def test_ties(networks, density):
    start, tuned = networks
    wanted = ties_one_number_at_a_time(vector(start), [vector(w) for w in tuned], density, 0.7)
    np.testing.assert_allclose(
        vector(merging.ties(start, tuned, density=density, scale=0.7)), wanted, rtol=1e-5, atol=1e-6
    )
    one = merging.ties(start, tuned[:1], density=1.0)
    np.testing.assert_allclose(vector(one), vector(tuned[0]), rtol=1e-6, atol=1e-6)


def test_a_plain_mean_of_the_last_steps():
    """SWA within a run: `ema=1` from a share of the stage on."""
    values = np.random.RandomState(0).normal(size=8)
    mean = np.float64(99.0)
    for step, value in enumerate(values):
        decay = float(averaging(1.0, jnp.asarray(step), begin=3))
        mean = decay * mean + (1 - decay) * value
        assert mean == pytest.approx(values[step] if step < 3 else values[3 : step + 1].mean(), rel=1e-6)
    assert [float(averaging(0.9, jnp.asarray(s), begin=1)) for s in (0, 1)] == [0, pytest.approx(0.9)]


def test_dare_drops_and_rescales(networks):
    start, tuned = networks
    w0, w = vector(start), vector(tuned[0])
    draws = np.stack([vector(merging.dare(start, tuned[:1], rate=0.75, scale=0.5, seed=s)) for s in range(600)])
    moved = np.isclose(draws, w0 + 0.5 * (w - w0) / 0.25, atol=1e-5)
    assert np.all(moved | np.isclose(draws, w0, atol=1e-6))
    assert moved.mean() == pytest.approx(0.25, abs=0.01)
    every = merging.dare(start, tuned, rate=0.0, scale=0.3)
    np.testing.assert_allclose(vector(every), vector(merging.task_arithmetic(start, tuned, scale=0.3)), rtol=1e-6)


def test_greedy_soup_keeps_what_is_no_worse():
    """Scores by hand: 1 opens as the best; with 2 it is worse, with 0 no worse, with 3 better."""
    values = [3.0, 1.0, -9.0, 2.0]
    seen = []

    def measure(soup):
        seen.append(float(soup['w'][0]))
        return {-4.0: 0.1, 2.0: 0.8, 1.5: 0.7}.get(seen[-1], 0.9)

    soups = [{'w': np.array([v])} for v in values]
    soup, kept = merging.greedy_soup(soups, [0.5, 0.8, 0.6, 0.4], measure)
    assert seen == [-4.0, 2.0, 2.0] and kept == (1, 0, 3) and soup['w'][0] == 2.0


def test_statistics_are_those_of_the_batches():
    module = create_model('convnet', widths=(3,), norm='batch', num_classes=2)
    draw = np.random.RandomState(0)
    batches = [draw.normal(size=(6, 8, 8, 1)).astype(np.float32) for _ in range(3)]
    variables = dict(module.init(jax.random.key(0), batches[0], train=False))
    found = merging.batch_statistics(module.apply, variables, batches)
    kernel = np.asarray(variables['params']['backbone']['conv1']['kernel'], np.float64)
    padded = [np.pad(b.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0))) for b in batches]
    maps = [sum(p[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3)) for p in padded]
    flat = [m.reshape(-1, 3) for m in maps]
    np.testing.assert_allclose(found['backbone']['norm1']['mean'], np.mean([m.mean(0) for m in flat], 0), atol=1e-5)
    np.testing.assert_allclose(
        found['backbone']['norm1']['var'], np.mean([m.var(0, ddof=1) for m in flat], 0), rtol=1e-4
    )
    assert jax.tree.structure(found) == jax.tree.structure(variables['batch_stats'])


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A start and two runs from it, a few steps each."""
    folder = tmp_path_factory.mktemp('runs')

    def one(name, seed, lr, source=None):
        steps, model = (1 if source is None else 8), {'name': 'mlp', 'dense': [8], 'dense_norm': 'batch'}
        config = {
            'name': name,
            'seed': seed,
            'model': {**model, 'source': source},
            'data': {
                'train': 'sklearn:digits/train[:200]',
                'eval': 'sklearn:digits/val[:100]',
                'train_transform': ['to_float'],
                'eval_transform': ['to_float'],
            },
            'stages': [{'steps': steps, 'train': [['.*', {'name': 'adam', 'lr': lr}]]}],
            'batch_size': 32,
            'mesh': {'data': 1},
        }
        train.train_and_evaluate(config, folder / name)

    one('start', 0, 1e-2)
    for seed in (1, 2):
        one(f'tuned{seed}', seed, 1e-2, str(folder / 'start' / 'model.safetensors'))
    return folder


def merge(runs, tmp_path, method, files='tuned*', assignments=(), **flags):
    target = tmp_path / 'merged'
    flags = {'workdir': str(target), 'files': str(runs / files), 'method': method, **flags}
    jobs.JOBS['merge'](flags, assignments)
    return target, json.loads((target / 'summary.json').read_text())


def test_merged_runs_are_runs(runs, tmp_path, capsys):
    folder, summary = merge(runs, tmp_path, 'task_arithmetic(scale=[0, 0.5])', start=str(runs / 'start'))
    from tl_jax.finished import network

    before, *after = (network(runs / name)[1] for name in ('start', 'tuned1', 'tuned2'))
    scores = summary['merge']['candidates']
    assert len(scores) == 5 and summary['select_by'] == 'val/accuracy'
    merged = network(folder)[1]
    scale = 0.5 if '0.5' in summary['merge']['method'] else 0
    wanted = merging.task_arithmetic(before['params'], [t['params'] for t in after], scale=scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged['params'], wanted)
    assert np.abs(vector(merged['batch_stats']) - vector(after[0]['batch_stats'])).max() > 1e-3  # measured anew
    capsys.readouterr()
    jobs.JOBS['eval']({'workdir': str(folder)}, [])
    assert f'accuracy {summary["metrics"]["val/accuracy"]:.4f}' in capsys.readouterr().out
    rows = (folder / 'candidates.csv').read_text().splitlines()
    assert rows[0] == 'candidate,val/accuracy' and len(rows) == 6
    assert max(scores.values()) >= scores[summary['merge']['method']]


def test_another_merges_workdir_is_refused(runs, tmp_path):
    folder, _ = merge(runs, tmp_path, 'task_arithmetic(scale=0.5)', start=str(runs / 'start'))
    first = (folder / 'summary.json').read_bytes()
    for method, start in (('task_arithmetic(scale=0.1)', 'start'), ('task_arithmetic(scale=0.5)', 'tuned1')):
        with pytest.raises(UserError, match=r'--workdir: .*merged holds another merge'):
            merge(runs, tmp_path, method, start=str(runs / start))
    assert (folder / 'summary.json').read_bytes() == first
    merge(runs, tmp_path, 'task_arithmetic(scale=0.5)', start=str(runs / 'start'))  # the same one may be made again


def test_a_greedy_soup_is_no_worse_than_its_best(runs, tmp_path):
    _, summary = merge(runs, tmp_path, 'greedy_soup')
    scores = summary['merge']['candidates']
    inputs = [scores[name] for name in summary['merge']['files']]
    assert scores['greedy_soup'] >= max(inputs) and summary['merge']['kept']


@pytest.mark.parametrize(
    ('method', 'changes', 'message'),
    [
        ('tie', {}, r"--method: there is no 'tie'; did you mean 'ties'"),
        ('ties(0.2)', {}, r'--method: .* is no method'),
        ('ties(**{})', {'start': 'start'}, r'--method: .* is no method'),
        ('ties(density={[]: 1})', {'start': 'start'}, r'--method: .* is no method'),
        ('ties(dense=0.2)', {'start': 'start'}, r'--method.dense: unknown field'),
        ('ties(density=0.0)', {'start': 'start'}, r'density of ties lies in'),
        ('dare(rate=1.0)', {'start': 'start'}, r'rate of dare lies in'),
        ('dare(seed=-1)', {'start': 'start'}, r'seed of dare is at least 0, not -1'),
        ('ties', {}, r'--start: ties wants the run'),
        ('uniform_soup', {'start': 'start'}, r'--start: uniform_soup has no use'),
        ('greedy_soup(size=2)', {}, r'greedy_soup has no fields'),
        ('uniform_soup', {'files': 'none'}, r'none holds no model.safetensors'),
        ('uniform_soup', {'assignments': UNEQUAL}, r'config.eval_batch_size: 10 examples cannot be split over 4'),
    ],
)
def test_bad_merges_in_one_line(runs, tmp_path, method, changes, message):
    changes = {k: str(runs / v) if k == 'start' else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message) as caught:
        merge(runs, tmp_path, method, **changes)
    assert '\n' not in str(caught.value) and not (tmp_path / 'merged').exists()


def test_evaluation_refuses_batches_that_the_devices_cannot_share(runs):
    with pytest.raises(UserError, match='config.eval_batch_size: 10 examples cannot be split over 4'):
        jobs.JOBS['eval']({'workdir': str(runs / 'start')}, UNEQUAL)


def test_networks_of_other_shapes_in_one_line():
    one, other = ({'params': {'w': jnp.zeros(n)}} for n in (2, 3))
    with pytest.raises(UserError, match=r"'params/w' is \[2\] in a and \[3\] in b"):
        merging.check_alike({'a': one, 'b': other})
    with pytest.raises(UserError, match=r"'params/v' is absent in a"):
        merging.check_alike({'a': one, 'b': {'params': {**one['params'], 'v': jnp.zeros(1)}}})
