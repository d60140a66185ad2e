"""Partitions, optimizers and schedules, against closed forms and optax used directly."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.optimizers import OPTIMIZERS, create_partition, create_schedule

PARAMS = {
    'backbone': {'kernel': jnp.arange(6.0).reshape(2, 3) / 7, 'bias': jnp.ones(3)},
    'head': {'kernel': jnp.full((3, 2), 0.5), 'bias': jnp.zeros(2)},
}
GRADS = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), PARAMS)


def step(partition, params, grads, count=1):
    trainable, _ = trees.split(params, partition.trainable.__contains__)
    grads, _ = trees.split(grads, partition.trainable.__contains__)
    state = partition.optimizer.init(trainable)
    for _ in range(count):
        trainable, state = partition.update(0, grads, state, trainable)
    return trainable, state


# AdaLoRA's acts on adapters alone: tests/peft/test_adalora.py.
@pytest.mark.parametrize('name', sorted(OPTIMIZERS.keys() - {'adalora'}))
def test_each_rule_acts_on_its_leaves_as_optax_does_alone(name):
    partition = create_partition(
        [('head/.*', {'name': name, 'lr': 0.1, 'weight_decay': 0.01}), ('.*/bias', {'name': 'sgd', 'lr': 1.0})],
        PARAMS,
        steps=10,
    )
    assert partition.trainable == {'head/kernel', 'head/bias', 'backbone/bias'}
    moved, _ = step(partition, PARAMS, GRADS, count=3)
    constructor, own_decay = OPTIMIZERS[name]
    reference = constructor(learning_rate=0.1, **({own_decay: 0.01} if own_decay else {}))
    if not own_decay:
        reference = optax.chain(optax.add_decayed_weights(0.01), reference)
    expected, state = PARAMS['head'], reference.init(PARAMS['head'])
    for _ in range(3):
        updates, state = reference.update(GRADS['head'], state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved['head'], expected)
    np.testing.assert_allclose(
        moved['backbone']['bias'], PARAMS['backbone']['bias'] - 3 * GRADS['backbone']['bias'], rtol=1e-6
    )


def test_optimizer_state_holds_nothing_for_frozen_leaves():
    partition = create_partition([('head/.*', {'name': 'adamw', 'lr': 0.1})], PARAMS, steps=10)
    _, state = step(partition, PARAMS, GRADS)
    head = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(PARAMS['head']))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert held == 2 * head


def test_a_phase_moves_its_leaves_and_their_moments_only():
    partition = create_partition(
        [('.*', {'name': 'adam', 'lr': 0.1})], PARAMS, steps=10, phases=[('all', '.*'), ('heads', 'head/.*')]
    )
    state = partition.optimizer.init(PARAMS)
    heads, _ = trees.split(GRADS, lambda path: path.startswith('head/'))
    params, moved = partition.update(1, heads, state, PARAMS)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params['backbone'], PARAMS['backbone']))
    assert not (params['head']['kernel'] == PARAMS['head']['kernel']).all()
    for group, inner in moved.inner_states.items():
        same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), inner, state.inner_states[group]))
        assert same == (group not in partition.groups[1])
    with pytest.raises(UserError, match="leaves the phase 'teachers' .* nothing to train"):
        create_partition([('.*', {'name': 'adam', 'lr': 0.1})], PARAMS, steps=1, phases=[('teachers', 'teacher/.*')])


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ({'name': 'adamm', 'lr': 1.0}, "unknown optimizer 'adamm'; did you mean 'adam'"),
        ({'name': 'adam'}, r'train\[0\]\[1\].lr: is required'),
        ({'name': 'adam', 'lr': 1.0, 'b11': 0.9}, r"train\[0\]\[1\].b11: unknown field; did you mean 'b1'"),
        ({'name': 'sgd', 'lr': 1.0, 'momentum': 'much'}, 'momentum: must be'),
        ({'name': 'sgd', 'lr': {'name': 'cosin', 'peak': 1.0}}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        (
            {'name': 'sgd', 'lr': {'name': 'cosine', 'peak': 1.0, 'warmup': 10}},
            'warmup: must be a number of steps below',
        ),
        ('sgd', 'must be an optimizer such as'),
    ],
)
def test_bad_optimizers(spec, message):
    with pytest.raises(UserError, match=message):
        create_partition([('.*', spec)], PARAMS, steps=10)


def test_nothing_to_train_is_an_error():
    with pytest.raises(UserError, match='trains no leaf'):
        create_partition([('.*', None)], PARAMS, steps=10)


def test_schedules_match_their_formulas():
    cosine = create_schedule({'name': 'cosine', 'peak': 2.0, 'end': 0.5, 'warmup': 10}, steps=110)
    assert float(cosine(5)) == pytest.approx(1.0) and float(cosine(10)) == pytest.approx(2.0)
    assert float(cosine(35)) == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * 0.25)) / 2)
    assert float(cosine(110)) == pytest.approx(0.5)
    linear = create_schedule({'name': 'linear', 'peak': 1.0}, steps=10)
    assert [float(linear(t)) for t in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    stepped = create_schedule({'name': 'step', 'peak': 1.0, 'at': [0.3, 0.6, 90]}, steps=100)
    assert [float(stepped(t)) for t in (29, 31, 61, 91)] == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert float(create_schedule(0.3, steps=10)(7)) == pytest.approx(0.3)


def test_annealed_is_the_rate_of_dann():
    schedule = create_schedule({'name': 'annealed', 'peak': 0.01}, steps=200)
    for step in (0, 17, 100, 199):
        assert float(schedule(step)) == pytest.approx(0.01 / (1 + 10 * step / 200) ** 0.75, rel=1e-6)


def test_slanted_triangular_is_ulmfits_equation_3():
    peak, total, cut_fraction, ratio = 0.01, 1000, 0.1, 32
    schedule = create_schedule({'name': 'slanted_triangular', 'peak': peak}, steps=total)
    cut = math.floor(total * cut_fraction)
    for t in (0, 1, 50, 99, 100, 101, 500, 999):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_fraction - 1))
        assert float(schedule(t)) == pytest.approx(peak * (1 + p * (ratio - 1)) / ratio, rel=1e-5)


def test_a_schedule_goes_by_steps_however_many_phases_move_a_group():
    """As MCD: the body moves in two phases of a step, the head in one."""
    params = {'body': {'w': jnp.ones(3)}, 'head': {'w': jnp.ones(3)}}
    rules = [('.*', {'name': 'sgd', 'lr': {'name': 'linear', 'peak': 1.0}})]
    phases = [('both', '.*'), ('body', 'body/.*')]
    partition = create_partition(rules, params, steps=10, phases=phases)
    state = partition.optimizer.init(params)
    taken = {'body': [], 'head': []}
    for _ in range(3):
        before = params
        for number, (_, rule) in enumerate(phases):
            grads = {role: {'w': jnp.ones(3)} for role in params if rule == '.*' or rule.startswith(role)}
            params, state = partition.update(number, grads, state, params)
        for role in params:
            taken[role].append(float(before[role]['w'][0] - params[role]['w'][0]))
    assert taken['head'] == pytest.approx([1.0, 0.9, 0.8], abs=1e-6)
    assert taken['body'] == pytest.approx([2.0, 1.8, 1.6], abs=1e-6)


def test_what_no_phase_moves_is_frozen_and_a_rule_for_it_alone_is_refused():
    params = {'body': {'w': jnp.ones(3)}, 'head': {'w': jnp.ones(3)}}
    sgd = {'name': 'sgd', 'lr': 0.1}
    partition = create_partition([('.*', sgd)], params, steps=1, phases=[('adapt', 'body/.*')])
    assert partition.trainable == {'body/w'}
    with pytest.raises(UserError, match=r"train\[1\]: the rule 'head/.\*' trains only what no phase .* moves"):
        create_partition([('body/.*', sgd), ('head/.*', sgd)], params, steps=1, phases=[('adapt', 'body/.*')])
