"""Deep mutual learning: a step of linear networks in closed form, statistics of one's own passes, and a run."""

import jax
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import experiment as experiment_lib
from tl_jax import mesh as mesh_lib
from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.objectives import started
from tl_jax.state import create_state
from tl_jax.step import create_train_step, layouts
from tl_jax.train import train_and_evaluate

LINEAR = dict(name='mlp', dense=[])
CONVNET = dict(name='convnet', widths=[4], norm='batch')
RATE, WEIGHT, TAU = 0.3, 0.8, 2.0


@pytest.fixture
def config(digits_config):
    def make(model, **fields):
        return digits_config(
            model=model,
            objective={'name': 'mutual', 'weight': WEIGHT, 'temperature': TAU, **fields},
            stages=[{'steps': 4, 'train': [['.*', {'name': 'sgd', 'lr': RATE}]]}],
        )

    return make


def one_step(config):
    """The state before a step, after it, and what it logs."""
    built = experiment_lib.build(config_lib.resolve(config))
    stage, layout = built.stages[0], layouts(built, mesh_lib.create_mesh(data=1))(0)
    variables = started(stage.objective, stage.init(jax.random.key(0), built.batch))
    state = create_state(variables, 0)._replace(opt_state=layout.partition.optimizer.init(variables['params']))
    step = create_train_step(stage.objective, stage.gradient, layout.partition, 0.0, 0.0, steps=4)
    return built, state, *jax.jit(step)(state, built.batch)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def heads(params):
    """Kernel and bias of each network of the cohort as one matrix, float64."""
    roles = [params['head'], *(params[name]['head'] for name in ('peer', 'peer2'))]
    return [np.vstack([head['kernel'], head['bias']]).astype(np.float64) for head in roles]


@pytest.mark.parametrize('order', ['in_turn', 'together'])
def test_a_step_of_linear_networks_in_closed_form(config, order):
    """d CE / dz = p - y, and τ² d KL(q ‖ p) / dz = τ (p - q) of softened predictions."""
    built, before, after, metrics = one_step(config(LINEAR, peers=[LINEAR, LINEAR], order=order))
    fields = built.batch['train']
    x = np.hstack([np.asarray(fields['image'], np.float64).reshape(16, -1), np.ones((16, 1))])
    weights, found = heads(before.params), list(heads(before.params))
    label = np.eye(10)[fields['label']]
    learnt = []
    for k in range(3):
        asked = found if order == 'in_turn' else weights
        z = [x @ w for w in asked]
        p, q = softmax(z[k] / TAU), [softmax(other / TAU) for i, other in enumerate(z) if i != k]
        learnt.append(TAU**2 * np.mean([np.sum(t * np.log(t / p), -1) for t in q]))
        slope = softmax(z[k]) - label + WEIGHT * TAU * np.mean([p - t for t in q], 0)
        found[k] = weights[k] - RATE * x.T @ slope / 16
    for got, wanted in zip(heads(after.params), found, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    if order == 'in_turn':
        logged = [float(metrics[f'train/{name}/mutual']) for name in ('first', 'peer', 'peer2')]
        assert logged == pytest.approx(learnt, rel=1e-4)
    else:
        assert float(metrics['train/mutual']) == pytest.approx(np.mean(learnt), rel=1e-4)


@pytest.mark.parametrize('order', ['in_turn', 'together'])
def test_running_statistics_move_once_by_ones_own_pass(config, order):
    built, before, after, _ = one_step(config(CONVNET, peers=CONVNET, order=order))
    image = np.asarray(built.batch['train']['image'], np.float64)
    for role in (lambda tree: tree, lambda tree: tree['peer']):
        kernel = np.asarray(role(before.params)['backbone']['conv1']['kernel'], np.float64)
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
        mean = np.einsum('bhwcij,ijco->bhwo', windows, kernel).mean((0, 1, 2))
        (path, moved), (_, start) = (
            next(
                pair
                for pair in trees.flatten(role(s.collections['batch_stats'])['backbone']).items()
                if 'mean' in pair[0]
            )
            for s in (after, before)
        )
        share = (np.asarray(moved) - start) / (mean - start)
        assert 'norm1' in path and share == pytest.approx(np.full(4, share[0]), rel=1e-3) and 0 < share[0] <= 0.1 + 1e-6


def test_a_cohort_of_unlike_networks_in_a_run(config, tmp_path):
    train_and_evaluate(config(CONVNET, peers=[LINEAR], order='in_turn'), tmp_path / 'run')
    from tl_jax.finished import network

    assert set(network(tmp_path / 'run')[1]['params']) == {'backbone', 'head'}


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(), "config.objective.peers: 'mutual' needs another network"),
        (dict(peers=[]), 'config.objective.peers: is empty'),
        (dict(peers=LINEAR, temperature=0.0), 'config.objective: temperature must be above 0, not 0'),
        (dict(peers={**LINEAR, 'num_classes': 7}), r'config.objective.peers: tell \[7, 10\] classes apart'),
        (dict(peers=LINEAR, order='random'), 'config.objective.order: must be'),
    ],
)
def test_bad_cohorts_in_one_line(config, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        one_step(config(LINEAR, **fields))
    assert '\n' not in str(caught.value)
