"""MCD against its three steps, written again in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.config import plain
from tl_jax.errors import UserError
from tl_jax.gradients import plain as plain_gradient
from tl_jax.networks import model_from
from tl_jax.objectives.discrepancy import discrepancy, mcd
from tl_jax.optimizers import create_partition
from tl_jax.state import create_state, enter_stage
from tl_jax.step import create_train_step
from tl_jax.train import train_and_evaluate
from tl_jax.trees import flatten

BATCH, LR, WEIGHT = 6, 0.1, 0.8


def network(**fields):
    return model_from(**{'name': 'mlp', 'dense': [4], 'classes': 3, 'dtype': jnp.float32, 'load': False, **fields})


def two_streams():
    draw = np.random.default_rng(0)
    image = lambda shift: jnp.asarray(draw.normal(size=(BATCH, 2, 2, 1)) + shift, jnp.float32)
    return {'source': {'image': image(0), 'label': jnp.array([0, 2, 1, 1, 0, 2])}, 'target': {'image': image(0.6)}}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def outputs(params, image):
    x = np.asarray(image, np.float64).reshape(BATCH, -1)
    features = np.maximum(x @ params['backbone/dense1/kernel'] + params['backbone/dense1/bias'], 0)
    return [softmax(features @ params[f'{h}/kernel'] + params[f'{h}/bias']) for h in ('head', 'head2')]


def fit(params, batch):
    label = np.asarray(batch['source']['label'])
    return sum(-np.mean(np.log(p[np.arange(BATCH), label])) for p in outputs(params, batch['source']['image']))


def gap(params, batch):
    one, two = outputs(params, batch['target']['image'])
    return np.abs(one - two).mean()


def descend(function, params, roles, step=1e-6):
    """One step of gradient descent by central differences, on the leaves of some roles."""
    moved = dict(params)
    for path in (p for p in params if p.split('/')[0] in roles):
        grad = np.zeros_like(params[path])
        for i in np.ndindex(grad.shape):
            up, down = ({**params, path: params[path].copy()} for _ in range(2))
            up[path][i] += step
            down[path][i] -= step
            grad[i] = (function(up) - function(down)) / (2 * step)
        moved[path] = params[path] - LR * grad
    return moved


@jax.jit
def off_zero(variables):
    leaves, treedef = jax.tree.flatten(variables)
    noise = [0.3 * jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, [leaf + n for leaf, n in zip(leaves, noise, strict=True)])


def test_one_step_is_the_authors_three():
    """solver.py of mil-tokyo/MCD_DA: fit all; heads for the source and against each other; features, twice, for agreement."""
    objective, batch = mcd(network(), repeats=2, weight=WEIGHT), two_streams()
    variables = off_zero(jax.jit(objective.init)(jax.random.key(0), batch))
    state = create_state(variables, 0)
    phases = [(phase.name, phase.rule) for phase in objective.phases]
    partition = create_partition([('.*', {'name': 'sgd', 'lr': LR})], state.params, steps=10, phases=phases)
    step = jax.jit(create_train_step(objective, plain_gradient(), partition, 0.0, 0.0))
    after, metrics = step(enter_stage(state, partition, ema=0.0), batch)

    params = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(variables['params']).items()}
    np.testing.assert_allclose(metrics['train/fit/loss'], fit(params, batch), rtol=1e-5)
    params = descend(lambda p: fit(p, batch), params, ('backbone', 'head', 'head2'))
    against = lambda p: fit(p, batch) - WEIGHT * gap(p, batch)
    np.testing.assert_allclose(metrics['train/maximise/loss'], against(params), rtol=1e-5)
    params = descend(against, params, ('head', 'head2'))
    for _ in range(2):
        before = gap(params, batch)
        params = descend(lambda p: WEIGHT * gap(p, batch), params, ('backbone',))
    np.testing.assert_allclose(metrics['train/minimise/discrepancy'], before, rtol=1e-5)
    for path, leaf in flatten(after.params).items():
        np.testing.assert_allclose(leaf, params[path], rtol=1e-4, atol=2e-6, err_msg=path)


def test_discrepancy_is_the_mean_absolute_difference_of_probabilities():
    one, two = np.random.default_rng(1).normal(size=(2, 5, 4))
    np.testing.assert_allclose(
        discrepancy(jnp.asarray(one), jnp.asarray(two)), np.abs(softmax(one) - softmax(two)).mean()
    )
    certain = 100 * jnp.eye(4)
    np.testing.assert_allclose(discrepancy(certain, certain[::-1]), 2 / 4, rtol=1e-6)


def test_heads_start_apart_and_predict_together():
    objective, batch = mcd(network()), two_streams()
    variables = jax.jit(objective.init)(jax.random.key(0), batch)
    assert set(variables['params']) == {'backbone', 'head', 'head2'}
    assert not np.allclose(variables['params']['head']['kernel'], variables['params']['head2']['kernel'])
    predicted = objective.predict(variables, batch['target'])
    both = [predicted['features'] @ variables['params'][h]['kernel'] for h in ('head', 'head2')]
    np.testing.assert_allclose(predicted['logits'], (both[0] + both[1]) / 2, rtol=1e-4, atol=1e-6)


def test_dropout_of_the_heads_draws_apart():
    objective, batch = mcd(network(head={'name': 'mlp', 'widths': [64], 'dropout': 0.5})), two_streams()
    variables = jax.jit(objective.init)(jax.random.key(0), batch)
    same = {**variables, 'params': {**variables['params'], 'head2': variables['params']['head']}}
    value, _ = jax.jit(objective.phases[-1].loss)(same, batch, jax.random.key(1))
    assert value > 1e-3


def test_bad_fields_and_phases_without_parameters_are_one_line():
    with pytest.raises(UserError, match='config.objective.repeats: must be at least 1, not 0'):
        mcd(network(), repeats=0)
    objective = mcd(network())
    variables = jax.jit(objective.init)(jax.random.key(0), two_streams())
    phases = [(phase.name, phase.rule) for phase in objective.phases]
    with pytest.raises(UserError, match="leaves the phase 'minimise' .*nothing to train; add a rule for it"):
        create_partition([('head.*', {'name': 'sgd', 'lr': 1.0})], variables['params'], steps=1, phases=phases)


def test_mcd_runs_after_a_supervised_stage(digits_config, tmp_path):
    adam = {'name': 'adam', 'lr': 1e-3}
    target = {'spec': 'sklearn:digits/train[64:128]', 'unlabelled': True}
    config = digits_config(
        data={
            'train': {'source': 'sklearn:digits/train[:64]', 'target': target},
            'eval': 'sklearn:digits/val[:50]',
            'train_transform': ['to_float'],
            'eval_transform': ['to_float'],
        },
        model={'name': 'convnet', 'widths': [4], 'norm': 'batch', 'dense': [8]},
        stages=[
            {'steps': 2, 'train': [('.*', adam)], 'objective': {'name': 'supervised', 'stream': 'source'}},
            {'steps': 2, 'train': [('.*', adam)], 'objective': {'name': 'mcd', 'repeats': 2}},
        ],
    )
    state = train_and_evaluate(plain(config), tmp_path)
    assert set(state.params) == {'backbone', 'head', 'head2'}
