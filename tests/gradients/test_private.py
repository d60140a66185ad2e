"""DP-SGD: clipping against a loop over examples, the noise's size, and the published privacy."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.gradients.private import add_noise, calibrated_noise, clipped_sum, epsilon_of, private
from tl_jax.networks import model_from
from tl_jax.objectives import supervised, without_endpoints
from tl_jax.train import train_and_evaluate

ROOT = Path(__file__).resolve().parents[2]
FACTS = dict(sample_rate=0.02, num_examples=600, batch_size=12, steps=100)


def setting(**fields):
    fields = {'name': 'convnet', 'widths': [4], 'dense': [6], **fields}
    model = model_from(**fields, classes=3, dtype=jnp.float32, load=False)
    objective = without_endpoints(supervised(model, num_classes=3))
    rng = np.random.default_rng(0)
    image = rng.normal(size=(12, 6, 6, 1)).astype(np.float32) * rng.exponential(size=(12, 1, 1, 1)).astype(np.float32)
    mask = (rng.random(12) < 0.7).astype(np.float32)
    batch = {'train': {'image': image, 'label': rng.integers(0, 3, 12).astype(np.int32), 'mask': mask}}
    variables = objective.init(jax.random.key(0), batch)
    collections = {name: tree for name, tree in variables.items() if name != 'params'}

    def loss(params, collections, batch, key):
        return objective.loss({'params': params, **collections}, batch, key)

    return loss, variables['params'], collections, batch


@functools.partial(jax.jit, static_argnames=('loss', 'clip', 'parts'))
def summed(loss, params, collections, batch, clip, parts=1):
    return clipped_sum(loss, params, collections, batch, jax.random.key(0), clip=clip, parts=parts)


def one_by_one(loss, params, collections, batch, clip):
    """The same in a plain loop, float64."""
    total, norms, losses = None, [], []
    compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for i in np.flatnonzero(batch['train']['mask']):
        alone = {'train': {name: x[i : i + 1] for name, x in batch['train'].items()}}
        (value, _), grads = compute(params, collections, alone, jax.random.key(0))
        flat = np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)])
        norms.append(np.linalg.norm(flat))
        flat *= min(1, clip / norms[-1])
        total = flat if total is None else total + flat
        losses.append(value)
    return total, np.array(norms), np.mean(losses)


@pytest.mark.parametrize('parts', [1, 3])
def test_clipped_sum_is_the_loop_over_examples(parts):
    loss, params, collections, batch = setting()
    _, norms, _ = one_by_one(loss, params, collections, batch, 1.0)
    clip = float(np.median(norms))
    expected, _, mean = one_by_one(loss, params, collections, batch, clip)
    total, value, aux = summed(loss, params, collections, batch, clip, parts)
    ours = np.concatenate([np.asarray(g).ravel() for g in jax.tree.leaves(total)])
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value, mean, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics['clipped'], np.mean(norms > clip), atol=0.1)
    assert aux.collections == {}


def test_masked_rows_have_no_weight():
    loss, params, collections, batch = setting(name='mlp', widths=[])
    other = {'train': dict(batch['train'], image=batch['train']['image'].copy())}
    other['train']['image'][batch['train']['mask'] == 0] = 7.0
    one, two = (summed(loss, params, collections, b, 0.5)[0] for b in (batch, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, two)
    empty = {'train': dict(batch['train'], mask=np.zeros(12, np.float32))}
    none, value, _ = summed(loss, params, collections, empty, 0.5)
    assert all(not np.any(g) for g in jax.tree.leaves(none)) and value == 0


def test_the_noise_has_its_size():
    tree = {'a': jnp.zeros((300, 400)), 'b': jnp.ones(100_000)}
    noisy = add_noise(tree, jax.random.key(0), 2.5)
    for name, leaf in tree.items():
        drawn = np.asarray(noisy[name] - leaf, np.float64)
        np.testing.assert_allclose(drawn.std(), 2.5, rtol=0.01)
        assert abs(drawn.mean()) < 0.03
    assert not np.allclose(noisy['a'].ravel()[:100], noisy['b'][:100] - 1)


def test_the_gradient_is_the_noisy_sum_over_the_expected_batch():
    loss, params, collections, batch = setting(name='mlp', widths=[])
    gradient = private(clip=0.5, noise_multiplier=1.3, delta=1e-5, **FACTS).transform(loss)
    keys = jax.random.split(jax.random.key(1), 200)
    draws = jax.jit(lambda keys: jax.lax.map(lambda k: gradient(params, collections, batch, k)[0], keys))(keys)
    expected, *_ = one_by_one(loss, params, collections, batch, 0.5)
    draws = np.concatenate([np.asarray(g).reshape(200, -1) for g in jax.tree.leaves(draws)], 1)
    noise = draws - expected / 12
    np.testing.assert_allclose(noise.std(), 1.3 * 0.5 / 12, rtol=0.02)
    assert abs(noise.mean()) < 5 * 1.3 * 0.5 / 12 / np.sqrt(noise.size)


@pytest.mark.parametrize(('epochs', 'published'), [(1, 0.71), (15, 1.16)])
def test_privacy_of_the_opacus_example(epochs, published):
    """examples/mnist_README.md of pytorch/opacus: σ 1.3, rate 0.004, δ 1e-5, 250 steps an epoch."""
    spent = dict(sample_rate=0.004, steps=250 * epochs, delta=1e-5)
    basic = epsilon_of(1.3, accountant='rdp_basic', **spent)
    assert abs(basic - published) < 0.01
    assert epsilon_of(1.3, accountant='pld', **spent) < epsilon_of(1.3, accountant='rdp', **spent) < basic


def test_privacy_of_one_gaussian_is_the_closed_form():
    """Without sampling: δ(ε) = Φ(1/2σ - εσ) - e^ε Φ(-1/2σ - εσ) (Balle & Wang 2018, arXiv:1805.06530, theorem 8)."""
    from scipy.stats import norm

    sigma, steps, delta = 4.0, 3, 1e-5
    epsilon = epsilon_of(sigma, sample_rate=1.0, steps=steps, delta=delta, accountant='pld')
    s = sigma / np.sqrt(steps)
    spent = norm.cdf(0.5 / s - epsilon * s) - np.exp(epsilon) * norm.cdf(-0.5 / s - epsilon * s)
    np.testing.assert_allclose(spent, delta, rtol=0.01)
    # Rényi: ε = α / 2s² + log(1/δ) / (α - 1), least at α = 1 + s √(2 log 1/δ).
    basic = epsilon_of(sigma, sample_rate=1.0, steps=steps, delta=delta, accountant='rdp_basic')
    np.testing.assert_allclose(basic, 0.5 / s**2 + np.sqrt(2 * np.log(1 / delta)) / s, rtol=1e-3)


def test_noise_is_calibrated_to_epsilon():
    gradient = private(clip=1.0, epsilon=2.0, delta=1e-5, **FACTS)
    figures = gradient.figures(FACTS['steps'])
    assert 1.98 < figures['privacy/epsilon'] <= 2.0 and figures['privacy/delta'] == 1e-5
    assert gradient.figures(10)['privacy/epsilon'] < figures['privacy/epsilon']
    assert gradient.figures(0)['privacy/epsilon'] == 0
    np.testing.assert_allclose(calibrated_noise(lambda sigma: 3 / sigma, 2.0), 1.5, rtol=1e-3)
    with pytest.raises(UserError, match='epsilon: 1e-06 is out of reach'):
        calibrated_noise(lambda sigma: 3 / sigma, 1e-6)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(noise_multiplier=1.0), 'delta: ε means nothing without δ'),
        (dict(epsilon=1.0), 'delta: ε means nothing without δ'),
        (dict(delta=1e-5), 'exactly one of noise_multiplier and epsilon'),
        (dict(delta=1e-5, noise_multiplier=1.0, epsilon=1.0), 'exactly one of noise_multiplier and epsilon'),
        (dict(delta=1e-5, noise_multiplier=-1.0), 'noise_multiplier: must be above 0, not -1'),
        (dict(delta=1e-5, noise_multiplier=1.0, parts=5), '5 parts do not divide a batch of 12'),
        (dict(delta=1e-5, noise_multiplier=1.0, sample_rate=None), 'add config.data.poisson'),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        private(**{'clip': 1.0, **FACTS, **fields})


def test_batch_normalisation_is_refused_unless_frozen():
    loss, params, collections, batch = setting(norm='batch')
    with pytest.raises(UserError, match="batch normalisation in 'backbone/norm1' mixes them"):
        clipped_sum(loss, params, collections, batch, jax.random.key(0), clip=1.0)
    frozen = trees.merge(collections, {'batch_stats': {'backbone': {'norm1': {'frozen': jnp.zeros(())}}}})
    expected, *_ = one_by_one(loss, params, frozen, batch, 0.5)
    total, *_ = summed(loss, params, frozen, batch, 0.5)
    ours = np.concatenate([np.asarray(g).ravel() for g in jax.tree.leaves(total)])
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_one_stream_only():
    loss, params, collections, batch = setting()
    with pytest.raises(UserError, match='reads train and target'):
        clipped_sum(loss, params, collections, {**batch, 'target': batch['train']}, jax.random.key(0), clip=1.0)


def test_a_run_states_what_it_spent(digits_config, tmp_path):
    config = digits_config(
        model={'name': 'mlp', 'dense': [8]},
        batch_size=32,
        gradient={'name': 'private', 'clip': 1.0, 'noise_multiplier': 1.1, 'delta': 1e-4},
    )
    config['data']['poisson'] = 0.02
    train_and_evaluate(config, tmp_path)
    records = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    spent = [r['privacy/epsilon'] for r in records if 'privacy/epsilon' in r]
    assert spent[-1] == pytest.approx(epsilon_of(1.1, sample_rate=0.02, steps=6, delta=1e-4))


def test_the_config_has_opacus_network():
    """SampleConvNet: 16·8·8 + 16, 32·16·4·4 + 32, 512·32 + 32, 32·10 + 10."""
    model = config_lib.load(str(ROOT / 'configs/private_mnist.py')).model.to_dict()
    network = model_from(**model, classes=10, dtype=jnp.float32, load=False)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1040 + 8224 + 16416 + 330
