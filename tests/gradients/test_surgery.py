"""PCGrad and MGDA against closed forms and exhaustive search in float64, on the 2-D toy of CAGrad and on random gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.gradients.surgery import mgda, min_norm_weights, normalized, pcgrad, projected_weights
from tl_jax.objectives import Aux

POINTS = [(-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0), (0.3, 0.2), (5.0, -2.0), (1.0, 3.0)]


def toy_terms(x):
    """The two objectives of Liu et al. 2021 (arXiv:2110.14048, appendix; Cranial-XIX/CAGrad toy.py)."""
    x1, x2 = x[0], x[1]
    floor = 0.000005
    f1 = jnp.log(jnp.maximum(jnp.abs(0.5 * (-x1 - 7) - jnp.tanh(-x2)), floor)) + 6
    f2 = jnp.log(jnp.maximum(jnp.abs(0.5 * (-x1 + 3) + jnp.tanh(-x2) + 2), floor)) + 6
    up, down = jnp.maximum(jnp.tanh(x2 * 0.5), 0), jnp.maximum(jnp.tanh(-x2 * 0.5), 0)
    g1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    g2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    return [f1 * up + g1 * down, f2 * up + g2 * down]


def toy_terms_numpy(x):
    x1, x2 = x
    f1 = np.log(max(abs(0.5 * (-x1 - 7) - np.tanh(-x2)), 0.000005)) + 6
    f2 = np.log(max(abs(0.5 * (-x1 + 3) + np.tanh(-x2) + 2), 0.000005)) + 6
    up, down = max(np.tanh(x2 * 0.5), 0), max(np.tanh(-x2 * 0.5), 0)
    g1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    g2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    return np.array([f1 * up + g1 * down, f2 * up + g2 * down])


def toy_gradients(x):
    """By central differences: rows are tasks."""
    x = np.array(x, np.float64)
    return np.stack([(toy_terms_numpy(x + e) - toy_terms_numpy(x - e)) / 2e-6 for e in np.eye(2) * 1e-6], 1)


def loss_of(terms):
    def loss(params, collections, batch, key):
        values = terms(params)
        return sum(values), Aux({}, {}, {str(i): v for i, v in enumerate(values)})

    return loss


def direction(gradient, terms, params, key=0):
    return jax.jit(gradient.transform(loss_of(terms)))(params, {}, {}, jax.random.key(key))


TOY = loss_of(lambda params: toy_terms(params['backbone']['x']))
ON_THE_TOY = {name: jax.jit(make().transform(TOY)) for name, make in (('pcgrad', pcgrad), ('mgda', mgda))}


@pytest.mark.parametrize('point', POINTS)
def test_closed_forms_on_the_toy(point):
    given = {'backbone': {'x': jnp.array(point)}}, {}, {}, jax.random.key(0)
    g1, g2 = toy_gradients(point)
    conflict = min(g1 @ g2, 0)
    projected = (1 - conflict / (g1 @ g1)) * g1 + (1 - conflict / (g2 @ g2)) * g2
    grads, value, _ = ON_THE_TOY['pcgrad'](*given)
    np.testing.assert_allclose(grads['backbone']['x'], projected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(value, toy_terms_numpy(point).sum(), rtol=1e-5)
    share = np.clip((g2 - g1) @ g2 / ((g1 - g2) @ (g1 - g2)), 0, 1)
    grads, _, aux = ON_THE_TOY['mgda'](*given)
    np.testing.assert_allclose(grads['backbone']['x'], share * g1 + (1 - share) * g2, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(aux.metrics['weight_0'], share, atol=1e-4)


def project_by_hand(gradients, orders):
    """Algorithm 1 of PCGrad, on vectors."""
    total = np.zeros(gradients.shape[1])
    for i, order in enumerate(orders):
        g = gradients[i].copy()
        for j in order:
            if j != i and g @ gradients[j] < 0:
                g -= (g @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
        total += g
    return total


def test_pcgrad_of_many_tasks_is_the_algorithm_in_one_of_its_orders():
    rng, solve = np.random.default_rng(0), jax.jit(projected_weights)
    seen = set()
    for seed in range(6):
        gradients = rng.normal(size=(3, 4))
        weights = solve(jnp.array(gradients @ gradients.T, jnp.float32), jax.random.key(seed))
        ours = np.asarray(weights) @ gradients
        orders = list(itertools.permutations(range(3)))
        distances = {o: np.abs(project_by_hand(gradients, o) - ours).max() for o in itertools.product(orders, repeat=3)}
        best = min(distances, key=distances.get)
        assert distances[best] < 1e-5
        seen.add(best)
    assert len(seen) > 1, 'the order is random'


def test_pcgrad_depends_on_the_key_alone():
    gradients = np.random.default_rng(3).normal(size=(5, 3))
    gram = jnp.array(gradients @ gradients.T, jnp.float32)
    solve = jax.jit(projected_weights)
    draws = np.array([solve(gram, jax.random.key(k)) for k in (0, 0, 1, 2, 3)])
    assert (draws[0] == draws[1]).all() and len({tuple(d.round(5)) for d in draws}) > 1


def least_norm(gram):
    """The minimum over the simplex, exactly: the best of every face's stationary point that lies inside it."""
    best = None
    for size in range(1, len(gram) + 1):
        for face in map(list, itertools.combinations(range(len(gram)), size)):
            try:
                inner = np.linalg.solve(gram[np.ix_(face, face)], np.ones(size))
            except np.linalg.LinAlgError:
                continue
            inner = inner / inner.sum()
            if (inner >= 0).all():
                weights = np.zeros(len(gram))
                weights[face] = inner
                value = weights @ gram @ weights
                best = value if best is None else min(best, value)
    return best


