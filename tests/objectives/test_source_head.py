"""The source's head kept as a second one: learning without forgetting, co-tuning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import experiment as experiment_lib
from tl_jax import train, trees
from tl_jax.errors import UserError
from tl_jax.objectives import started
from tl_jax.objectives.source_head import relationship


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A network of seven classes, at random."""
    from tl_jax.models import create_model
    from tl_jax.pretrained import save_variables

    module = create_model('mlp', dense=(8,), num_classes=7)
    variables = module.init(jax.random.key(5), jnp.zeros((1, 8, 8, 1)), train=False)
    path = tmp_path_factory.mktemp('source') / 'source.safetensors'
    save_variables(path, jax.tree.map(np.asarray, dict(variables)), {})
    return path, variables


@pytest.fixture
def config(digits_config, source):
    def make(**wrappers):
        model = {'name': 'mlp', 'dense': [8], 'source': str(source[0]), 'fresh': ['head/.*']}
        return digits_config(model=model, objective={'name': 'supervised', **wrappers}, log_every=1)

    return make


def parts(config):
    """The experiment, and its variables away from the start."""
    built = experiment_lib.build(config_lib.resolve(config))
    objective = built.stages[0].objective
    variables = started(objective, built.stages[0].init(jax.random.key(0), built.batch))
    draw = np.random.RandomState(1)
    params = jax.tree.map(lambda w: w + 0.1 * draw.normal(size=w.shape).astype(np.float32), variables['params'])
    return built, objective, variables, {**variables, 'params': params}


def logits(params, head, image):
    """In float64, of `mlp`: flatten, dense, ReLU, head."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    x = np.asarray(image, np.float64).reshape(len(image), -1)
    x = np.maximum(x @ p['backbone']['dense1']['kernel'] + p['backbone']['dense1']['bias'], 0)
    return x @ p[head]['kernel'] + p[head]['bias']


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_lwf_in_float64(config, source):
    built, objective, start, now = parts(config(lwf=dict(weight=0.6, temperature=2.0, source_classes=7)))
    jax.tree.map(np.testing.assert_array_equal, start['params']['source_head'], source[1]['params']['head'])
    assert start['params']['head']['kernel'].shape == (8, 10)
    value, aux = objective.loss(now, built.batch, jax.random.key(0))
    image = built.batch['train']['image']
    old, new = (softmax(logits(v['params'], 'source_head', image) / 2) for v in (start, now))
    wanted = 0.6 * -np.mean(np.sum(old * np.log(new), -1))
    assert float(aux.metrics['lwf']) == pytest.approx(wanted, rel=1e-5) and not aux.endpoints
    cross_entropy = -np.mean(
        np.log(softmax(logits(now['params'], 'head', image)))[range(16), built.batch['train']['label']]
    )
    assert float(value) == pytest.approx(wanted + cross_entropy, rel=1e-5)


def test_lwf_is_at_its_least_at_the_start(config):
    """The soft cross-entropy's gradient in the shared network is zero where nothing has moved."""
    built, objective, start, _ = parts(config(lwf=dict(weight=1.0, source_classes=7)))

    def penalty(params):
        return objective.loss({**start, 'params': params}, built.batch, jax.random.key(0))[1].metrics['lwf']

    grads = jax.grad(penalty)(start['params'])
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) < 1e-6


def test_co_tuning_in_float64(config):
    built, objective, start, now = parts(config(co_tuning=dict(weight=0.9, temperature=1.5, source_classes=7)))
    data = built.data
    batches = lambda stream: data.batches(stream, data.sources[stream])
    measured = objective.refresh(start, batches)
    rows = [(b['image'], b['label'], b['mask']) for b in batches('train')]
    image, label, mask = (np.concatenate(column) for column in zip(*rows, strict=True))
    p = softmax(logits(start['params'], 'source_head', image) / 1.5)
    wanted = np.stack([p[(label == c) & (mask > 0)].mean(0) for c in range(10)])
    table = measured['relationship']['source_given_target']
    np.testing.assert_allclose(table, wanted, rtol=1e-4, atol=1e-7)
    now = {**now, **measured}
    _, aux = objective.loss(now, built.batch, jax.random.key(0))
    log_q = np.log(softmax(logits(now['params'], 'source_head', built.batch['train']['image'])))
    likely = wanted[built.batch['train']['label']]
    assert float(aux.metrics['co_tuning']) == pytest.approx(0.9 * -np.mean(np.sum(likely * log_q, -1)), rel=1e-4)
    # A mixture of two classes has the mixture of their rows.
    target = np.random.RandomState(0).dirichlet(np.ones(10), 16).astype(np.float32)
    mixed = {'train': {**built.batch['train'], 'target': target}}
    _, aux = objective.loss(now, mixed, jax.random.key(0))
    assert float(aux.metrics['co_tuning']) == pytest.approx(
        0.9 * -np.mean(np.sum(target @ wanted * log_q, -1)), rel=1e-4
    )
    # Once measured it stays: the network of a later refresh is not the source's any more.
    assert 'relationship' not in objective.refresh(now, batches)


def test_relationship_leaves_padding_out_and_knows_no_class_without_examples():
    p = np.array([[0.2, 0.8], [0.6, 0.4], [1.0, 0.0]])
    table = relationship(jnp.asarray(p), jnp.array([1, 1, 1]), jnp.array([1.0, 1.0, 0.0]), 3)
    np.testing.assert_allclose(table, [[0, 0], [0.4, 0.6], [0, 0]], rtol=1e-6)


def test_both_in_a_run(config, tmp_path):
    both = config(lwf=dict(source_classes=7), co_tuning=dict(source_classes=7))
    state = train.train_and_evaluate({**both, 'select_by': 'last'}, tmp_path / 'run')
    np.testing.assert_allclose(state.collections['relationship']['source_given_target'].sum(1), 1, rtol=1e-5)
    from tl_jax.finished import network

    # What is left is the network for the target, without the source's head.
    assert set(network(tmp_path / 'run')[1]['params']) == {'backbone', 'head'}
    assert 'source_head' in state.params and trees.flatten(state.collections['reference'])


@pytest.mark.parametrize('wrapper', ['lwf', 'co_tuning'])
def test_the_source_head_of_a_base_in_few_bits_that_is_frozen(config, tmp_path, wrapper):
    """Neither from codes nor, where the backbone runs once over each example, from features would its start be read."""
    changed = config(**{wrapper: {'source_classes': 7}})
    changed['data']['train'] = 'sklearn:digits/train[:40]'
    changed['model']['quantize'] = {'name': 'int8'}
    changed['stages'] = [{'epochs': 2, 'train': [('(head|source_head)/.*', {'name': 'adam', 'lr': 1e-3})]}]
    state = train.train_and_evaluate(changed, tmp_path / 'run')
    assert np.isfinite(trees.flatten(state.params)['source_head/kernel']).all()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(co_tuning=dict()), r'co_tuning.source_classes: is not known'),
        (dict(lwf=dict()), r'lwf.source_classes: is not known'),
        (dict(lwf=dict(source_classes=5)), r"source: has no 'head/.*' for 5 classes"),
    ],
)
def test_bad_source_heads_in_one_line(config, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        parts(config(**changes))
    assert '\n' not in str(caught.value)


def test_a_network_without_a_source_has_no_head_to_keep(digits_config):
    section = {'name': 'supervised', 'lwf': {'source_classes': 5}}
    with pytest.raises(UserError, match='config.model.source: is none'):
        experiment_lib.build(config_lib.resolve(digits_config(objective=section)))
