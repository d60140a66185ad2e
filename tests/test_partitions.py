"""Named partitions: for a network of every architecture, against formulas, and what they save."""

import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.experiment import build
from tl_jax.models import create_model, list_models
from tl_jax.optimizers import create_partition, create_schedule, scaled
from tl_jax.partitions import PARTITIONS, expanded, first_unconverged, history_of, layers_of

sys.path.append(str(Path(__file__).parent / 'models'))
from test_layer_order import fewer, inputs_for

ADAMW = {'name': 'adamw', 'lr': 1e-3, 'weight_decay': 0.05}
DEEP = {
    'stem': {'kernel': (3, 4), 'norm': {'scale': (4,), 'bias': (4,)}},
    **{
        f'block{i}': {'dense': {'kernel': (4, 4), 'bias': (4,)}, 'norm1': {'scale': (4,), 'bias': (4,)}}
        for i in (1, 2, 3)
    },
    'norm': {'scale': (4,), 'bias': (4,)},
}
ORDER = ('stem/.*', 'block1/.*', 'block2/.*', 'block3/.*', 'norm/.*')
LEAVES = trees.flatten(
    jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        {'backbone': DEEP, 'head': {'kernel': (4, 2), 'bias': (2,)}},
        is_leaf=lambda x: isinstance(x, tuple),
    )
)


def rules(name, leaves=LEAVES, order=ORDER, **fields):
    return expanded({'name': name, 'optimizer': ADAMW, **fields}, order, leaves)


def rates(pairs, leaves=LEAVES):
    """{path: learning rate}, every rule used."""
    found = trees.match(pairs, leaves, field='train', default=None)
    return {path: spec['lr'] for path, spec in found.items() if spec is not None}


def families():
    """One model of each architecture."""
    names = {}
    for name in list_models():
        names.setdefault(type(create_model(name).backbone), name)
    return list(names.values())


@functools.cache
def small(name):
    """Layer order and parameters of a network with few layers, by shape."""
    backbone = create_model(name).backbone
    heads = {} if type(backbone).__name__ == 'Clip' else {'num_classes': 3}
    module = create_model(name, **heads, **fewer(backbone))
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs_for(name, module.backbone))
    return module.backbone.layer_order, trees.flatten(variables['params'])


@pytest.mark.parametrize('name', families())
def test_partitions_of_every_architecture(name):
    order, leaves = small(name)
    layers = layers_of(order)
    assert set(rates(rules('all', leaves, order), leaves)) == set(leaves)
    decayed = rates(rules('layerwise_decay', leaves, order, decay=0.5, decay_vectors=False), leaves)
    assert set(decayed) == set(leaves)
    for i, layer in enumerate(layers):
        (rate,) = {decayed[path] for path in leaves if re.fullmatch(f'backbone/(?:{layer})', path)}
        assert rate == pytest.approx(1e-3 * 0.5 ** (len(layers) - i))
    assert all(decayed[path] == 1e-3 for path in leaves if path.startswith('head/'))
    for k in (1, len(layers)):
        trained = rates(rules('last_k', leaves, order, k=k), leaves)
        assert sum(any(re.fullmatch(f'backbone/(?:{layer})', p) for p in trained) for layer in layers) == k
    biases = {p for p in leaves if p.startswith('head/') or p.endswith('/bias')}
    norms = {
        p for p in leaves if p.startswith('head/') or ('norm' in p.split('/')[-2] and p.endswith(('scale', 'bias')))
    }
    for partition, expected in (('bias_only', biases), ('norm_only', norms)):
        if any(path.startswith('backbone/') for path in expected):
            assert set(rates(rules(partition, leaves, order), leaves)) == expected
        else:
            with pytest.raises(UserError, match='the network has no'):
                rules(partition, leaves, order)


def test_layer_decay_is_timms_with_the_final_norm_in_the_last_block():
    found = rates(rules('layerwise_decay', decay=0.75))
    for depth, module in enumerate(('stem', 'block1', 'block2', 'block3')):
        (rate,) = {found[path] for path in found if f'/{module}/' in path}
        assert rate == pytest.approx(1e-3 * 0.75 ** (4 - depth))
    assert found['backbone/norm/scale'] == pytest.approx(0.75e-3) and found['head/kernel'] == 1e-3
    floored = rates(rules('layerwise_decay', decay=0.1, floor=0.05))
    assert floored['backbone/stem/kernel'] == pytest.approx(5e-5)


def test_discriminative_divides_by_2_6():
    found = rates(rules('discriminative', k=2))
    assert found['backbone/block3/dense/kernel'] == pytest.approx(1e-3 / 2.6)
    assert found['backbone/block2/dense/kernel'] == pytest.approx(1e-3 / 2.6**2)
    assert 'backbone/block1/dense/kernel' not in found


