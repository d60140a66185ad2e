"""Bi-tuning: its two contrasts, its queue and its key encoder, and the loss as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import experiment as experiment_lib
from tl_jax import train
from tl_jax.errors import UserError
from tl_jax.objectives import Model, started, supervised
from tl_jax.objectives.bi_tuning import bi_tuning, class_vectors, contrast, enqueued


def contrast_of(anchors, own, queue, label, temperature):
    """Eq. 3 and 6, one example after the other."""
    rows = []
    for i, y in enumerate(label):
        keys = np.concatenate([own[i : i + 1], queue[y], *(queue[c] for c in range(len(queue)) if c != y)])
        scores = keys @ anchors[i] / temperature
        log_p = scores - np.log(np.sum(np.exp(scores - scores.max()))) - scores.max()
        rows.append(-log_p[: 1 + queue.shape[1]].mean())
    return np.mean(rows)


def test_contrast_in_float64():
    draw = np.random.RandomState(0)
    anchors, own, queue = draw.normal(size=(4, 5)), draw.normal(size=(4, 5)), draw.normal(size=(3, 6, 5))
    label = np.array([0, 2, 1, 2])
    got = contrast(*(jnp.asarray(x, jnp.float32) for x in (anchors, own, queue)), jnp.asarray(label), 0.3)
    assert float(got) == pytest.approx(contrast_of(anchors, own, queue, label, 0.3), rel=1e-5)


def test_whole_loss_in_float64():
    """CE + weight · (CCE + CCL) on a linear network with a key encoder apart from it."""
    draw, weight, momentum, temperature = np.random.RandomState(0), 0.7, 0.6, 0.3
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    layer = lambda rows, columns: {'kernel': normal(rows, columns), 'bias': normal(columns)}
    linear = lambda x, p: x @ p['kernel'] + p['bias']

    def apply(variables, inputs, train, mutable=(), rngs=None):
        features = linear(inputs, variables['params']['backbone'])
        return {'features': features, 'logits': linear(features, variables['params']['head'])}, {}

    model = Model(None, apply)
    fields = dict(weight=weight, momentum=momentum, temperature=temperature, keys=2, dim=3, view={})
    objective = bi_tuning(supervised(model, num_classes=3), model=model, num_classes=3, **fields)
    params = {'backbone': layer(6, 4), 'head': layer(4, 3), 'projector': layer(4, 3)}
    encoder = {'backbone': layer(6, 4), 'projector': layer(4, 3)}
    queue = {'features': unit(normal(3, 2, 5)), 'projections': unit(normal(3, 2, 3)), 'place': np.zeros(3, np.int32)}
    held = {'queue': queue, 'encoder': {'params': encoder}}
    image, label = normal(5, 6), np.array([0, 2, 1, 2, 0])
    batch = {'train': {'image': image, 'label': label}}
    value, aux = jax.jit(objective.loss)({'params': params, 'bi_tuning': held}, batch, jax.random.key(0))

    params, encoder, queue = jax.tree.map(lambda x: x.astype(np.float64), (params, encoder, queue))
    network = {name: params[name] for name in encoder}
    encoder = jax.tree.map(lambda mine, theirs: momentum * mine + (1 - momentum) * theirs, encoder, network)
    features, keys = (linear(image, tree['backbone']) for tree in (params, encoder))
    logits = linear(features, params['head'])
    cross_entropy = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(5), label])
    extended = lambda x: unit(np.concatenate([x, np.ones((len(x), 1))], 1))
    w = unit(np.concatenate([params['head']['kernel'], params['head']['bias'][None]]).T)[label]
    z, key_z = unit(linear(features, params['projector'])), unit(linear(keys, encoder['projector']))
    at_classes = contrast_of(w, extended(features), queue['features'], label, temperature)
    at_projections = contrast_of(z, key_z, queue['projections'], label, temperature)
    assert float(value) == pytest.approx(cross_entropy + weight * (at_classes + at_projections), rel=1e-5)

    after = aux.collections['bi_tuning']
    for name, found in (('features', extended(keys)), ('projections', key_z)):
        np.testing.assert_allclose(after['queue'][name][2], found[label == 2], rtol=1e-5, atol=1e-6)
    jax.tree.map(
        lambda ours, wanted: np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6),
        after['encoder'],
        {'params': encoder},
    )


def test_the_queue_holds_the_newest_of_each_class():
    draw = np.random.RandomState(0)
    queue = {'features': jnp.zeros((3, 2, 4)), 'projections': jnp.zeros((3, 2, 1)), 'place': jnp.zeros(3, jnp.int32)}
    lists = [[np.zeros(4), np.zeros(4)] for _ in range(3)]
    place = [0, 0, 0]
    for label in ([0, 1, 1], [1, 1, 1], [2, 0, 0]):
        keys = draw.normal(size=(3, 4)).astype(np.float32)
        queue = enqueued(queue, {'features': keys, 'projections': keys[:, :1]}, jnp.asarray(label))
        for y, key in zip(label, keys, strict=True):  # one after the other
            lists[y][place[y]], place[y] = key, (place[y] + 1) % 2
        np.testing.assert_array_equal(queue['features'], lists)
        np.testing.assert_array_equal(queue['projections'], np.array(lists)[..., :1])
        assert queue['place'].tolist() == place


def test_class_vectors_need_a_linear_head():
    kernel, bias = np.random.RandomState(0).normal(size=(4, 3)), np.array([1.0, 2.0, 3.0])
    rows = np.concatenate([kernel, bias[None]]).T
    wanted = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(
        class_vectors({'kernel': jnp.asarray(kernel), 'bias': jnp.asarray(bias)}), wanted, rtol=1e-5
    )
    with pytest.raises(UserError, match='config.model.head: bi_tuning compares'):
        class_vectors({'hidden1': {}, 'output': {}})


def test_in_a_run(digits_config, tmp_path):
    """The key encoder follows the network, the queue fills with unit keys, and the projector learns."""
    section = {'name': 'supervised', 'bi_tuning': {'keys': 3, 'momentum': 0.5, 'dim': 4}}
    config = digits_config(objective=section, model={'name': 'mlp', 'dense': [8], 'dense_norm': 'batch'})
    config['stages'][0]['steps'] = 2
    built = experiment_lib.build(config_lib.resolve(config))
    before = started(built.stages[0].objective, built.stages[0].init(jax.random.key(0), built.batch))
    state = train.train_and_evaluate(config, tmp_path / 'run')
    held = state.collections['bi_tuning']
    np.testing.assert_allclose(np.linalg.norm(held['queue']['features'], axis=-1), 1, rtol=1e-5)
    assert np.abs(held['queue']['projections'] - before['bi_tuning']['queue']['projections']).max() > 0.1
    kernel = lambda tree: np.asarray(tree['backbone']['dense1']['kernel'])
    start, key, now = (kernel(t) for t in (before['params'], held['encoder']['params'], state.params))
    # After two steps of Adam at 1e-3 the average is half the first step: it saw θ0 and θ1.
    assert 0 < np.abs(key - start).max() < np.abs(now - start).max()
    stats = held['encoder']['batch_stats']['backbone']['dense_norm1']['mean']
    assert np.abs(stats - before['batch_stats']['backbone']['dense_norm1']['mean']).max() > 0
    assert np.abs(state.params['projector']['kernel'] - before['params']['projector']['kernel']).max() > 1e-4


def test_bad_fields_in_one_line(digits_config):
    section = {'name': 'supervised', 'bi_tuning': {}, 'mixed': {'mixup': 0.2}}
    built = experiment_lib.build(
        config_lib.resolve(digits_config(objective=section, model={'name': 'mlp', 'dense': [4]}))
    )
    with pytest.raises(UserError, match='mixed: leaves an example no one class'):
        jax.eval_shape(built.stages[0].objective.loss, built.shapes(), built.batch, jax.random.key(0))
    for fields, message in ((dict(momentum=1.0), 'momentum: must lie'), (dict(keys=0), 'keys: must be at least 1')):
        with pytest.raises(UserError, match=message):
            section = {'name': 'supervised', 'bi_tuning': fields}
            experiment_lib.build(config_lib.resolve(digits_config(objective=section)))
