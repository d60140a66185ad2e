"""Multi-task objectives: Kendall's formula, GradNorm by finite differences, MGDA-UB by a search; float64 references."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.networks import model_from
from tl_jax.objectives.multitask import gradnorm_gaps, multitask, task_figures
from tl_jax.train import train_and_evaluate

TASKS = ('left', 'right')


def model(**fields):
    fields = {'name': 'mlp', 'dense': [8], **fields}
    return model_from(**fields, classes=4, dtype=jnp.float32, load=False)


def batch_of(seed=0, rows=12):
    rng = np.random.default_rng(seed)
    labels = {f'label_{task}': rng.integers(0, 4, rows).astype(np.int32) for task in TASKS}
    return {'train': {'inputs': rng.normal(size=(rows, 5)).astype(np.float32), **labels}}


def made(weights='uniform', tasks=TASKS, **fields):
    objective = multitask(model(), num_classes=4, tasks=tasks, weights=weights, **fields)
    return objective, objective.init(jax.random.key(0), batch_of())


def reference_losses(params, batch):
    """Cross-entropy of every task of `mlp` in float64, and the gradients of the features."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in trees.flatten(params).items()}
    fields = batch['train']
    hidden = np.maximum(fields['inputs'] @ p['backbone/dense1/kernel'] + p['backbone/dense1/bias'], 0)
    losses, grads = [], []
    for task in TASKS:
        logits = hidden @ p[f'{task}/kernel'] + p[f'{task}/bias']
        exp = np.exp(logits - logits.max(1, keepdims=True))
        probabilities, hot = exp / exp.sum(1, keepdims=True), np.eye(4)[fields[f'label_{task}']]
        losses.append(-np.mean(np.log((probabilities * hot).sum(1))))
        grads.append((probabilities - hot) @ p[f'{task}/kernel'].T / len(hidden))
    return np.array(losses), np.array(grads), hidden, fields


def test_uniform_is_the_sum_of_the_tasks():
    objective, variables = made()
    assert set(variables['params']) == {'backbone', 'left', 'right'}
    losses, *_ = reference_losses(variables['params'], batch_of())
    value, aux = jax.jit(objective.loss)(variables, batch_of(), jax.random.key(1))
    np.testing.assert_allclose(value, losses.sum(), rtol=1e-5)
    np.testing.assert_allclose([aux.losses[t] for t in TASKS], losses, rtol=1e-5)
    weighed, _ = made([0.25, 0.5])
    np.testing.assert_allclose(
        weighed.loss(variables, batch_of(), jax.random.key(1))[0], losses @ [0.25, 0.5], rtol=1e-5
    )


def test_one_task_alone_and_tasks_of_other_sizes():
    alone, variables = made(tasks=['right'])
    assert set(variables['params']) == {'backbone', 'right'}
    assert set(alone.loss(variables, batch_of(), jax.random.key(1))[1].losses) == {'right'}
    narrow, variables = made(tasks={'left': 4, 'right': 3})
    batch = batch_of()
    batch['train']['label_right'] %= 3
    assert narrow.predict(variables, batch['train'])['logits_right'].shape == (12, 3)
    wide, variables = made(tasks={'left': 5})
    with pytest.raises(UserError, match=r'tasks\.left: 5 classes, and the heads have 4'):
        wide.loss(variables, batch_of(), jax.random.key(1))


def test_uncertainty_is_kendalls_formula():
    objective, variables = made('uncertainty')
    s = np.array([0.7, -0.4])
    variables['params']['log_variance'] = dict(zip(TASKS, map(jnp.float32, s), strict=True))
    losses, *_ = reference_losses(variables['params'], batch_of())
    value, aux = jax.jit(objective.loss)(variables, batch_of(), jax.random.key(1))
    sigma = np.exp(s / 2)
    np.testing.assert_allclose(value, np.sum(losses / sigma**2 + np.log(sigma)), rtol=1e-5)
    np.testing.assert_allclose(sum(aux.losses.values()), value, rtol=1e-6)
    grads = jax.jit(jax.grad(lambda v: objective.loss(v, batch_of(), jax.random.key(1))[0]))(variables)['params']
    # d/ds (exp(-s) L + s / 2)
    expected = 0.5 - np.exp(-s) * losses
    np.testing.assert_allclose([grads['log_variance'][t] for t in TASKS], expected, rtol=1e-4)


def test_gradnorm_moves_the_weights_as_finite_differences_say():
    objective, variables = made('gradnorm', shared_layer='backbone/dense1/kernel', asymmetry=1.5)
    params, batch = variables['params'], batch_of()
    v = np.array([0.3, -0.2])
    params['task_weights'] = dict(zip(TASKS, map(jnp.float32, v), strict=True))
    losses, feature_grads, hidden, fields = reference_losses(params, batch)
    initial = losses * np.array([1.3, 2.1])
    variables['initial_losses'] = dict(zip(TASKS, map(jnp.float32, initial), strict=True))
    norms = np.array([np.linalg.norm(fields['inputs'].T @ (g * (hidden > 0))) for g in feature_grads])

    def share_of(v):
        return 2 * np.exp(v) / np.exp(v).sum()

    ratios = losses / initial
    target = np.mean(share_of(v) * norms) * (ratios / ratios.mean()) ** 1.5

    def gap(v):
        return np.abs(share_of(v) * norms - target).sum()

    steps = np.eye(2) * 1e-6
    expected = [(gap(v + step) - gap(v - step)) / 2e-6 for step in steps]
    (_, aux), grads = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(variables, batch, jax.random.key(1))
    np.testing.assert_allclose([grads['params']['task_weights'][t] for t in TASKS], expected, rtol=1e-3)
    np.testing.assert_allclose([aux.collections['initial_losses'][t] for t in TASKS], initial, rtol=1e-6)
    # The network itself descends Σ w L, the gaps leave it alone.
    plain, _ = made(list(share_of(v)))
    sums = jax.jit(jax.grad(lambda p: plain.loss({'params': p}, batch, jax.random.key(1))[0]))(
        {role: params[role] for role in ('backbone', *TASKS)}
    )
    for path, leaf in trees.flatten(sums).items():
        np.testing.assert_allclose(trees.flatten(grads['params'])[path], leaf, rtol=1e-4, atol=1e-6)