def test_no_weight_decay_on_leaves_of_one_axis():
    for name, fields in (('layerwise_decay', {}), ('all', {}), ('bias_only', {})):
        pairs = rules(name, decay_vectors=False, **fields)
        found = trees.match(pairs, LEAVES, field='train', default=None)
        for path, spec in found.items():
            if spec is not None:
                assert spec['weight_decay'] == (0.05 if len(LEAVES[path].shape) > 1 else 0.0), path
    # A leaf of two axes that bears the name of vectors elsewhere.
    odd = {**LEAVES, 'backbone/block1/scale': jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    found = trees.match(rules('all', odd, decay_vectors=False), odd, field='train')
    assert found['backbone/block1/scale']['weight_decay'] == 0.05 and found['backbone/norm/scale']['weight_decay'] == 0


def test_surgical_by_number_and_by_name():
    chosen = lambda **fields: {p.split('/')[1] for p in rates(rules('surgical', head=False, **fields))}
    assert chosen(layers=[1]) == chosen(layers=['block1']) == {'block1'}
    assert chosen(layers=[0, -1]) == {'stem', 'block3', 'norm'}
    assert chosen(layers=['stem', 'block2/dense']) == {'stem', 'block2'}
    order, leaves = small('resnet101')
    assert len(rules('surgical', leaves, order, layers=['stage2'], head=False)) == 2


def test_a_head_of_its_own_or_none():
    own = rates(rules('last_k', k=1, head={'name': 'sgd', 'lr': 0.5}))
    assert own['head/kernel'] == 0.5 and own['backbone/block3/dense/bias'] == pytest.approx(1e-3)
    assert not any(p.startswith('head/') for p in rates(rules('last_k', k=1, head=False)))
    assert set(rates(rules('head'))) == {'head/kernel', 'head/bias'}


def test_other_roles_and_pairs_stand_beside():
    leaves = {
        **LEAVES,
        **{p.replace('backbone/', 'target/'): x for p, x in LEAVES.items() if p.startswith('backbone/')},
    }
    train = [('backbone/stem/.*', None), {'name': 'all', 'optimizer': ADAMW, 'role': 'target', 'head': False}]
    assert expanded(train, ORDER, leaves) == [('backbone/stem/.*', None), ('target/.*', ADAMW)]


def test_adapters_and_lora_plus():
    shape = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    leaves = {**LEAVES, **{f'adapters/default/backbone/block1/dense/lora_{x}': shape for x in 'ab'}}
    found = rates(rules('adapters', leaves, lora_plus=16.0), leaves)
    assert found['adapters/default/backbone/block1/dense/lora_b'] == pytest.approx(16e-3)
    assert found['adapters/default/backbone/block1/dense/lora_a'] == found['head/bias'] == 1e-3
    assert not any(path.startswith('backbone') for path in found)


@pytest.mark.parametrize('name', ['cosine', 'linear', 'step', 'slanted_triangular', 'annealed', 'constant'])
def test_a_scaled_schedule_is_the_schedule_times_the_factor(name):
    lr = {'name': name, 'peak': 0.3, **({'warmup': 3} if name == 'cosine' else {})}
    lr |= {'end': 0.02} if name in ('cosine', 'linear') else {'at': [0.5]} if name == 'step' else {}
    whole, part = (create_schedule(spec['lr'], steps=20) for spec in ({'lr': lr}, scaled({'lr': lr}, 0.37)))
    for step in range(20):
        assert float(part(step)) == pytest.approx(0.37 * float(whole(step)), rel=1e-6)


def test_spans_of_a_schedule_are_its_parts():
    lr = {'name': 'cosine', 'peak': 0.3, 'warmup': 3}
    whole = create_schedule(lr, steps=20)
    for begin in (0, 5, 10, 15):
        part = create_schedule({**lr, 'span': [begin / 20, (begin + 5) / 20]}, steps=5)
        assert [float(part(t)) for t in range(5)] == pytest.approx([float(whole(begin + t)) for t in range(5)])


@pytest.mark.parametrize(
    ('train', 'message'),
    [
        ({'name': 'lastk', 'optimizer': ADAMW}, "there is no partition 'lastk'; did you mean 'last_k'"),
        ({'name': 'last_k', 'optimizer': ADAMW}, 'train.k: is required'),
        ({'name': 'last_k', 'optimizer': ADAMW, 'k': 9}, 'train.k: 9, and the backbone has 4 layers'),
        ({'name': 'all'}, 'train.optimizer: is required'),
        ({'name': 'all', 'optimizer': ADAMW, 'decay': 0.5}, 'train.decay: unknown field'),
        ({'name': 'surgical', 'optimizer': ADAMW, 'layers': ['blok1']}, "there is no 'blok1' in 'backbone'; did you"),
        ({'name': 'surgical', 'optimizer': ADAMW, 'layers': [4]}, '4, and the backbone has 4 layers'),
        ({'name': 'adapters', 'optimizer': ADAMW}, 'there are no adapters; add model.peft'),
        ({'name': 'all', 'optimizer': ADAMW, 'role': 'backbon'}, "there is no 'backbon'; did you mean 'backbone'"),
        ({'name': 'surgical', 'optimizer': ADAMW, 'layers': [], 'head': False}, 'finds nothing to train'),
        ({'name': 'unconverged', 'optimizer': ADAMW, 'percentile': 150.0}, 'percentile: must lie in 0 … 100, not 150'),
        (
            [('.*', ADAMW), {'name': 'layerwise_decay', 'optimizer': ADAMW, 'decay': 0.0}],
            r'train\[1\].decay: must be above',
        ),
    ],
)
def test_bad_partitions_are_named(train, message):
    with pytest.raises(UserError, match=message):
        expanded(train, ORDER, LEAVES)


def test_a_config_may_name_a_partition(digits_config):
    stages = [{'steps': 2, 'train': {'name': name, 'optimizer': ADAMW, **fields}} for name, fields in SMALL.items()]
    experiment = build(config_lib.resolve(digits_config(stages=stages)))
    params = experiment.shapes(0)['params']
    for number in range(len(stages)):
        pairs = experiment.rules(number)
        assert all(isinstance(regex, str) for regex, _ in pairs)
        assert experiment.partition(number, params).trainable
    with pytest.raises(UserError, match=r'stages\[0\].train\[0\]: must be a pair'):
        build(config_lib.resolve(digits_config(stages=[{'steps': 2, 'train': ['.*']}])))
    stages.append({'steps': 2, 'train': {'name': 'unconverged', 'optimizer': ADAMW, 'percentile': -1.0}})
    with pytest.raises(UserError, match=rf'stages\[{len(stages) - 1}\].train.percentile: must lie in 0 … 100, not -1'):
        build(config_lib.resolve(digits_config(stages=stages)))


SMALL = {
    **{name: {} for name in PARTITIONS if name not in ('adapters', 'norm_only')},
    'last_k': {'k': 1},
    'surgical': {'layers': ['conv1']},
}


def test_what_reaches_the_percentile_is_autofreezes():
    """As freeze_intermediate_e2e_lr.py of the authors computes it, on random sizes."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        count, percentile = rng.integers(2, 9), rng.choice([25, 50, 75])
        first = rng.integers(0, count)
        before, now = rng.uniform(0.1, 2, (2, count))
        now[:first] = 0
        change = [abs(b - n) / b if n > 0 else 0 for b, n in zip(before, now, strict=True)]
        limit = np.percentile(change[first:], percentile)
        theirs = next(i for i, x in enumerate(change) if x >= limit)
        assert first_unconverged(before, now, first, percentile) == theirs


def test_of_a_stage_its_last_record_counts():
    records = [
        {'stage': 0, 'gradient/a': 1.0},
        {'stage': 0, 'gradient/a': 2.0},
        {'stage': 0},
        {'stage': 1, 'gradient/a': 3.0},
    ]
    assert history_of(records) == [{'a': 2.0}, {'a': 3.0}]


def test_measured_optimizers_sum_gradients_over_the_stage():
    params = {'backbone': {'a': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}, 'head': {'kernel': jnp.ones(2)}}
    pairs = [('head/.*', None), ('.*/kernel', {**ADAMW, 'measured': True}), ('.*', ADAMW)]
    partition = create_partition(pairs, params, steps=3)
    trainable, _ = trees.split(params, partition.trainable.__contains__)
    state, moved = partition.optimizer.init(trainable), trainable
    draws = [jax.tree.map(lambda p, s=s: jnp.cos(s + jnp.arange(p.size)).reshape(p.shape), trainable) for s in range(3)]
    for grads in draws:
        moved, state = partition.update(0, grads, state, moved)
    expected = np.abs(sum(np.asarray(g['backbone']['a']['kernel'], float) for g in draws)).sum()
    assert partition.figures(state) == {'gradient/.*/kernel': pytest.approx(expected, rel=1e-6)}
    plain = create_partition([('.*/kernel', ADAMW), ('.*', ADAMW)], {'backbone': params['backbone']}, steps=3)
    state, alike = plain.optimizer.init(trainable), trainable
    for grads in draws:
        alike, state = plain.update(0, grads, state, alike)
    jax.tree.map(np.testing.assert_array_equal, alike, moved)


def products(jaxpr):
    """How many matrix products a jaxpr holds."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == 'dot_general'
        for value in equation.params.values():
            count += products(value.jaxpr) if hasattr(value, 'jaxpr') else 0
    return count


def test_bias_only_forms_no_gradient_of_a_weight():
    """Two dense layers after the first need 2 products forward, 2 for the inputs' gradients, 3 + for the weights'."""
    module = create_model('mlp', num_classes=3, dense=[5, 6, 7])
    x = jnp.zeros((4, 8))
    params = jax.eval_shape(module.init, jax.random.key(0), x)['params']
    order, leaves = module.backbone.layer_order, trees.flatten(params)

    def cost(name, **fields):
        partition = create_partition(rules(name, leaves, order, **fields), params, steps=1)
        trained, frozen = trees.split(params, partition.trainable.__contains__)
        loss = lambda p, f: jnp.sum(module.apply({'params': trees.merge(f, p)}, x)['logits'] ** 2)
        return products(jax.make_jaxpr(jax.grad(loss))(trained, frozen).jaxpr)

    forward, inputs, weights = 4, 3, 4
    assert cost('all') == forward + inputs + weights
    assert cost('bias_only', head=False) == forward + inputs
    assert cost('bias_only') == forward + inputs + 1
    assert cost('head') == forward + 1