@pytest.mark.parametrize('tasks', [2, 3, 5])
def test_least_norm_over_the_simplex(tasks):
    rng = np.random.default_rng(tasks)
    solve = jax.jit(min_norm_weights)
    for trial in range(30):
        # A common direction of varying strength puts the optimum inside, on a face, or in a corner.
        gradients = rng.normal(size=(tasks, 7)) * rng.exponential(size=(tasks, 1)) + 0.3 * (trial % 4)
        gram = gradients @ gradients.T
        weights = np.asarray(solve(jnp.array(gram, jnp.float32)), np.float64)
        assert weights.min() >= 0 and abs(weights.sum() - 1) < 1e-5
        np.testing.assert_allclose(weights @ gram @ weights, least_norm(gram), rtol=1e-4)


def test_normalisations():
    rng = np.random.default_rng(1)
    gradients, losses = rng.normal(size=(3, 6)), np.array([0.5, 2.0, 3.0])
    norms = np.linalg.norm(gradients, axis=1)
    for name, by in {'none': 1, 'l2': norms, 'loss': losses, 'loss+': losses * norms}.items():
        scaled = gradients / np.reshape(by * np.ones(3), (3, 1))
        ours = normalized(jnp.array(gradients @ gradients.T), jnp.array(losses), name)
        np.testing.assert_allclose(ours, scaled @ scaled.T, rtol=1e-4)


def two_heads(params):
    h = params['backbone']['w'] ** 2
    return [
        jnp.sum(h * params['a']['w']) + params['a']['w'] ** 2,
        -jnp.sum(h * params['b']['w']) + params['b']['w'] ** 3,
    ]


def test_other_parameters_take_the_tasks_own_gradients():
    params = {
        'backbone': {'w': jnp.array([1.0, 2.0, -0.5])},
        'a': {'w': jnp.float32(0.7)},
        'b': {'w': jnp.float32(0.4)},
    }
    each = jax.jit(jax.jacrev(two_heads))(params)
    own = [each[0]['a']['w'], each[1]['b']['w']]
    grads, *_ = direction(pcgrad(), two_heads, params)
    np.testing.assert_allclose([grads['a']['w'], grads['b']['w']], own, rtol=1e-6)
    grads, _, aux = direction(mgda(normalize='l2'), two_heads, params)
    weights = np.array([aux.metrics['weight_0'], aux.metrics['weight_1']])
    np.testing.assert_allclose([grads['a']['w'], grads['b']['w']], weights * own, rtol=1e-5)
    shared = sum(w * g['backbone']['w'] for w, g in zip(weights, each, strict=True))
    np.testing.assert_allclose(grads['backbone']['w'], shared, rtol=1e-5, atol=1e-6)


def test_bad_input_is_one_line():
    params = {'backbone': {'w': jnp.ones(3)}}
    plain_loss = lambda params, collections, batch, key: (jnp.sum(params['backbone']['w']), Aux({}, {}))
    with pytest.raises(UserError, match='combine the losses of several tasks'):
        pcgrad().transform(plain_loss)(params, {}, {}, jax.random.key(0))
    with pytest.raises(UserError, match="shared: 'body' matches no trained parameter, such as 'backbone/w'"):
        direction(mgda(shared='body'), lambda p: [p['backbone']['w'].sum()] * 2, params)
    with pytest.raises(UserError, match=r"shared: '\(body' is not a regular expression"):
        direction(mgda(shared='(body'), lambda p: [p['backbone']['w'].sum()] * 2, params)
