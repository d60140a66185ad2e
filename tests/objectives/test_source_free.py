import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import rotate
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from tl_jax import pretrained
from tl_jax.errors import UserError
from tl_jax.networks import model_from
from tl_jax.objectives.source_free import cluster_labels, entropy, shot


def obtain_label(features, logits):
    """`obtain_label` of github.com/tim-learn/SHOT digit/uda_digit.py @f7d555a in float64, without its I/O."""
    output = np.exp(logits - logits.max(1, keepdims=True))
    output = output / output.sum(1, keepdims=True)
    all_fea = np.concatenate((features, np.ones((len(features), 1))), 1)
    all_fea = (all_fea.T / np.linalg.norm(all_fea, axis=1)).T
    k = output.shape[1]
    aff = output
    initc = aff.transpose().dot(all_fea)
    initc = initc / (1e-8 + aff.sum(axis=0)[:, None])
    pred_label = cdist(all_fea, initc, 'cosine').argmin(axis=1)
    for _ in range(1):
        aff = np.eye(k)[pred_label]
        initc = aff.transpose().dot(all_fea)
        initc = initc / (1e-8 + aff.sum(axis=0)[:, None])
        pred_label = cdist(all_fea, initc, 'cosine').argmin(axis=1)
    return pred_label.astype('int')


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def loss_of_the_authors(logits, label, cls_par, ent_par=1.0):
    """`train_target` of the same file in float64: its classifier, entropy and `gent` terms."""
    p = softmax(logits)
    value = cls_par * np.mean([-np.log(p[i, label[i]]) for i in range(len(p))])
    value += ent_par * np.mean(np.sum(-p * np.log(p + 1e-5), axis=1))
    mean = p.mean(axis=0)
    return value - ent_par * np.sum(-mean * np.log(mean + 1e-5))


@pytest.fixture
def network():
    return model_from(name='mlp', dense=[6], head='weight_norm', classes=4, dtype=jnp.float32, load=False)


@pytest.fixture
def batch():
    rng = np.random.default_rng(5)
    return {'target': {'inputs': rng.normal(size=(12, 5)).astype(np.float32), 'index': rng.permutation(30)[:12]}}


@pytest.mark.parametrize('seed', range(5))
def test_cluster_labels_equal_the_authors(seed):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, 8))
    features = centres[rng.integers(6, size=300)] + 0.9 * rng.normal(size=(300, 8))
    logits = features @ centres.T + 2 * rng.normal(size=(300, 6))
    expected = obtain_label(features, logits)
    labels = jax.jit(cluster_labels)(jnp.float32(features), jnp.float32(softmax(logits)), jnp.ones(300))
    assert (
        len(set(expected)) == 6 and (expected != logits.argmax(1)).sum() > 10
    )  # neither trivial nor the network's own
    np.testing.assert_array_equal(labels, expected)


def test_masked_rows_do_not_move_the_centroids():
    rng = np.random.default_rng(0)
    features, logits = rng.normal(size=(80, 5)), 3 * rng.normal(size=(80, 3))
    expected = obtain_label(features[:60], logits[:60])
    mask = np.arange(80) < 60
    labels = jax.jit(cluster_labels)(jnp.float32(features), jnp.float32(softmax(logits)), jnp.float32(mask))
    np.testing.assert_array_equal(labels[:60], expected)


def test_a_class_without_examples_takes_none():
    features = jnp.array([[1.0, 0.0], [1.1, 0.0], [-1.0, 0.1], [-1.2, 0.0]])
    probabilities = jnp.array([[0.9, 0.1, 0.0]] * 2 + [[0.1, 0.9, 0.0]] * 2)
    np.testing.assert_array_equal(jax.jit(cluster_labels)(features, probabilities, jnp.ones(4)), [0, 0, 1, 1])


