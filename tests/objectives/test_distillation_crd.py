"""CRD beside equation 18 of the paper, written out in float64 for each example and each negative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.objectives.distillation.base import Pair
from tl_jax.objectives.distillation.contrast import UNSEEN, crd, draw_negatives

EXAMPLES, WIDTH, NEGATIVES, TEMPERATURE, MOMENTUM = 12, 4, 5, 0.2, 0.3
INDEX, LABEL = np.array([7, 0, 11]), np.array([2, 1, 2])


def term(**changes):
    given = dict(width=WIDTH, num_negatives=NEGATIVES, temperature=TEMPERATURE, momentum=MOMENTUM)
    return crd(num_examples=EXAMPLES, **{**given, **changes})


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def case():
    """A batch, parameters and banks in which some entries have been seen, and normalisers of an earlier batch."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)
    pair = Pair({'features': draw(3, 6)}, {'features': draw(3, 2, 2, 2)}, {'index': INDEX, 'label': LABEL})
    part = lambda size: {'kernel': draw(size, WIDTH), 'bias': draw(WIDTH)}
    params = {'student': part(6), 'teacher': part(8)}
    banks = {'student': unit(draw(EXAMPLES, WIDTH)), 'teacher': unit(draw(EXAMPLES, WIDTH))}
    kind = np.array([1, 2, 0, UNSEEN, 1, 2, UNSEEN, 2, 0, 0, 1, UNSEEN], np.int32)
    state = {**banks, 'kind': kind, 'student_sum': np.float64(40.0), 'teacher_sum': np.float64(17.0)}
    return pair, params, state


def ask(term, params, state, pair, key=3):
    return jax.jit(term.loss)(*jax.tree.map(jnp.asarray, (params, state, pair)), jax.random.key(key))


def embedded(params, pair):
    by = lambda who, side: unit(side['features'].reshape(3, -1) @ params[who]['kernel'] + params[who]['bias'])
    return by('student', pair.student), by('teacher', pair.teacher)


def expected(params, state, pair, negatives):
    v_s, v_t = embedded(params, pair)
    noise = NEGATIVES / EXAMPLES
    losses = np.zeros(3)
    for i in range(3):
        for v, bank, z in ((v_s, 'teacher', state['teacher_sum']), (v_t, 'student', state['student_sum'])):
            p = lambda j, anchor=v[i], bank=state[bank], z=z: np.exp(anchor @ bank[j] / TEMPERATURE) / z
            losses[i] -= np.log(p(INDEX[i]) / (p(INDEX[i]) + noise))
            losses[i] -= sum(np.log(1 - p(j) / (p(j) + noise)) for j in negatives[i])
    return losses


def test_loss_is_the_paper_s(case):
    pair, params, state = case
    negatives = np.asarray(draw_negatives(jax.random.key(3), LABEL, state['kind'], NEGATIVES))
    losses, _ = ask(term(), params, state, pair)
    np.testing.assert_allclose(losses, expected(params, state, pair, negatives), rtol=2e-5)


def test_gradient_is_the_slope_of_the_paper_s(case):
    pair, params, state = case
    negatives = np.asarray(draw_negatives(jax.random.key(3), LABEL, state['kind'], NEGATIVES))
    value = lambda f, p: jnp.sum(ask(term(), p, state, pair._replace(student={'features': f}))[0])
    slopes = jax.grad(value, (0, 1))(
        jnp.asarray(pair.student['features'], jnp.float32), jax.tree.map(jnp.asarray, params)
    )
    shifted = lambda step: np.sum(expected(params, state, pair._replace(student={'features': moved(step)}), negatives))
    moved = lambda step: pair.student['features'] + step * np.eye(6)[None, 4] * np.eye(3)[1][:, None]
    np.testing.assert_allclose(slopes[0][1, 4], (shifted(1e-6) - shifted(-1e-6)) / 2e-6, rtol=1e-3)
    params['teacher']['kernel'][5, 2] += 1e-6
    ahead = np.sum(expected(params, state, pair, negatives))
    params['teacher']['kernel'][5, 2] -= 2e-6
    behind = np.sum(expected(params, state, pair, negatives))
    np.testing.assert_allclose(slopes[1]['teacher']['kernel'][5, 2], (ahead - behind) / 2e-6, rtol=1e-3)


