import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import objectives
from tl_jax.networks import model_from
from tl_jax.objectives import Model
from tl_jax.train import train_and_evaluate

LABELS = np.array([[0, 0, 1, 2, 2, 2], [1, 2, 0, 1, 0, 2]])  # other shots and another order in each episode
QUERIES = np.array([[2, 0, 1, 1], [0, 0, 2, 1]])


def episodes(seed=0):
    rng = np.random.default_rng(seed)
    return {
        'support_inputs': rng.normal(size=(2, 6, 3)).astype(np.float32),
        'query_inputs': rng.normal(size=(2, 4, 3)).astype(np.float32),
        'support_label': LABELS.astype(np.int32),
        'query_label': QUERIES.astype(np.int32),
    }


def linear_features():
    def init(key, inputs):
        return {'params': {'backbone': {'kernel': jax.random.normal(key, (inputs.shape[-1], 5))}}}

    def apply(variables, inputs, *, train, mutable=False, rngs=None):
        endpoints = {'features': inputs @ variables['params']['backbone']['kernel']}
        return endpoints if mutable is False else (endpoints, {})

    return Model(init, apply)


def by_hand(kernel, fields, distance, scale):
    """Losses and hits [B, Q] in float64, class by class."""
    losses, hits = [], []
    for support, query, label, wanted in zip(
        fields['support_inputs'], fields['query_inputs'], fields['support_label'], fields['query_label'], strict=True
    ):
        support, query = support.astype(float) @ kernel, query.astype(float) @ kernel
        centres = [support[label == k].mean(0) for k in range(3)]
        for q, y in zip(query, wanted, strict=True):
            if distance == 'euclidean':
                far = np.array([np.sum((q - c) ** 2) for c in centres])
            else:
                far = np.array([1 - q @ c / np.linalg.norm(q) / np.linalg.norm(c) for c in centres])
            p = np.exp(-scale * far) / np.exp(-scale * far).sum()
            losses.append(-np.log(p[y]))
            hits.append(p.argmax() == y)
    return np.reshape(losses, (2, 4)), np.reshape(hits, (2, 4))


@pytest.mark.parametrize(('distance', 'scale'), [('euclidean', 1.0), ('euclidean', 0.1), ('cosine', 10.0)])
def test_loss_is_the_paper_s(distance, scale):
    fields = episodes()
    objective = objectives.OBJECTIVES['protonet'](linear_features(), distance=distance, scale=scale)
    variables = objective.init(jax.random.key(0), {'train': fields})
    kernel = np.asarray(variables['params']['backbone']['kernel'], float)
    value, aux = jax.jit(objective.loss)(variables, {'train': fields}, jax.random.key(1))
    losses, hits = by_hand(kernel, fields, distance, scale)
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-5)
    assert aux.metrics['accuracy'] == pytest.approx(hits.mean())
    outputs = jax.jit(objective.predict)(variables, fields)
    np.testing.assert_allclose(outputs['loss'], losses.mean(1), rtol=1e-5)
    np.testing.assert_allclose(outputs['accuracy'], hits.mean(1), rtol=1e-6)


@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
def test_gradient_is_the_finite_difference(distance):
    fields = episodes(1)
    objective = objectives.OBJECTIVES['protonet'](linear_features(), distance=distance, scale=2.0)
    variables = objective.init(jax.random.key(2), {'train': fields})
    loss = lambda kernel: objective.loss(
        {'params': {'backbone': {'kernel': kernel}}}, {'train': fields}, jax.random.key(0)
    )[0]
    kernel = variables['params']['backbone']['kernel']
    grads = jax.jit(jax.grad(loss))(kernel)
    direction, h = np.random.default_rng(3).normal(size=kernel.shape), 1e-6
    up, down = (
        by_hand(np.asarray(kernel, float) + s * h * direction, fields, distance, 2.0)[0].mean() for s in (1, -1)
    )
    # The sum cancels: its terms are some hundred times as large, in float32.
    np.testing.assert_allclose(np.sum(grads * direction), (up - down) / (2 * h), rtol=1e-4, atol=1e-6)


def test_evaluation_uses_the_stored_statistics_and_training_moves_them():
    rng = np.random.default_rng(0)
    fields = {
        'support_image': rng.normal(size=(1, 4, 8, 8, 1)).astype(np.float32),
        'query_image': rng.normal(size=(1, 4, 8, 8, 1)).astype(np.float32),
        'support_label': np.array([[0, 0, 1, 1]], np.int32),
        'query_label': np.array([[0, 0, 1, 1]], np.int32),
    }
    model = model_from(
        name='convnet', widths=[4], norm='batch', classes=0, dtype=jnp.float32, load=False, num_classes=0
    )
    objective = objectives.OBJECTIVES['protonet'](model)
    variables = objective.init(jax.random.key(0), {'train': fields})
    assert set(variables['params']) == {'backbone'}
    _, aux = jax.jit(objective.loss)(variables, {'train': fields}, jax.random.key(1))
    both = np.concatenate([fields['support_image'], fields['query_image']], 1)[0]
    apply = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats']))
    model_moved = apply(variables, both)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), aux.collections, dict(model_moved))
    predict = jax.jit(objective.predict)
    loud = {**fields, 'query_image': fields['query_image'] * np.array([1, 1, 1, 100.0]).reshape(1, 4, 1, 1, 1)}
    hit = [predict(variables, f)['accuracy'][0] * 4 for f in (fields, loud)]
    assert abs(hit[0] - hit[1]) <= 1.001  # a query changes the answer to itself alone


def test_figures_are_mean_and_interval_over_episodes():
    accuracy = np.array([1.0, 0.5, 0.75, 0.25])
    figures = objectives.OBJECTIVES['protonet'](linear_features()).figures(
        {'accuracy': accuracy, 'loss': np.arange(4.0), 'index': np.arange(4)}
    )
    assert figures['accuracy'] == 0.625
    assert figures['accuracy_ci95'] == pytest.approx(1.96 * (0.3125 / 4) ** 0.5 / 2)
    assert figures['loss'] == 1.5


def test_a_run_on_digits(tmp_path):
    """Through the loop, on episodes of the embedded digits; five ways of which chance gets 0.2."""
    few = {'ways': 5, 'shots': 5, 'queries': 5, 'transform': ['to_float']}
    train_and_evaluate(
        {
            'model': {'name': 'convnet', 'widths': [8, 16], 'norm': 'batch', 'num_classes': 0},
            'objective': {'name': 'protonet'},
            'data': {
                'train': {'spec': 'sklearn:digits/train', 'episodes': {**few, 'count': 1000}},
                'test': {'spec': 'sklearn:digits/test', 'episodes': {**few, 'count': 10}},
            },
            'stages': [{'steps': 15, 'train': [('.*', {'name': 'adam', 'lr': 1e-2})]}],
            'batch_size': 1,
            'eval_batch_size': 4,
            'mesh': {'data': 1},
        },
        tmp_path,
    )
    metrics = json.loads((tmp_path / 'summary.json').read_text())['metrics']
    assert set(metrics) == {'test/accuracy', 'test/accuracy_ci95', 'test/loss'}
    assert metrics['test/accuracy'] > 0.75
