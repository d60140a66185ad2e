"""What relations and predictions leave alone, what they are in a limit, and bad input; their formulas are held against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.data.sources import open_source
from tl_jax.errors import UserError
from tl_jax.objectives.distillation.base import Pair
from tl_jax.objectives.distillation.terms import TERMS
from tl_jax.train import train_and_evaluate

FEATURES = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
MAPS = np.random.default_rng(1).standard_normal((4, 3, 2, 5)).astype(np.float32)


def value(name, student, teacher, layer='features', label=None, **fields):
    """The mean of a term that remembers nothing."""
    if layer != 'logits':
        fields['layers'] = [layer]
    term = TERMS[name](**fields)

    def mean(s, t):
        return jnp.mean(term.loss({}, {}, Pair({layer: s}, {layer: t}, {'label': label}), jax.random.key(0))[0])

    return jax.jit(mean)(jnp.asarray(student), jnp.asarray(teacher))


def rotation(width=5):
    return np.linalg.qr(np.random.default_rng(2).standard_normal((width, width)))[0].astype(np.float32)


@pytest.mark.parametrize(
    ('name', 'moved'),
    [
        ('rkd', lambda x: 3 * x @ rotation() + 7),  # lengths count by their mean, angles by what they are between
        ('pkt', lambda x: 3 * x @ rotation()),
        ('similarity', lambda x: 3 * x @ rotation()),
        ('correlation', lambda x: x @ rotation() * np.arange(1, 7)[:, None].astype(np.float32)),
    ],
)
def test_relations_of_examples_do_not_see_similar_spaces(name, moved):
    assert value(name, moved(FEATURES), FEATURES) < 1e-8 * 3e4
    assert value(name, moved(FEATURES) * [1, 1, 1, 1, 4], FEATURES) > 1e-3


def test_selectivity_does_not_see_the_order_of_channels_nor_of_positions():
    turned = MAPS[..., ::-1] * np.float32(3)
    assert abs(value('nst', turned, MAPS, 'stage1')) < 1e-6
    assert value('nst', turned[:, ::-1], MAPS, 'stage1') > 1e-2


def test_correlation_of_channels_does_not_see_the_order_of_positions():
    assert abs(value('ickd', 2 * MAPS[:, ::-1], MAPS, 'stage1', projection=False)) < 1e-8
    assert value('ickd', MAPS[..., ::-1], MAPS, 'stage1', projection=False) > 1e-2


def test_correlation_is_the_gaussian_kernel_in_the_limit_of_its_order():
    s, t = FEATURES, np.random.default_rng(4).standard_normal((6, 3)).astype(np.float32)

    def kernel(x):
        x = np.float64(x) / np.linalg.norm(np.float64(x), axis=1, keepdims=True)
        return np.exp(-0.4 * np.sum((x[:, None] - x) ** 2, -1))

    expected = np.mean((kernel(s) - kernel(t)) ** 2)
    np.testing.assert_allclose(value('correlation', s, t, order=9), expected, rtol=1e-4)


def test_the_parts_of_dkd_make_up_soft_targets():
    s, t = (4 * np.random.default_rng(seed).standard_normal((1, 5)).astype(np.float32) for seed in (5, 6))
    label = jnp.array([3])
    rest = 1 - jax.nn.softmax(t / 4)[0, 3]
    assert rest > 0.1
    whole = value('soft_targets', s, t, 'logits', temperature=4.0)
    parts = value('dkd', s, t, 'logits', label, temperature=4.0, alpha=1.0, beta=float(rest))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_dkd_keeps_its_gradient_where_a_teacher_is_certain():
    t, s = jnp.array([[200.0, 0.0, -3.0]]), jnp.array([[1.0, 2.0, -1.0]])
    slope = jax.grad(lambda s: value('dkd', s, t, 'logits', jnp.array([0]), temperature=1.0, beta=1.0))(s)
    p, q = np.exp([1, 2, -1]) / np.sum(np.exp([1, 2, -1])), np.exp([2, -1]) / np.sum(np.exp([2, -1]))
    others = q - np.exp([0, -3]) / np.sum(np.exp([0, -3]))
    np.testing.assert_allclose(slope[0], [p[0] - 1, p[1] + others[0], p[2] + others[1]], rtol=1e-4)


def test_dist_asks_for_the_order_of_predictions_not_for_their_size():
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.3, 0.5, 0.2]])
    half = np.log(p / 2 + 1 / 6)  # an affine image of each row and of each column
    np.testing.assert_allclose(value('dist', half, np.log(p), 'logits'), 0, atol=1e-6)
    assert value('dist', half[::-1], np.log(p), 'logits') > 0.1


def test_a_virtual_teacher_without_softening_is_smoothed_labels():
    s, label, smoothing = FEATURES, np.array([0, 4, 2, 2, 1, 3]), 0.1
    target = np.full((6, 5), smoothing / 4)
    target[np.arange(6), label] = 1 - smoothing
    logp = np.float64(s) - np.log(np.exp(np.float64(s)).sum(1, keepdims=True))
    expected = np.mean(np.sum(target * (np.log(target) - logp), 1))
    ours = value('virtual_teacher', s, s, 'logits', jnp.asarray(label), temperature=1.0, correct=1 - smoothing)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize('name', ['rkd', 'pkt', 'similarity', 'correlation'])
def test_equal_and_silent_examples_leave_finite_gradients(name):
    twins = jnp.asarray(FEATURES).at[1].set(FEATURES[0]).at[2].set(0.0)
    slope = jax.grad(lambda x: value(name, x, FEATURES))(twins)
    assert np.all(np.isfinite(slope)) and np.any(slope)


@pytest.mark.parametrize(
    ('name', 'fields', 'message'),
    [
        ('dkd', dict(temperature=0.0), 'temperature must be above 0, not 0.0'),
        ('dist', dict(temperature=-1.0), 'temperature must be above 0'),
        ('virtual_teacher', dict(correct=1.0), 'correct is a probability, above 0 and below 1, not 1.0'),
        ('rkd', dict(distance=0.0, angle=0.0), 'give at least one above 0'),
        ('correlation', dict(order=0), 'an order of 1 or more, not 0.4 and 0'),
        ('nst', dict(layers=['stage1'], degree=0), 'degree must be 1 or more, not 0'),
        ('prototypes', dict(num_classes=3, temperature=0.0), 'temperature must be above 0'),
    ],
)
def test_a_field_out_of_range_is_named(name, fields, message):
    with pytest.raises(UserError, match=f'^config.objective.distilled.*{message}'):
        TERMS[name](**fields)


@pytest.mark.parametrize(
    ('name', 'fields', 'shapes', 'message'),
    [
        ('nst', dict(layers=['x']), [(4, 5), (4, 3, 3, 5)], "nst compares maps .*student's 'x'"),
        ('ickd', dict(layers=['x']), [(4, 3, 3, 5), (4, 5)], "ickd compares maps .*teacher's 'x'"),
        ('ickd', dict(layers=['x'], projection=False), [(4, 3, 3, 5), (4, 3, 3, 6)], 'compares channel with channel'),
        ('correlation_code', dict(layers=['x']), [(4, 5), (4, 3, 3, 5)], r'takes vectors \[B, D\], not \[4, 3, 3, 5\]'),
        ('prototypes', dict(layer='x', num_classes=3), [(4, 7, 5), (4, 5)], r"student's 'x' is \[4, 7, 5\]"),
        ('dkd', {}, [(4, 5), (4, 6)], 'the student tells 5 classes apart'),
    ],
)
def test_shapes_that_nothing_joins_are_refused(name, fields, shapes, message):
    endpoint = 'logits' if name == 'dkd' else 'x'
    pair = Pair(*({endpoint: jax.ShapeDtypeStruct(shape, jnp.float32)} for shape in shapes), {})
    with pytest.raises(UserError, match=message):
        TERMS[name](**fields).init(jax.random.key(0), pair)


def test_one_example_has_no_relations():
    with pytest.raises(UserError, match='has a single example; raise batch_size'):
        value('similarity', FEATURES[:1], FEATURES[:1])


def test_a_run_with_terms_that_learn_that_remember_and_that_do_neither(digits_config, tmp_path):
    terms = [dict(name='dkd'), dict(name='correlation_code', width=6)]
    terms += [dict(name='prototypes'), dict(name='prototypes', targets='teacher')]
    config = digits_config(
        model=dict(name='mlp', dense=[5]),
        objective=dict(name='supervised', distilled=dict(teacher=dict(name='mlp', dense=[7]), terms=terms)),
        stages=[dict(steps=2, train=[('.*', dict(name='sgd', lr=1e-4))])],
    )
    state = train_and_evaluate(config, tmp_path)
    first, second = (state.collections['distillation']['teacher'][name] for name in ('prototypes', 'prototypes2'))
    seen = open_source('sklearn:digits/train').labels
    np.testing.assert_array_equal(first['counts'], np.bincount(seen, minlength=10))
    np.testing.assert_allclose(np.sum(second['counts']), len(seen), rtol=1e-5)
    np.testing.assert_allclose(np.sum(second['sums'], 0), np.sum(first['sums'], 0), rtol=1e-4)
    assert set(state.params['projectors']['teacher']) == {'correlation_code', 'prototypes', 'prototypes2'}