def test_banks_follow_the_networks_and_keep_the_rest(case):
    pair, params, state = case
    _, moved = ask(term(), params, state, pair)
    others = np.setdiff1d(np.arange(EXAMPLES), INDEX)
    for who, v in zip(('student', 'teacher'), embedded(params, pair), strict=True):
        wanted = unit(MOMENTUM * state[who][INDEX] + (1 - MOMENTUM) * v)
        np.testing.assert_allclose(moved[who][INDEX], wanted, atol=1e-6)
        np.testing.assert_allclose(moved[who][others], state[who][others], atol=1e-7)
    np.testing.assert_array_equal(moved['kind'][INDEX], LABEL)
    np.testing.assert_array_equal(moved['kind'][others], state['kind'][others])


def test_normalisers_are_set_by_the_first_batch_alone(case):
    pair, params, state = case
    fresh = {**state, 'student_sum': np.float64(0), 'teacher_sum': np.float64(0)}
    chosen = np.asarray(draw_negatives(jax.random.key(3), LABEL, state['kind'], NEGATIVES))
    chosen = np.concatenate([INDEX[:, None], chosen], 1)
    v_s, v_t = embedded(params, pair)
    _, first = ask(term(), params, fresh, pair)
    for name, v, bank in (('teacher_sum', v_s, 'teacher'), ('student_sum', v_t, 'student')):
        scores = np.einsum('bd,bkd->bk', v, state[bank][chosen]) / TEMPERATURE
        np.testing.assert_allclose(first[name], EXAMPLES * np.exp(scores).mean(), rtol=1e-5)
    _, second = ask(term(), params, {**fresh, **jax.tree.map(np.asarray, first)}, pair, key=4)
    assert second['teacher_sum'] == first['teacher_sum']


def test_negatives_are_of_other_classes_and_each_as_likely():
    kinds = np.array([1, 2, 0, UNSEEN, 1, 2, UNSEEN, 2, 0, 0, 1, UNSEEN], np.int32)
    drawn = np.asarray(draw_negatives(jax.random.key(0), np.array([2, 0, 1]), kinds, 6000))
    for kind, row in zip((2, 0, 1), drawn, strict=True):
        counts = np.bincount(row, minlength=len(kinds))
        other = kinds != kind
        assert not counts[~other].any()
        spread = np.sqrt(6000 / other.sum())
        np.testing.assert_allclose(counts[other], 6000 / other.sum(), atol=5 * spread)


def test_without_labels_any_other_example_is_a_negative(case):
    pair, params, state = case
    pair = pair._replace(fields={'index': INDEX})
    state = {**state, 'kind': np.arange(EXAMPLES, dtype=np.int32)}
    losses, moved = ask(term(negatives='examples'), params, state, pair)
    negatives = np.asarray(draw_negatives(jax.random.key(3), INDEX, state['kind'], NEGATIVES))
    assert not np.any(negatives == INDEX[:, None])
    np.testing.assert_allclose(losses, expected(params, state, pair, negatives), rtol=2e-5)
    np.testing.assert_array_equal(moved['kind'], np.arange(EXAMPLES))


@pytest.mark.parametrize(
    'changes', [{'width': 0}, {'num_negatives': 0}, {'temperature': 0.0}, {'momentum': 1.0}], ids=str
)
def test_bad_fields_are_refused(changes):
    with pytest.raises(UserError, match='config.objective.distilled.terms: crd.'):
        term(**changes)


def test_fields_that_examples_lack_are_named(case):
    pair, _, _ = case
    for lacking in ('index', 'label'):
        fields = {name: x for name, x in pair.fields.items() if name != lacking}
        with pytest.raises(UserError, match=f"crd reads '{lacking}'"):
            term().init(jax.random.key(0), pair._replace(fields=fields))
