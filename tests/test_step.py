"""Frozen costs nothing: measured on the compiled step of a ResNet-50."""

import jax
import jax.numpy as jnp
import pytest

from tl_jax import models
from tl_jax.gradients import plain
from tl_jax.objectives import Model, supervised
from tl_jax.optimizers import create_partition
from tl_jax.state import create_state, enter_stage, frozen_statistics
from tl_jax.step import create_train_step
from tl_jax.trees import flatten

ADAMW = {'name': 'adamw', 'lr': 1e-3, 'weight_decay': 0.1}


def compiled(rules):
    """The lowered step of a ResNet-50 at 32 px; FLOPs scale with the image, their ratio does not."""
    module = models.create_model('resnet50', num_classes=10)
    model = Model(lambda key, x: module.init(key, x, train=False), module.apply)
    objective = supervised(model, num_classes=10)
    batch = {'train': {'image': jnp.zeros((2, 32, 32, 3)), 'label': jnp.zeros(2, jnp.int32)}}
    state = create_state(jax.eval_shape(objective.init, jax.random.key(0), batch), 0)
    partition = create_partition(rules, state.params, steps=10)
    state = jax.eval_shape(lambda s: enter_stage(s, partition, ema=0.0), state)
    step = create_train_step(objective, plain(), partition, 0.0, 0.0)
    return jax.jit(step).lower(state, batch), state


@pytest.fixture(scope='module')
def flops():
    def of(rules):
        lowered, state = compiled(rules)
        cost = lowered.compile().cost_analysis()
        return cost['flops'], state

    return of


def test_head_only_step_costs_a_third_and_holds_the_heads_state_only(flops):
    full, full_state = flops([('.*', ADAMW)])
    head, head_state = flops([('head/.*', ADAMW)])
    print(f'ResNet-50 step: head only {head:.3e} of {full:.3e} FLOPs, ratio {head / full:.3f}')
    assert head <= 0.36 * full

    def held(state):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)

    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    assert held(head_state) == 2 * size(head_state.params['head'])
    assert held(full_state) == 2 * size(full_state.params)


def test_statistics_follow_the_parameters_around_them():
    params = {'backbone': {'norm1': {'scale': 0}, 'block': {'conv': {'kernel': 0}}}, 'head': {'kernel': 0}}
    statistics = {'backbone': {'norm1': {'mean': 0, 'var': 0}, 'block': {'norm': {'mean': 0, 'var': 0}}}}

    def frozen(*trainable):
        return sorted(flatten(frozen_statistics(statistics, params, frozenset(trainable))))

    assert frozen('head/kernel') == ['backbone/block/norm/frozen', 'backbone/norm1/frozen']
    assert frozen('backbone/norm1/scale') == ['backbone/block/norm/frozen']
    # A norm without parameters of its own follows the smallest module around it that has some.
    assert frozen('backbone/block/conv/kernel') == ['backbone/norm1/frozen']
    assert frozen('backbone/norm1/scale', 'backbone/block/conv/kernel') == []