def test_entropy_lies_between_certainty_and_log_classes():
    np.testing.assert_allclose(entropy(jnp.full((3, 8), 1 / 8)), np.log(8), atol=1e-3)
    np.testing.assert_allclose(entropy(jnp.eye(5)), 0, atol=1e-3)


@pytest.mark.parametrize('weight', [0.0, 0.3])
def test_loss_and_its_gradient_equal_the_authors(network, batch, weight):
    objective = shot(network, num_examples={'target': 30}, pseudo_weight=weight)
    variables = objective.init(jax.random.key(0), batch)
    # Logits far from uniform: a start of a head is nearly so.
    variables['params']['head']['scale'] = 4 * variables['params']['head']['scale']
    label = np.random.default_rng(1).integers(4, size=30)
    if weight:
        variables['pseudo_labels'] = {'target': jnp.asarray(label)}
    derive = jax.jit(jax.value_and_grad(objective.loss, has_aux=True, allow_int=True))
    (value, aux), grads = derive(variables, batch, jax.random.key(1))

    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])

    def reference(bias):
        hidden = batch['target']['inputs'] @ params['backbone']['dense1']['kernel'] + bias
        head = params['head']
        kernel = head['scale'] * head['kernel'] / np.sqrt((head['kernel'] ** 2).sum(0))
        logits = np.maximum(hidden, 0) @ kernel + head['bias']
        return loss_of_the_authors(logits, label[batch['target']['index']], weight)

    bias, step = params['backbone']['dense1']['bias'] + 0.0, 1e-6
    np.testing.assert_allclose(value, reference(bias), rtol=1e-5)
    slope = [(reference(bias + step * e) - reference(bias - step * e)) / (2 * step) for e in np.eye(6)]
    np.testing.assert_allclose(grads['params']['backbone']['dense1']['bias'], slope, rtol=2e-3, atol=1e-5)
    assert np.abs(slope).max() > 1e-3
    assert ('pseudo_agreement' in aux.metrics) == bool(weight)


def test_no_pseudo_labels_before_the_first_pass_add_nothing(network, batch):
    with_labels, without = (shot(network, num_examples={'target': 30}, pseudo_weight=w) for w in (0.5, 0.0))
    variables = with_labels.init(jax.random.key(0), batch)
    values = [jax.jit(o.loss)(variables, batch, jax.random.key(1))[0] for o in (with_labels, without)]
    np.testing.assert_allclose(*values, rtol=1e-6)
    assert without.refresh is None


def test_refresh_labels_the_whole_stream_by_index(network):
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(30, 5)).astype(np.float32) * 3
    objective = shot(network, num_examples={'target': 30})
    first = {'target': {'inputs': inputs[:12], 'index': np.arange(12)}}
    variables = objective.init(jax.random.key(0), first)
    order = np.r_[rng.permutation(30), 0, 0].reshape(4, 8)  # in any order, the last two rows padding

    def batches(stream):
        assert stream == 'target'
        for number, rows in enumerate(order):
            mask = 8 * number + np.arange(8) < 30
            yield {'inputs': inputs[rows], 'index': rows, 'mask': mask.astype(np.float32)}

    endpoints = network.apply(variables, inputs, train=False)
    expected = obtain_label(np.float64(endpoints['features']), np.float64(endpoints['logits']))
    np.testing.assert_array_equal(objective.refresh(variables, batches)['pseudo_labels']['target'], expected)
    assert len(set(expected)) > 1


def test_the_hypothesis_never_moves(network, batch):
    (phase,) = shot(network, num_examples={'target': 30}).phases
    assert re.fullmatch(phase.rule, 'backbone/dense1/kernel') and not re.fullmatch(phase.rule, 'head/kernel')


def test_a_network_without_a_head_is_refused(batch):
    headless = model_from(name='mlp', dense=[6], num_classes=0, classes=4, dtype=jnp.float32, load=False)
    with pytest.raises(UserError, match='config.model: SHOT keeps'):
        shot(headless, num_examples={'target': 30}).init(jax.random.key(0), batch)