def test_gradnorm_keeps_the_first_losses():
    objective, variables = made('gradnorm', shared_layer='backbone/dense1/.*')
    loss = jax.jit(objective.loss)
    first = loss(variables, batch_of(1), jax.random.key(1))[1].collections['initial_losses']
    losses, *_ = reference_losses(variables['params'], batch_of(1))
    np.testing.assert_allclose([first[t] for t in TASKS], losses, rtol=1e-5)
    later = loss({**variables, 'initial_losses': first}, batch_of(2), jax.random.key(2))[1]
    assert later.collections['initial_losses'] == first


def test_gradnorm_gaps_are_zero_where_every_task_learns_alike():
    gaps = gradnorm_gaps(jnp.array([0.5, 1.5]), jnp.array([3.0, 1.0]), jnp.array([0.4, 0.4]), 1.5)
    np.testing.assert_allclose(gaps, 0, atol=1e-6)


@pytest.mark.parametrize('normalize', ['none', 'loss', 'l2', 'loss+'])
def test_mgda_ub_weighs_by_the_features_gradients(normalize):
    objective, variables = made('mgda_ub', normalize=normalize)
    losses, grads, *_ = reference_losses(variables['params'], batch_of())
    vectors = grads.reshape(2, -1)
    norms = np.linalg.norm(vectors, axis=1)
    by = {'none': 1, 'loss': losses, 'l2': norms, 'loss+': losses * norms}[normalize]
    vectors = vectors / np.reshape(by * np.ones(2), (2, 1))
    grid = np.linspace(0, 1, 100001)
    lengths = ((grid[:, None] * vectors[0] + (1 - grid[:, None]) * vectors[1]) ** 2).sum(1)
    value, aux = jax.jit(objective.loss)(variables, batch_of(), jax.random.key(1))
    best = grid[lengths.argmin()]
    np.testing.assert_allclose(aux.metrics['weight_left'], best, atol=1e-4)
    np.testing.assert_allclose(value, best * losses[0] + (1 - best) * losses[1], rtol=1e-4)


def test_figures_are_means_over_tasks():
    rng = np.random.default_rng(0)
    predictions = {f'logits_{t}': rng.normal(size=(50, 4)) for t in TASKS}
    predictions |= {f'label_{t}': rng.integers(0, 4, 50) for t in TASKS}
    figures = task_figures(predictions, TASKS)
    for task in TASKS:
        p = np.exp(predictions[f'logits_{task}'])
        p /= p.sum(1, keepdims=True)
        right = p[np.arange(50), predictions[f'label_{task}']]
        np.testing.assert_allclose(figures[f'{task}/loss'], -np.log(right).mean(), rtol=1e-9)
        assert figures[f'{task}/accuracy'] == np.mean(right == p.max(1))
    assert figures['accuracy'] == np.mean([figures[f'{t}/accuracy'] for t in TASKS])


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(tasks=[]), 'names no task'),
        (dict(tasks=['head']), "'head' is the name of another role"),
        (dict(tasks=TASKS, weights=[1.0]), '1 numbers for 2 tasks'),
        (dict(tasks=TASKS, weights='gradnorm'), 'GradNorm needs the last layer'),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        multitask(model(), num_classes=4, **fields)


def test_a_label_or_layer_that_is_not_there_is_named():
    objective, variables = made()
    with pytest.raises(UserError, match="no field 'label_right'; they have inputs, label_left"):
        objective.loss(
            variables,
            {'train': {k: v for k, v in batch_of()['train'].items() if k != 'label_right'}},
            jax.random.key(0),
        )
    for layer, message in (('backbone/fc/.*', r"'backbone/fc/\.\*' matches no"), ('(fc', r"'\(fc' is not a regular")):
        objective, variables = made('gradnorm', shared_layer=layer)
        with pytest.raises(UserError, match=f'shared_layer: {message}'):
            objective.loss(variables, batch_of(), jax.random.key(0))


def test_a_run_reports_every_task(digits_config, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {'x_train': rng.integers(0, 256, (40, 28, 28), dtype=np.uint8), 'y_train': rng.integers(0, 10, 40)}
    np.savez(tmp_path / 'digits.npz', **arrays)
    config = digits_config(
        model={'name': 'mlp', 'dense': [8]},
        objective={'name': 'multitask', 'tasks': ['left', 'right'], 'weights': 'uncertainty'},
        gradient={'name': 'mgda'},
        stages=[{'steps': 2, 'train': [('.*', {'name': 'adam', 'lr': 1e-3})]}],
    )
    spec = f'multimnist:{tmp_path}/digits.npz/train'
    config['data'] |= {'train': f'{spec}[:32]', 'eval': f'{spec}[32:]'}
    train_and_evaluate(config, tmp_path / 'run')
    records = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    last = next(r for r in reversed(records) if 'val/accuracy' in r)
    assert last['val/accuracy'] == pytest.approx((last['val/left/accuracy'] + last['val/right/accuracy']) / 2)
