"""The convolution against Linen's, batch norm against torch's closed form, and the max pool against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tl_jax.errors import UserError
from tl_jax.models.layers import BatchNorm, Conv, Forms, Window, avg_pool, choose_forms, max_pool

# (rows, columns of the image, channels), then Conv's own fields.
GEOMETRIES = [
    ((8, 8, 4), dict(features=6, kernel_size=1)),
    ((7, 8, 4), dict(features=6, kernel_size=1, strides=2)),
    ((8, 8, 4), dict(features=6, kernel_size=3, padding=1, use_bias=True)),
    ((7, 6, 4), dict(features=6, kernel_size=3, strides=2, padding=1)),
    ((2, 2, 8), dict(features=8, kernel_size=3, padding=1)),
    ((9, 9, 3), dict(features=5, kernel_size=5, strides=2, padding=2)),
    ((8, 7, 4), dict(features=6, kernel_size=3, strides=2, padding='same')),
    ((9, 9, 4), dict(features=6, kernel_size=(3, 2), padding='valid', dilation=2)),
    ((8, 8, 4), dict(features=4, kernel_size=3, padding=1, groups=4)),
    ((7, 8, 4), dict(features=8, kernel_size=3, strides=2, padding='same', groups=4, use_bias=True)),
    ((8, 8, 6), dict(features=4, kernel_size=3, padding=1, groups=2)),
]


def linen(features, kernel_size=3, strides=1, padding=0, dilation=1, groups=1, use_bias=False):
    pair = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    padding = padding if isinstance(padding, int) else padding.upper()
    return nn.Conv(
        features,
        pair,
        strides,
        padding,
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=nn.initializers.normal(),
    )


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def values_and_gradients(modules):
    """For each geometry: the output of its module, and the gradients of a function of it."""
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((2, *shape), np.float32) for shape, _ in GEOMETRIES]
    shapes = [jax.eval_shape(m.init, jax.random.key(0), x) for m, x in zip(modules, xs, strict=True)]
    variables = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32) / 4, shapes)

    def each(variables, xs):
        def loss(variables, xs):
            ys = [m.apply(v, x) for m, v, x in zip(modules, variables, xs, strict=True)]
            return sum(jnp.sum(y**3) for y in ys), ys

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, xs)

    (by_variables, by_inputs), ys = jax.jit(each)(variables, xs)
    return list(zip(by_variables, by_inputs, ys, strict=True))


@pytest.fixture(scope='module')
def linens():
    return values_and_gradients([linen(**fields) for _, fields in GEOMETRIES])


@pytest.mark.parametrize('form', ['xla', 'patches', 'taps', 'images', None])
def test_conv_equals_linens_with_its_gradients(form, linens):
    """In every form: the same parameters, values and both gradients."""
    ours = values_and_gradients([Conv(**fields, form=form) for _, fields in GEOMETRIES])
    for (_, fields), expected, got in zip(GEOMETRIES, linens, ours, strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(), err_msg=str(fields))


@pytest.mark.parametrize('groups', [1, 3])
def test_conv_is_differentiable_twice_and_forward(groups):
    """A Hessian-vector product, as influence functions and MAML take it, is the same in every form."""
    x = random(2, 5, 5, 3)
    variables = {'params': {'kernel': random(3, 3, 3 // groups, 6)}}

    def product(form):
        def loss(v):
            return jnp.sum(Conv(6, 3, padding=1, groups=groups, form=form).apply(v, x) ** 3)

        return jax.jit(lambda v: jax.jvp(jax.grad(loss), (v,), (v,)))(variables)[1]['params']['kernel']

    expected = product('xla')
    for form in ('patches', 'taps', 'images', None):
        np.testing.assert_allclose(product(form), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('form', ['xla', 'patches', 'taps', 'images'])
def test_conv_in_bfloat16_rounds_operands_only(form):
    x, variables = random(2, 6, 6, 32), {'params': {'kernel': random(3, 3, 32, 16)}}

    def gradients(dtype):
        def loss(v, x):
            return jnp.sum(Conv(16, 3, padding=1, dtype=dtype, form=form).apply(v, x).astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, x)

    exact, rounded = gradients('float32'), gradients('bfloat16')
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert b.dtype == jnp.float32
        assert jnp.linalg.norm(a - b) < 0.02 * jnp.linalg.norm(a)


def test_rule_keeps_patches_small():
    """Whatever the batch, patches never take more than the stated bytes, and large maps keep XLA's form."""
    window = Window((1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    assert choose_forms((32, 2, 2, 512), (3, 3, 512, 512), window) == Forms('patches', 'patches', 'patches')
    assert 'patches' not in choose_forms((4096, 2, 2, 512), (3, 3, 512, 512), window)
    assert choose_forms((16, 56, 56, 64), (3, 3, 64, 64), window) == Forms('xla', 'xla', 'images')
    assert choose_forms((16, 56, 56, 64), (3, 3, 1, 64), window._replace(groups=64)) == Forms('taps', 'taps', 'rows')


def test_batch_norm_trains_as_torch_does():
    """Normalised by the biased variance; running variance moved by the unbiased one; var and mean in closed form."""
    x = np.random.default_rng(0).normal(3, 2, (4, 3, 2, 5)).astype(np.float32)
    module = BatchNorm()
    variables = module.init(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(variables['batch_stats']['mean'], 0)  # initialisation does not move them
    y, updates = module.apply(variables, x, train=True, mutable=['batch_stats'])
    flat = x.reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(
        y.reshape(-1, 5), (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(updates['batch_stats']['mean'], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(updates['batch_stats']['var'], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)


def test_batch_norm_is_exact_far_from_zero():
    """Statistics in one pass over the squares would lose them here."""
    y, _ = BatchNorm().init_with_output(jax.random.key(0), 1e4 + random(64, 4, 4, 2), train=True)
    np.testing.assert_allclose(np.std(y, (0, 1, 2)), 1, rtol=1e-3)


def test_batch_norm_evaluates_with_running_statistics():
    x = random(4, 5)
    stats = {'mean': jnp.arange(5.0), 'var': jnp.arange(1.0, 6.0)}
    variables = {**BatchNorm().init(jax.random.key(0), x, train=False), 'batch_stats': stats}
    y = BatchNorm().apply(variables, x, train=False)
    np.testing.assert_allclose(y, (x - stats['mean']) / jnp.sqrt(stats['var'] + 1e-5), rtol=1e-5, atol=1e-6)


def test_frozen_batch_norm_is_in_evaluation_mode_and_stays():
    """One layer of two carries the marker: it alone evaluates, and what comes back has the same structure."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = BatchNorm(name='first')(x, train)
            return BatchNorm(name='second')(x, train)

    x = random(8, 5) + 2
    variables = Two().init(jax.random.key(0), x, train=False)
    stats = variables['batch_stats']
    stats = {**stats, 'first': {**stats['first'], 'frozen': jnp.zeros((), bool)}}

    @jax.jit
    def step(stats):
        return Two().apply({**variables, 'batch_stats': stats}, x, train=True, mutable=['batch_stats'])

    y, updates = step(stats)
    updated = updates['batch_stats']
    assert jax.tree.structure(updated) == jax.tree.structure(stats)
    jax.tree.map(np.testing.assert_array_equal, updated['first'], stats['first'])
    # The first is (nearly) the identity, so the second sees the batch's own mean.
    np.testing.assert_allclose(updated['second']['mean'], 0.1 * x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)


@pytest.mark.parametrize('window, stride, padding', [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_max_pool_equals_xlas_with_its_gradient_at_ties(window, stride, padding):
    x = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (2, 9, 8, 3)), jnp.float32)  # full of ties

    def reference(x):
        return nn.max_pool(x, (window, window), (stride, stride), ((padding, padding),) * 2)

    def both(pool):
        y, transposed = jax.vjp(pool, x)
        return y, *transposed(jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape))

    got = jax.jit(lambda: both(lambda x: max_pool(x, window, stride, padding)))()
    for a, b in zip(got, jax.jit(lambda: both(reference))(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize('pool', [max_pool, avg_pool])
def test_a_window_larger_than_the_map_is_refused_on_every_backend(pool, backend, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    with pytest.raises(UserError, match='a map is smaller than the 3 × 3 window'):
        pool(jnp.zeros((1, 2, 5, 1)), 3, 2)
    assert pool(jnp.zeros((1, 2, 5, 1)), 3, 2, padding=1).shape == (1, 1, 3, 1)