def test_weight_norm_head_starts_as_linear_and_its_scale_is_the_norm():
    heads = {
        name: model_from(name='mlp', dense=[], head=name, classes=3, dtype=jnp.float32, load=False)
        for name in ('linear', 'weight_norm')
    }
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    variables = {name: model.init(jax.random.key(0), x) for name, model in heads.items()}
    logits = [heads[name].apply(variables[name], x, train=False)['logits'] for name in heads]
    np.testing.assert_allclose(*logits, rtol=1e-5)
    head = variables['weight_norm']['params']['head']
    grown = {**head, 'kernel': 7 * head['kernel'], 'scale': 2 * head['scale']}
    doubled = heads['weight_norm'].apply({'params': {'backbone': {}, 'head': grown}}, x, train=False)['logits']
    np.testing.assert_allclose(doubled, 2 * logits[1], rtol=1e-5)


NETWORK = dict(name='mlp', dense=[32], dense_norm='batch', dense_activation='none', head='weight_norm', num_classes=10)


def test_adaptation_without_the_source_files_improves_the_target(tmp_path):
    """Digits that are turned: the source model is trained, the source file deleted, the weights alone adapted."""
    from tl_jax.train import train_and_evaluate

    images, labels = load_digits(return_X_y=True)
    images = np.uint8(images.reshape(-1, 8, 8) * (255 / 16))
    np.savez(tmp_path / 'source.npz', x_train=images[:900], y_train=labels[:900])
    np.savez(tmp_path / 'target.npz', x_train=turned(images[900:], 25), y_train=labels[900:])
    sgd = dict(name='sgd', momentum=0.9, lr=0.05)
    common = dict(model=NETWORK, batch_size=64, eval_batch_size=256, mesh={'data': 1}, log_every=50)
    source = dict(
        **common,
        data=dict(
            train=dict(source=f'npz:{tmp_path}/source.npz/train'),
            eval=f'npz:{tmp_path}/target.npz/train',
            train_transform=['to_float'],
            eval_transform=['to_float'],
        ),
        objective=dict(name='supervised', stream='source', label_smoothing=0.1),
        stages=[dict(steps=120, train=[('.*', sgd)])],
    )
    train_and_evaluate(source, tmp_path / 'source_run')
    before = accuracy_of(tmp_path / 'source_run')
    (tmp_path / 'source.npz').unlink()

    weights = str(tmp_path / 'source_run' / 'model.safetensors')
    adaptation = dict(
        **{**common, 'model': dict(NETWORK, source=weights)},
        data=dict(
            train=dict(target=dict(spec=f'npz:{tmp_path}/target.npz/train', unlabelled=True)),
            eval=f'npz:{tmp_path}/target.npz/train',
            train_transform=['to_float'],
            eval_transform=['to_float'],
        ),
        objective=dict(name='shot', pseudo_weight=0.3),
        stages=[dict(steps=84, train=[('.*', dict(sgd, lr=0.01))])],
        refresh_every=14,
    )
    train_and_evaluate(adaptation, tmp_path / 'adapted_run')
    after = accuracy_of(tmp_path / 'adapted_run')
    assert after > before + 0.05, (before, after)
    old, new = (pretrained.read(tmp_path / run / 'model.safetensors').tensors for run in ('source_run', 'adapted_run'))
    for leaf in ('kernel', 'scale', 'bias'):  # the rule trains all, the method keeps the hypothesis
        np.testing.assert_array_equal(*(file[f'params/head/{leaf}'].array() for file in (old, new)))


def turned(images, degrees):
    """Images of another domain: rotated, with less contrast."""
    return np.uint8([0.6 * rotate(image, degrees, reshape=False, order=1) + 60 for image in images])


def accuracy_of(workdir):
    return json.loads((workdir / 'summary.json').read_text())['metrics']['val/accuracy']
