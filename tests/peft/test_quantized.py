"""A base in few bits: the codes against their definitions, bytes, what a gradient keeps, and a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from tl_jax import trees
from tl_jax.checkpoint import checksums
from tl_jax.errors import UserError
from tl_jax.experiment import bytes_of
from tl_jax.finished import trained
from tl_jax.models import create_model
from tl_jax.objectives.base import Model
from tl_jax.optimizers import create_partition
from tl_jax.peft import adapted, adapters_from, merged
from tl_jax.peft.quantized import NF4, forgetful, held, quantized, restored
from tl_jax.train import train_and_evaluate

ADAM = dict(name='adam', lr=1e-2)
KERNEL = np.random.default_rng(0).normal(size=(3, 3, 10, 20)).astype(np.float32)


def params(kernel):
    return {
        'backbone': {'layer': {'kernel': jnp.asarray(kernel), 'bias': jnp.ones(20)}},
        'head': {'kernel': jnp.ones((2, 3))},
    }


def test_levels_of_nf4():
    """Appendix E: quantiles of a normal between 1 − δ and δ, δ = (1/32 + 1/30) / 2 from the ends, 8 up from 0 and 7 down."""
    offset = 1 - (1 / 32 + 1 / 30) / 2
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below])) / above.max()
    np.testing.assert_allclose(NF4, levels, atol=2e-6)


@pytest.mark.parametrize('double', [False, True])
def test_nf4(double):
    small = held(params(KERNEL), r'backbone/.*/kernel', 'nf4', double=double)
    ours = np.asarray(restored(small)['backbone']['layer']['kernel'])
    blocks = np.pad(KERNEL.reshape(-1).astype(np.float64), (0, -KERNEL.size % 64)).reshape(-1, 64)
    scales = abs(blocks).max(1)
    if double:
        unit = abs(scales - scales.mean()).max() / 127
        scales = np.round((scales - scales.mean()) / unit) * unit + scales.mean()
    nearest = abs((blocks / scales[:, None])[..., None] - NF4.astype(np.float64)).argmin(-1)
    expected = (NF4[nearest] * scales[:, None]).reshape(-1)[: KERNEL.size].reshape(KERNEL.shape)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert small['head']['kernel'].dtype == jnp.float32, 'the rule does not match it'
    assert small['backbone']['layer']['kernel_codes'].shape == (3, 3, 10, 10)


def test_int8():
    small = held(params(KERNEL), r'backbone/.*/kernel', 'int8')['backbone']['layer']
    scale = abs(KERNEL).max((0, 1, 2)).astype(np.float64) / 127
    np.testing.assert_array_equal(small['kernel_codes'], np.round(KERNEL / scale).astype(np.int8))
    ours = restored({'layer': small})['layer']['kernel']
    np.testing.assert_allclose(ours, np.round(KERNEL / scale) * scale, rtol=1e-6, atol=1e-7)
    assert np.all(abs(ours - KERNEL) <= 0.5001 * scale)


@pytest.mark.parametrize(
    ('fields', 'bits'), [(dict(name='nf4'), 4.5), (dict(name='nf4', double=True), 4.128), (dict(name='int8'), 8.07)]
)
def test_bits_a_weight(fields, bits):
    kernel = np.random.default_rng(1).normal(size=(512, 512)).astype(np.float32)
    small = held({'kernel': jnp.asarray(kernel)}, 'kernel', **fields)
    assert 8 * bytes_of(small) / kernel.size == pytest.approx(bits, abs=0.01)
    # Held a second time, nothing changes: a file may have the restored values.
    again = held(restored(small), 'kernel', **fields)
    np.testing.assert_array_equal(again['kernel_codes'], small['kernel_codes'])


def network():
    module = create_model('mlp', num_classes=3, dense=[64] * 4)
    init = lambda key, x: module.init(key, x, train=False)
    plain = forgetful(Model(init, module.apply), dtype=jnp.float32)
    adapters = adapters_from(dict(name='lora', targets=r'backbone/dense\d'), 'ConvNet')
    return plain, adapters, jnp.asarray(np.random.default_rng(2).normal(size=(4, 8, 8, 1)), jnp.float32)


def test_gradient_keeps_codes_not_kernels():
    plain, adapters, x = network()
    whole = adapted(plain, adapters)
    small = quantized(whole, name='nf4', dtype=jnp.float32)
    variables = small.init(jax.random.key(0), x)
    alike = {**variables, 'params': restored(variables['params'])}
    mine = jax.tree.map(lambda leaf: leaf + 0.1, variables['params']['adapters'])

    def loss(model, variables):
        def of(mine):
            logits = model.apply({**variables, 'params': {**variables['params'], 'adapters': mine}}, x)['logits']
            return jnp.sum(logits**2)

        return of

    ours, theirs = jax.grad(loss(small, variables))(mine), jax.grad(loss(whole, alike))(mine)
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())
    kept = {
        name: bytes_of(jax.eval_shape(lambda mine, f=f: jax.vjp(f, mine)[1], mine))
        for name, f in (('codes', loss(small, variables)), ('kernels', loss(whole, alike)))
    }
    assert kept['codes'] < 0.5 * kept['kernels']


def test_method_of_merged_weights_acts():
    """FourierFT runs the network on its own kernels, which must not be made from the codes again."""
    plain, _, x = network()
    adapters = adapters_from(dict(name='fourierft', frequencies=9, targets=r'backbone/dense[12]'), 'ConvNet')
    whole = adapted(plain, adapters)
    small = quantized(whole, name='nf4', dtype=jnp.float32)
    variables = small.init(jax.random.key(0), x)
    start = small.apply(variables, x, train=False)['logits']
    variables['params']['adapters'] = jax.tree.map(lambda leaf: leaf + 0.3, variables['params']['adapters'])
    alike = {**variables, 'params': restored(variables['params'])}
    ours, expected = (m.apply(v, x, train=False)['logits'] for m, v in ((small, variables), (whole, alike)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(ours - start).max() > 1e-2 * np.abs(start).max()


def test_refused():
    plain, adapters, x = network()
    small = quantized(adapted(plain, adapters), name='int8', dtype=jnp.float32)
    variables = small.init(jax.random.key(0), x)
    with pytest.raises(UserError, match='held in few bits, and merging would make it whole again'):
        merged(plain, adapters, variables, x)
    with pytest.raises(
        UserError, match=r"train\[0\]: the rule '\.\*' would train 'backbone/dense1/kernel_codes'.*int8 codes"
    ):
        create_partition([('.*', ADAM)], variables['params'], steps=1)
    with pytest.raises(UserError, match='matches no leaf'):
        held(params(KERNEL), 'backbone/kernel', 'nf4')
    with pytest.raises(UserError, match='two of a row into a byte'):
        held({'kernel': jnp.ones((4, 3))}, 'kernel', 'nf4')
    with pytest.raises(UserError, match='double'):
        quantized(plain, name='int8', double=True, dtype=jnp.float32)


@pytest.mark.parametrize('quantize', [None, dict(name='nf4')], ids=['whole', 'nf4'])
def test_run_trains_adapters_and_head_alone(quantize, digits_config, tmp_path):
    model = dict(name='convnet', widths=[8, 16], norm='batch', peft=dict(name='lora', rank=4), quantize=quantize)
    rules = [['adapters/.*', ADAM], ['head/.*', ADAM]]
    stages = [dict(steps=1, train=rules), dict(steps=5, train=rules)]
    state = train_and_evaluate(digits_config(model=model, stages=stages, checkpoint_every=1), tmp_path / 'run')
    fresh = train_and_evaluate(
        digits_config(model=model, stages=[dict(steps=1, train=[['head/bias', ADAM]])]), tmp_path / 'fresh'
    )
    before, after = (trees.flatten(checksums(s.params)) for s in (fresh, state))
    assert before.keys() == after.keys()
    moved = {path for path in before if before[path] != after[path]}
    assert moved == {path for path in before if path.startswith(('adapters/', 'head/'))}
    assert fresh.collections['batch_stats'].keys() == state.collections['batch_stats'].keys()
    for path, leaf in trees.flatten(fresh.collections['batch_stats']).items():
        np.testing.assert_array_equal(trees.flatten(state.collections['batch_stats'])[path], leaf)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert sizes == 2 * sum(leaf.size for path, leaf in trees.flatten(state.params).items() if path in moved)
    again = trees.flatten(trained(tmp_path / 'run').variables['params'])
    for path, leaf in trees.flatten(state.params).items():
        np.testing.assert_array_equal(again[path], leaf)
