"""Deep CORAL and MMD against float64 numpy, pair by pair and without matrix tricks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.networks import model_from
from tl_jax.objectives.matching import coral, coral_distance, dan, mmd


def two_samples(seed=0, count=7, dim=4, shift=0.5):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(count, dim)), shift + draw.normal(size=(count, dim)) * np.linspace(0.5, 2, dim)


def coral_reference(s, t):
    """CORAL's eq. 1-3 as they stand."""

    def cov(d):
        n, one = len(d), np.ones((1, len(d)))
        return (d.T @ d - (one @ d).T @ (one @ d) / n) / (n - 1)

    return np.linalg.norm(cov(s) - cov(t), 'fro') ** 2 / (4 * s.shape[1] ** 2)


def kernel_reference(s, t, bandwidths, scale=None):
    both = np.concatenate([s, t])
    squares = np.array([[np.sum((a - b) ** 2) for b in both] for a in both])
    n = len(both)
    scale = np.sum(squares) / (n * n - n) if scale is None else scale
    return sum(np.exp(-squares / (b * scale)) for b in bandwidths), scale


def mmd_reference(s, t, bandwidths, estimator, scale=None):
    k, _ = kernel_reference(s, t, bandwidths, scale)
    n, total = len(s), 0.0
    if estimator == 'linear':
        for i in range(n // 2):
            s1, s2, t1, t2 = 2 * i, 2 * i + 1, n + 2 * i, n + 2 * i + 1
            total += (k[s1, s2] + k[t1, t2] - k[s1, t2] - k[s2, t1]) / (n // 2)
        return total
    for i, j in itertools.product(range(n), range(n)):
        total -= 2 * k[i, n + j] / n**2
        if estimator == 'biased':
            total += (k[i, j] + k[n + i, n + j]) / n**2
        elif i != j:
            total += (k[i, j] + k[n + i, n + j]) / (n * (n - 1))
    return total


def differences(function, x, step=1e-6):
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        grad[i] = (function(up) - function(down)) / (2 * step)
    return grad


def test_coral_is_its_equation():
    s, t = two_samples()
    value, grad = jax.jit(jax.value_and_grad(coral_distance))(jnp.asarray(s, jnp.float32), jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(value, coral_reference(s, t), rtol=1e-5)
    np.testing.assert_allclose(grad, differences(lambda x: coral_reference(x, t), s), rtol=1e-3, atol=1e-6)
    # It sees second moments alone.
    np.testing.assert_allclose(coral_distance(jnp.asarray(s + 3.0), jnp.asarray(t)), value, rtol=1e-4)


@pytest.mark.parametrize('estimator', ['unbiased', 'biased', 'linear'])
@pytest.mark.parametrize('bandwidths', [(0.25, 0.5, 1.0, 2.0, 4.0), (0.7,)])
def test_mmd_is_its_equation(estimator, bandwidths):
    s, t = two_samples(1)
    _, scale = kernel_reference(s, t, bandwidths)

    def ours(x):
        return mmd(x, jnp.asarray(t, jnp.float32), bandwidths=bandwidths, estimator=estimator)

    value, grad = jax.jit(jax.value_and_grad(ours))(jnp.asarray(s, jnp.float32))
    np.testing.assert_allclose(value, mmd_reference(s, t, bandwidths, estimator), rtol=1e-4, atol=1e-6)
    # The bandwidth is a constant to the gradient.
    expected = differences(lambda x: mmd_reference(x, t, bandwidths, estimator, scale), s)
    np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=2e-6)


def test_mmd_is_tllibs_up_to_its_constant():
    """tllib's GaussianKernel(alpha=2^k), k = -3 … 1, and index matrix; its scale is the mean over all n² pairs."""
    s, t = two_samples(2, count=9)
    n, both = 9, np.concatenate([s, t])
    squares = ((both[None] - both[:, None]) ** 2).sum(2)
    kernel = sum(np.exp(-squares / (2 * alpha * squares.mean())) for alpha in 2.0 ** np.arange(-3, 2))
    index = np.full((2 * n, 2 * n), -1 / n**2)
    index[:n, :n] = index[n:, n:] = 1 / (n * (n - 1))
    np.fill_diagonal(index, 0)
    theirs = np.sum(kernel * index)
    stretch = (2 * n - 1) / (2 * n)
    bandwidths = [stretch * b for b in (0.25, 0.5, 1, 2, 4)]
    np.testing.assert_allclose(mmd(jnp.asarray(s), jnp.asarray(t), bandwidths=bandwidths), theirs, rtol=1e-4)


def test_unbiased_is_zero_on_average_and_biased_is_not():
    draws = jax.random.normal(jax.random.key(0), (2, 2000, 6, 3))
    of = {
        e: np.asarray(jax.jit(jax.vmap(lambda s, t, e=e: mmd(s, t, estimator=e)))(*draws))
        for e in ('unbiased', 'biased', 'linear')
    }
    for estimator in ('unbiased', 'linear'):
        assert abs(of[estimator].mean()) < 4 * of[estimator].std() / np.sqrt(2000)
    assert of['biased'].mean() > 0.2


@pytest.mark.parametrize('estimator', ['unbiased', 'biased', 'linear'])
def test_mmd_of_constant_features_has_a_finite_gradient(estimator):
    to_ones = lambda x: mmd(x, jnp.ones((4, 3)), estimator=estimator)
    value, grad = jax.jit(jax.value_and_grad(to_ones))(jnp.ones((4, 3)))
    assert np.isfinite(value) and np.isfinite(grad).all()


def network():
    return model_from(name='mlp', dense=[5], classes=3, dtype=jnp.float32, load=False)


def two_streams():
    s, t = two_samples(3, count=6)
    image = lambda x: jnp.asarray(x, jnp.float32).reshape(6, 2, 2, 1)
    return {'source': {'image': image(s), 'label': jnp.array([0, 2, 1, 1, 0, 2])}, 'target': {'image': image(t)}}


def references(layers, batch, variables, distance):
    """Cross-entropy of the source, and the sum of distances over layers."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])

    def endpoints(image):
        x = np.asarray(image, np.float64).reshape(len(image), -1)
        features = np.maximum(x @ p['backbone']['dense1']['kernel'] + p['backbone']['dense1']['bias'], 0)
        return {'features': features, 'logits': features @ p['head']['kernel'] + p['head']['bias']}

    s, t = endpoints(batch['source']['image']), endpoints(batch['target']['image'])
    logs = s['logits'] - np.log(np.exp(s['logits']).sum(-1, keepdims=True))
    entropy = -np.mean(logs[np.arange(6), np.asarray(batch['source']['label'])])
    return entropy, sum(distance(s[layer], t[layer]) for layer in layers)


@pytest.mark.parametrize(
    ('objective', 'layers', 'distance', 'gamma'),
    [
        (coral, ['logits'], coral_reference, 0.0),
        (coral, ['features', 'logits'], coral_reference, 10.0),
        (dan, ['features', 'logits'], lambda s, t: mmd_reference(s, t, (0.25, 0.5, 1, 2, 4), 'unbiased'), 10.0),
    ],
)
def test_the_loss_adds_the_layers_distances_under_the_ramp(objective, layers, distance, gamma):
    batch, method = two_streams(), objective(network(), weight=2.5, layers=layers, gamma=gamma)
    variables = jax.jit(method.init)(jax.random.key(0), batch)
    entropy, total = references(layers, batch, variables, distance)
    progress = {'progress': {'step': jnp.int32(3), 'fraction': jnp.float32(0.2)}}
    value, aux = jax.jit(method.loss)({**variables, **progress}, batch, jax.random.key(1))
    ramp = 2 / (1 + np.exp(-gamma * 0.2)) - 1 if gamma else 1.0
    np.testing.assert_allclose(value, entropy + 2.5 * ramp * total, rtol=1e-4)
    np.testing.assert_allclose(sum(aux.metrics[f'distance_{layer}'] for layer in layers), total, rtol=1e-3, atol=1e-6)


def test_an_unknown_endpoint_is_one_line():
    batch, method = two_streams(), dan(network(), layers=['feature'])
    with pytest.raises(UserError, match=r"layers: there is no endpoint 'feature'; did you mean 'features'\?"):
        method.loss(method.init(jax.random.key(0), batch), batch, jax.random.key(1))
    with pytest.raises(UserError, match='layers: names no endpoint'):
        coral(network(), layers=[])
    with pytest.raises(UserError, match='bandwidths: must be positive numbers'):
        dan(network(), bandwidths=[1.0, 0.0])
