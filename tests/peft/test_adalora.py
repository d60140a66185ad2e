"""AdaLoRA's budget and penalty against arXiv:2303.10512, written out again in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.objectives.base import Aux, Objective
from tl_jax.objectives.orthogonal import orthogonal
from tl_jax.optimizers import create_partition

SHAPES = {'one': (5, 4, 6), 'two': (3, 4, 7)}  # rows, rank, columns of each layer


def adapters(seed):
    draw = np.random.default_rng(seed)
    layers = {
        name: {'lora_a': draw.normal(size=(n, r)), 'lora_e': draw.normal(size=r), 'lora_b': draw.normal(size=(r, m))}
        for name, (n, r, m) in SHAPES.items()
    }
    return {'adapters': layers, 'head': {'bias': draw.normal(size=3)}}


def test_least_important_ranks_go():
    """Ten updates on random gradients; Adam's own step is taken from a run that cuts nothing."""
    steps, every, first, last = 10, 2, 2, 8
    spec = dict(name='adalora', lr=0.1, rank=1, begin=0.2, end=0.8, every=every)
    params = jax.tree.map(jnp.asarray, adapters(0))
    partition = create_partition([('.*', spec)], params, steps=steps)
    adam = create_partition([('.*', dict(name='adamw', lr=0.1))], params, steps=steps)
    state, adam_state = partition.optimizer.init(params), adam.optimizer.init(params)
    mean = {(n, k): 0.0 for n in SHAPES for k in ('a', 'e', 'b')}
    spread, alive = dict(mean), []
    for t in range(1, steps + 1):
        grads = jax.tree.map(jnp.asarray, adapters(t))
        uncut, adam_state = adam.update(0, grads, adam_state, params)
        before, (params, state) = params, partition.update(0, grads, state, params)
        for n, k in mean:
            w, g = (np.asarray(tree['adapters'][n][f'lora_{k}'], np.float64) for tree in (before, grads))
            mean[n, k] = 0.85 * mean[n, k] + 0.15 * abs(w * g)
            spread[n, k] = 0.85 * spread[n, k] + 0.15 * abs(abs(w * g) - mean[n, k])
        score = {key: mean[key] * spread[key] for key in mean}
        ranks = {n: score[n, 'e'] + score[n, 'a'].mean(0) + score[n, 'b'].mean(1) for n in SHAPES}
        kept = int(2 + (8 - 2) * (1 - min(max((t - first) / (last - first), 0), 1)) ** 3)
        cut = t > first and (t > last or t % every == 0)
        best = np.sort(np.concatenate(list(ranks.values())))[::-1][kept - 1]
        for n in SHAPES:
            expected = np.asarray(uncut['adapters'][n]['lora_e'])
            expected = np.where((ranks[n] >= best) | (not cut), expected, 0)
            np.testing.assert_allclose(params['adapters'][n]['lora_e'], expected, rtol=1e-5)
            np.testing.assert_allclose(params['adapters'][n]['lora_a'], uncut['adapters'][n]['lora_a'], rtol=1e-6)
        alive.append(sum(int(np.count_nonzero(params['adapters'][n]['lora_e'])) for n in SHAPES))
    assert alive[0] == 8 and alive[-1] == 2


def test_penalty_and_its_gradient():
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), adapters(1))
    plain = Objective(None, lambda variables, batch, key: (jnp.zeros(()), Aux({}, {})), None)
    value, aux = orthogonal(plain, weight=0.3).loss({'params': params}, {}, jax.random.key(0))
    expected = 0.0
    for layer in adapters(1)['adapters'].values():
        p, q = layer['lora_a'], layer['lora_b']
        expected += np.square(p.T @ p - np.eye(4)).sum() + np.square(q @ q.T - np.eye(4)).sum()
    np.testing.assert_allclose(value, 0.3 * expected, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics['orthogonal'], 0.3 * expected, rtol=1e-5)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(rank=-3), 'rank: -3 a layer leaves -6 of the 8 ranks of 2 layers; must leave fewer, and at least one'),
        (dict(rank=4), 'rank: 4 a layer leaves 8 of the 8 ranks'),
        (dict(every=0), 'every: must be at least 1, not 0'),
        (dict(smooth=5.0), 'smooth: must be at least 0 and less than 1, not 5.0'),
        (dict(smooth_uncertainty=1.0), 'smooth_uncertainty: must be at least 0 and less than 1'),
        (dict(begin=0.7), 'begin: must be a fraction below end, also one, not 0.7 and 0.6'),
        (dict(begin=0.57), 'end: 0.6 of 9 updates is the same one as begin, 0.57; lengthen the stage'),
    ],
)
def test_fields_out_of_range_are_named(fields, message):
    spec, params = dict(name='adalora', lr=0.1, rank=1) | fields, jax.tree.map(jnp.asarray, adapters(0))
    with pytest.raises(UserError, match=rf'^train\[0\]\[1\].{message}'):
        create_partition([('.*', spec)], params, steps=9).optimizer.init(params)


def test_refused():
    with pytest.raises(UserError, match='its rule matches none'):
        params = {'head': {'bias': jnp.zeros(3)}}
        spec = dict(name='adalora', lr=0.1, rank=1)
        create_partition([('.*', spec)], params, steps=9).optimizer.init(params)
    with pytest.raises(UserError, match="is for model.peft=dict.name='adalora'"):
        plain = Objective(None, lambda variables, batch, key: (jnp.zeros(()), Aux({}, {})), None)
        orthogonal(plain).loss({'params': {'head': {}}}, {}, jax.random.key(0))
