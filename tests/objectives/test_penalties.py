"""Penalties and regularisers around an objective: their equations, what they leave alone, and how gradients take them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import experiment as experiment_lib
from tl_jax import objectives, train, trees
from tl_jax.errors import UserError
from tl_jax.gradients import GRADIENTS
from tl_jax.models import create_model
from tl_jax.objectives import Model, started
from tl_jax.objectives.references import attention_weights, importance, map_distance
from tl_jax.objectives.stochastic import mix, symmetric_divergence

CLASSES = 3


def network(**fields):
    fields = {'name': 'convnet', 'widths': (4, 5), 'norm': 'batch', **fields}
    module = create_model(num_classes=CLASSES, **fields)
    init = lambda key, inputs: dict(module.init(key, inputs, train=False))
    classify = lambda v, x, train=False, rngs=None: module.apply(v, x, train, rngs=rngs, method='classify')
    return Model(init, module.apply, classify)


@pytest.fixture
def batch():
    draw = np.random.RandomState(0)
    image = draw.normal(size=(12, 8, 8, 1)).astype(np.float32)
    fields = {'image': image, 'label': draw.randint(CLASSES, size=12), 'mask': np.ones(12, np.float32)}
    return {'train': {**fields, 'index': np.arange(12)}}


def wrapped(model, batch, moved=0.3, **sections):
    """Objective, and its variables with parameters away from where they started."""
    objective = objectives.supervised(model, num_classes=CLASSES)
    for name, fields in sections.items():
        wrapper = objectives.WRAPPERS[name]
        facts = {'model': model, 'num_classes': CLASSES, 'num_examples': {'train': 12}}
        objective = wrapper(objective, **fields, **config_lib.asked(wrapper, facts))
    variables = started(objective, objective.init(jax.random.key(0), batch))
    draw = np.random.RandomState(1)
    shift = lambda w: w + moved * draw.normal(size=w.shape).astype(np.float32)
    return objective, {**variables, 'params': jax.tree.map(shift, variables['params'])}


def losses(objective, variables, batch, seed=0):
    value, aux = objective.loss(variables, batch, jax.random.key(seed))
    return float(value), aux


def parameters(tree):
    return {path: np.asarray(leaf, np.float64) for path, leaf in trees.flatten(tree).items()}


def test_l1_l2_and_l2_sp_in_float64(batch):
    model = network()
    for name, fields in {
        'l1': dict(weight=0.2, params='head/.*'),
        'l2': dict(weight=0.2, params='.*kernel'),
        'l2_sp': dict(weight=0.5, fresh_weight=0.3),
    }.items():
        objective, variables = wrapped(model, batch, **{name: fields})
        plain, _ = wrapped(model, batch)
        now = parameters(variables['params'])
        if name == 'l2_sp':
            before = parameters(variables['reference']['params'])
            assert before.keys() == {path for path in now if path.startswith('backbone/')}
            wanted = 0.25 * sum(np.sum((now[path] - before[path]) ** 2) for path in before)
            wanted += 0.15 * sum(np.sum(w**2) for path, w in now.items() if path.startswith('head/'))
        elif name == 'l1':
            wanted = 0.2 * sum(np.abs(w).sum() for path, w in now.items() if path.startswith('head/'))
        else:
            wanted = 0.1 * sum(np.sum(w**2) for path, w in now.items() if path.endswith('kernel'))
        value, aux = losses(objective, variables, batch)
        assert value - losses(plain, variables, batch)[0] == pytest.approx(wanted, rel=1e-5), name
        assert float(aux.metrics[name]) == pytest.approx(wanted, rel=1e-5)


def test_bss_is_the_smallest_singular_values(batch):
    objective, variables = wrapped(network(), batch, bss=dict(weight=0.7, k=2))
    value, aux = losses(objective, variables, batch)
    features = np.asarray(aux.endpoints['features'], np.float64)
    smallest = np.sort(np.linalg.eigvalsh(features @ features.T))[:2]
    assert value - losses(wrapped(network(), batch)[0], variables, batch)[0] == pytest.approx(
        0.7 * smallest.sum(), rel=1e-3
    )
    with pytest.raises(UserError, match=r'bss.k: 13, and features \[12, 20\]'):
        losses(wrapped(network(), batch, bss=dict(k=13))[0], variables, batch)


def test_bss_descends_by_its_singular_vectors():
    """dσ²/dF = 2 σ u vᵀ, and no NaN where singular values are equal or zero."""
    from tl_jax.objectives.penalties import smallest_squares

    features = np.random.RandomState(0).normal(size=(5, 8))
    u, s, vt = np.linalg.svd(features, full_matrices=False)
    wanted = sum(2 * s[i] * np.outer(u[:, i], vt[i]) for i in (3, 4))
    got = jax.grad(lambda f: smallest_squares(f, 2))(jnp.asarray(features, jnp.float32))
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    repeated = jnp.concatenate([jnp.eye(3), jnp.zeros((1, 3)), jnp.eye(3)])
    assert np.isfinite(jax.grad(lambda f: smallest_squares(f, 1))(repeated)).all()


def test_mixout_in_expectation_and_at_the_start():
    draw = np.random.RandomState(0)
    start, now = (jnp.asarray(draw.normal(size=(40,)), jnp.float32) for _ in range(2))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.vmap(lambda key: mix(key, start, now, 0.7))(keys), np.float64)
    values = np.stack([start, (np.asarray(now, np.float64) - 0.7 * np.asarray(start, np.float64)) / 0.3])
    assert np.minimum(*np.abs(drawn[:, None] - values).transpose(1, 0, 2)).max() < 1e-5  # one of the two, by eq. 5
    np.testing.assert_allclose(0.7 * values[0] + 0.3 * values[1], now, atol=1e-6)
    share = (np.abs(drawn - values[0]) < np.abs(drawn - values[1])).mean()
    assert share == pytest.approx(0.7, abs=0.006)
    np.testing.assert_array_equal(jax.vmap(lambda key: mix(key, start, start, 0.7))(keys[:50]), np.tile(start, (50, 1)))


def test_mixout_of_nothing_is_the_loss_and_mixes_kernels_alone(batch):
    objective, variables = wrapped(network(), batch, mixout=dict(p=0.0))
    plain, _ = wrapped(network(), batch)
    key = jax.random.split(jax.random.key(0))[1]
    assert losses(objective, variables, batch)[0] == pytest.approx(
        float(plain.loss(variables, batch, key)[0]), rel=1e-6
    )
    objective, variables = wrapped(network(), batch, mixout=dict(p=0.9))
    assert set(trees.flatten(variables['reference']['params'])) == {'backbone/conv1/kernel', 'backbone/conv2/kernel'}
    assert losses(objective, variables, batch)[0] != pytest.approx(losses(plain, variables, batch)[0], rel=1e-3)
    assert losses(objective, variables, batch, 1)[0] != pytest.approx(
        losses(objective, variables, batch, 2)[0], rel=1e-3
    )


def test_r_drop_by_hand(batch):
    model = network(vector_dropout=0.5, norm='none')
    plain, _ = wrapped(model, batch)
    for passes, share in (('mean', 0.5), ('sum', 1.0)):
        objective, variables = wrapped(model, batch, r_drop=dict(weight=0.8, passes=passes))
        keys = jax.random.split(jax.random.key(3))
        (one, aux1), (two, aux2) = (plain.loss(variables, batch, key) for key in keys)
        p, q = (np.asarray(jax.nn.softmax(a.endpoints['logits']), np.float64) for a in (aux1, aux2))
        divergence = np.mean(0.5 * np.sum(p * np.log(p / q) + q * np.log(q / p), -1))
        wanted = share * (float(one) + float(two)) + 0.8 * divergence
        assert divergence > 1e-3
        assert losses(objective, variables, batch, 3)[0] == pytest.approx(wanted, rel=1e-5)
    assert float(symmetric_divergence(aux1.endpoints['logits'], aux1.endpoints['logits'])) == 0


def test_stoch_norm_chooses_by_channel(batch):
    """p = 1 is batch norm, p = 0 the moving statistics in use while they are moved; between them each channel is one."""
    model = network()
    plain, _ = wrapped(model, batch)
    by_batch = losses(plain, *(wrapped(model, batch)[1], batch))[1]
    ones, variables = wrapped(model, batch, stoch_norm=dict(p=1.0))
    aux = losses(ones, variables, batch)[1]
    np.testing.assert_allclose(aux.endpoints['logits'], by_batch.endpoints['logits'], rtol=1e-5, atol=1e-6)
    none = losses(wrapped(model, batch, stoch_norm=dict(p=0.0))[0], variables, batch)[1]
    moving = model.apply({k: variables[k] for k in ('params', 'batch_stats')}, batch['train']['image'], train=False)
    np.testing.assert_allclose(none.endpoints['logits'], moving['logits'], rtol=1e-5, atol=1e-6)
    some = losses(wrapped(model, batch, stoch_norm=dict(p=0.5))[0], variables, batch, 4)[1]
    first = {name: np.asarray(a.endpoints['conv1']) for name, a in (('b', by_batch), ('m', none), ('s', some))}
    same = [[np.allclose(first['s'][..., c], first[k][..., c], atol=1e-6) for k in 'bm'] for c in range(4)]
    assert all(map(any, same)) and {0, 1} == {pair.index(True) for pair in same}
    for aux in (none, some):  # the first layer's inputs are the same, so its statistics move as ever
        jax.tree.map(np.testing.assert_array_equal, aux.collections['batch_stats']['backbone']['norm1'],
                     by_batch.collections['batch_stats']['backbone']['norm1'])  # fmt: skip


def test_delta_by_hand(batch):
    model = network()
    objective, variables = wrapped(model, batch, delta=dict(weight=0.4, fresh_weight=0.2, layers=['conv1', 'conv2']))
    _, aux = losses(objective, variables, batch)
    start = {k: trees.merge(variables[k], variables['reference'][k]) for k in ('params', 'batch_stats')}
    before = model.apply(start, batch['train']['image'], train=False)
    difference = {
        k: np.asarray(aux.endpoints[k], np.float64) - np.asarray(before[k], np.float64) for k in ('conv1', 'conv2')
    }
    head = parameters(variables['params']['head'])
    wanted = 0.4 * sum(0.5 * np.sum(d**2) for d in difference.values()) / 12
    wanted += 0.1 * sum(np.sum(w**2) for w in head.values())
    assert float(aux.metrics['delta']) == pytest.approx(wanted, rel=1e-5)
    attention = np.array([0.1, 0.2, 0.3, 0.4])
    by_channel = np.sum(difference['conv1'] ** 2, (0, 1, 2))
    got = float(map_distance(jnp.asarray(difference['conv1'], jnp.float32), jnp.asarray(attention, jnp.float32)))
    positions = np.prod(difference['conv1'].shape[1:3])
    assert got == pytest.approx(4 / positions * 0.5 * (attention @ by_channel) / 12, rel=1e-5)


def test_delta_weighs_channels_by_what_their_loss_costs(batch):
    model = network()
    sections = {'delta': dict(attention=True, layers=['conv1', 'conv2'])}
    objective, variables = wrapped(model, batch, **sections)
    kernel = variables['params']['backbone']['conv1']['kernel']
    start = {k: trees.merge(variables[k], variables['reference'][k]) for k in ('params', 'batch_stats')}
    from tl_jax.objectives.base import cross_entropy

    def loss(params):
        logits = model.apply({**start, 'params': params}, batch['train']['image'], train=False)['logits']
        return float(jnp.sum(cross_entropy(logits, batch['train']['label'])))

    def without(channel):  # the authors' way: the filter is zero
        kernel = start['params']['backbone']['conv1']['kernel'].at[..., channel].set(0)
        return trees.merge(start['params'], {'backbone': {'conv1': {'kernel': kernel}}})

    wanted = np.array([loss(without(c)) - loss(start['params']) for c in range(4)])
    np.testing.assert_allclose(importance(model, start, batch['train'], 'conv1', 4), wanted, atol=1e-3)
    moved = objective.refresh(variables, lambda stream: [batch[stream]])
    assert moved['channel_attention'].keys() == {'conv1', 'conv2'}
    z = (wanted - wanted.mean()) / wanted.std()
    np.testing.assert_allclose(moved['channel_attention']['conv1'], np.exp(z / 5) / np.exp(z / 5).sum(), rtol=1e-3)
    np.testing.assert_allclose(attention_weights(jnp.zeros(4)), 0.25)
    assert kernel.shape[-1] == 4


EVERY = {
    'stoch_norm': dict(p=0.5),
    'mixout': dict(p=0.5, params='backbone/.*'),
    'r_drop': dict(weight=0.3),
    'l1': dict(weight=1e-3),
    'l2': dict(weight=1e-3),
    'l2_sp': dict(),
    'delta': dict(layers=['dense1']),
    'bss': dict(weight=1e-2),
}


@pytest.mark.parametrize('gradient', ['accumulated', 'private'])
def test_a_gradient_takes_every_wrapper(batch, gradient):
    """What wrappers read of the forward pass is gone when the gradient sees the loss."""
    fields = {k: v for k, v in EVERY.items() if not (gradient == 'private' and k == 'stoch_norm')}
    # One example at a time has no batch to normalise by; small layers, as vmap and scan are dear to compile.
    model = network(
        name='mlp', widths=(), dense=(5,), norm='none', dense_norm='none' if gradient == 'private' else 'batch'
    )
    objective, variables = wrapped(model, batch, **fields)
    facts = dict(sample_rate=0.1, num_examples=120, batch_size=12, steps=5)
    options = {'accumulated': dict(parts=2), 'private': dict(clip=1.0, delta=1e-5, noise_multiplier=1.0, **facts)}
    transform = GRADIENTS[gradient](**options[gradient]).transform
    params = variables.pop('params')

    def loss(params, collections, batch, key):
        return objectives.without_endpoints(objective).loss({'params': params, **collections}, batch, key)

    grads, value, aux = jax.jit(transform(loss))(params, variables, batch, jax.random.key(0))
    assert np.isfinite(value) and not aux.endpoints
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads)) and set(EVERY) - {'stoch_norm', 'mixout'} <= set(
        aux.metrics
    )


def test_a_penalty_is_a_task_of_its_own_to_what_combines_tasks():
    def loss(variables, batch, key):
        parts = {
            'a': jnp.sum(variables['params']['backbone']['w']),
            'b': 2.0 * jnp.sum(variables['params']['head']['w']),
        }
        return parts['a'] + parts['b'], objectives.Aux({}, {}, parts)

    objective = objectives.WRAPPERS['l2'](objectives.Objective(None, loss, None), weight=3.0, params='backbone/.*')
    params = {'backbone': {'w': jnp.array([1.0, -2.0])}, 'head': {'w': jnp.ones(1)}}
    of = lambda params, collections, batch, key: objective.loss({'params': params}, batch, key)
    grads, value, aux = GRADIENTS['pcgrad']().transform(of)(params, {}, {}, jax.random.key(0))
    assert list(aux.losses) == ['a', 'b', 'l2'] and float(value) == pytest.approx(-1 + 2 + 7.5)
    a, penalty = np.array([1.0, 1.0]), 3 * np.array([1.0, -2.0])  # they conflict: a · penalty = -3
    wanted = (a + 3 / (penalty @ penalty) * penalty) + (penalty + 3 / (a @ a) * a)
    np.testing.assert_allclose(grads['backbone']['w'], wanted, rtol=1e-6)


def test_wrappers_in_a_run(digits_config, tmp_path):
    """The reference is what was there when training began, also in a second stage; a frozen leaf adds nothing."""
    stages = [
        {'name': 'probe', 'steps': 2, 'train': [('head/.*', {'name': 'adam', 'lr': 1e-2})]},
        {'name': 'full', 'steps': 2, 'train': [('.*', {'name': 'adam', 'lr': 1e-2})]},
    ]
    objective = {'name': 'supervised', 'l2_sp': {'fresh_weight': 0.0, 'weight': 1.0}, 'mixed': {'mixup': 0.2}}
    model = {'name': 'mlp', 'dense': [8]}
    config = digits_config(model=model, objective=objective, stages=stages, log_every=1)
    built = experiment_lib.build(config_lib.resolve(config))
    assert built.shapes()['reference']['params'].keys() == {'backbone'}
    state = train.train_and_evaluate(config, tmp_path / 'run')
    variables = built.stages[0].init(jax.random.key(0), built.batch)
    jax.tree.map(np.testing.assert_array_equal, state.collections['reference']['params']['backbone'],
                 variables['params']['backbone'])  # fmt: skip
    import json

    records = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    penalties = [r['train/l2_sp'] for r in records if 'train/l2_sp' in r]
    assert penalties[:3] == [0, 0, 0] and penalties[3] > 0


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        (dict(mixout=dict(p=1.5)), r'objective.mixout.p: is a probability'),
        (dict(stoch_norm=dict(p=-0.1)), r'objective.stoch_norm.p: is a probability'),
        (dict(l2_sp=dict(shared='back')), r'l2_sp.shared\[0\]: the rule'),
        (dict(l2_sp=0.1), r'objective.l2_sp: must be a section'),
        (dict(bss=dict(weigth=0.1)), r"objective.bss.weigth: unknown field; did you mean 'weight'"),
        (dict(delta=dict(layers=['conv9'])), r"delta.layers: the network gives no 'conv9'; did you mean 'conv"),
    ],
)
def test_bad_sections_in_one_line(digits_config, section, message):
    with pytest.raises(UserError, match=message):
        experiment_lib.build(config_lib.resolve(digits_config(objective={'name': 'supervised', **section}))).shapes()


def test_what_an_objective_or_network_lacks_in_one_line(batch):
    with pytest.raises(UserError, match='has no batch norm'):
        objective, variables = wrapped(network(norm='none'), batch, stoch_norm=dict())
        losses(objective, variables, batch)
    blind = objectives.Objective(None, lambda v, b, k: (jnp.zeros(()), objectives.Aux({}, {})), None)
    with pytest.raises(UserError, match='bss: needs features of the forward pass'):
        objectives.WRAPPERS['bss'](blind).loss({'params': {}}, batch, jax.random.key(0))


def test_no_wrapper_has_the_name_of_a_field():
    import inspect

    for constructor in objectives.OBJECTIVES.values():
        assert not set(inspect.signature(constructor).parameters) & set(objectives.WRAPPERS)
