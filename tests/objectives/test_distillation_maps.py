"""What the parity files do not say of the terms of maps: what they refuse, and that each example has its number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.objectives.distillation.attention import attention, fsp
from tl_jax.objectives.distillation.base import Pair
from tl_jax.objectives.distillation.hints import hints, vid

SHAPES = {'stem': (3, 6, 6, 4), 'stage1': (3, 6, 6, 4), 'stage2': (3, 3, 3, 8), 'block1': (3, 9, 8), 'features': (3, 8)}


def pair_of(seed=0, dtype=np.float32, **shapes):
    """Both networks' endpoints, the teacher's of `shapes` where they differ."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)
    return Pair(
        jax.tree.map(draw, SHAPES, is_leaf=is_shape), jax.tree.map(draw, {**SHAPES, **shapes}, is_leaf=is_shape), {}
    )


def is_shape(node):
    return isinstance(node, tuple)


def value(term, pair):
    key = jax.random.key(0)
    # Compiled as a whole: one program is faster than the operations one by one.
    return jax.jit(lambda pair: term.loss(term.init(key, pair), {}, pair, key)[0])(pair)


LAYERS = ['stage1', 'stage2']
TERMS = {
    'attention': attention(layers=LAYERS),
    'attention_paper': attention(layers=LAYERS, form='paper'),
    'fsp': fsp(layers=LAYERS),
    'hints': hints(layers=LAYERS),
    'vid': vid(layers=LAYERS),
}


@pytest.mark.parametrize('term', TERMS.values(), ids=TERMS)
def test_a_number_for_each_example_that_is_its_own(term):
    pair = pair_of()
    alone = Pair(*(jax.tree.map(lambda x: x[1:2], side) for side in (pair.student, pair.teacher)), {})
    whole = value(term, pair)
    assert whole.shape == (3,)
    np.testing.assert_allclose(value(term, alone)[0], whole[1], rtol=1e-5)


@pytest.mark.parametrize('term', TERMS.values(), ids=TERMS)
def test_half_precision_is_computed_in_float32(term):
    half = pair_of(dtype=jnp.bfloat16)
    single = Pair(*(jax.tree.map(lambda x: x.astype(jnp.float32), side) for side in (half.student, half.teacher)), {})
    assert value(term, half).dtype == jnp.float32
    np.testing.assert_allclose(value(term, half), value(term, single), rtol=1e-6)


@pytest.mark.parametrize(
    ('term', 'weight'), [('attention', 1000.0), ('attention_paper', 0.1), ('fsp', 50.0), ('hints', 1.0), ('vid', 1.0)]
)
def test_weights_unless_given(term, weight):
    assert TERMS[term].weight == weight


def test_a_map_without_activity_has_a_finite_gradient():
    pair = pair_of()
    for form in ('paper', 'code'):
        compare = lambda s, form=form: jnp.sum(
            value(attention(layers=['stage1'], form=form), pair._replace(student={'stage1': s}))
        )
        assert np.all(np.isfinite(jax.grad(compare)(jnp.zeros((3, 6, 6, 4)))))
        assert np.all(np.isfinite(jax.grad(compare)(pair.teacher['stage1'])))  # where the two are equal


def test_vid_s_variance_begins_as_given():
    params = vid(layers=['features'], variance=2.5).init(jax.random.key(0), pair_of())
    np.testing.assert_allclose(np.log1p(np.exp(params['layer1']['alpha'])) + 1e-5, 2.5, rtol=1e-6)


@pytest.mark.parametrize(
    ('term', 'message'),
    [
        (attention(layers=['features']), "attention compares maps .* the student's 'features' is \\[3, 8\\]"),
        (attention(layers=[['stage1', 'block1']]), "the teacher's 'block1' is \\[3, 9, 8\\]"),
        (fsp(layers=['stage1', 'narrow']), "'narrow' has 8, the teacher's 'narrow' 5"),
        (hints(layers=[['stage1', 'block1']]), "hints cannot join the student's 'stage1' \\[3, 6, 6, 4\\]"),
        (hints(layers=[['block1', 'block2']]), 'sequences of the same length'),
        (hints(layers=['narrow'], projection=False), 'channel with channel'),
        (vid(layers=[['features', 'block1']]), 'vid cannot join'),
    ],
)
def test_shapes_that_nothing_joins_are_refused(term, message):
    pair = pair_of(narrow=(3, 3, 3, 5), block2=(3, 7, 8))
    pair = pair._replace(student={**pair.student, 'narrow': pair.student['stage2']})
    with pytest.raises(UserError, match=message) as caught:
        term.init(jax.random.key(0), pair)
    assert str(caught.value).startswith('config.objective.distilled.terms: ')


@pytest.mark.parametrize(
    'make',
    [
        lambda: attention(layers=['stage1'], power=0.0),
        lambda: fsp(layers=['stage1']),
        lambda: hints(layers=['stage1'], projection=False, norm=True),
        lambda: vid(layers=['stage1'], variance=0.0),
    ],
)
def test_bad_fields_are_refused(make):
    with pytest.raises(UserError, match='config.objective.distilled.terms: '):
        make()
