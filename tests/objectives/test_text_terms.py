"""Text terms in whole networks; their values, and that padding counts for nothing, stand in tests/parity/torch_terms_text.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tl_jax.errors import UserError
from tl_jax.models import create_model
from tl_jax.objectives.base import Model
from tl_jax.objectives.distillation.base import Pair
from tl_jax.objectives.distillation.distilled import PROGRESS, distilled
from tl_jax.objectives.distillation.weighted import terms_from
from tl_jax.objectives.language import mlm

TOKENS = np.array([[5, 7, 5, 3, 9], [1, 19, 2, 0, 0], [4, 6, 0, 0, 0]], np.int32)
SHALLOW = dict(width=8, depth=2, heads=2, mlp_width=8)
DEEP = dict(SHALLOW, width=12, depth=3)


def encoder(**fields):
    return create_model('bert_tiny', **dict(vocabulary=20, length=9, pool='mean', mlm_head=True) | fields)


@functools.cache
def shapes_of(**fields):
    """Endpoints of tokens, their shapes alone."""
    return jax.eval_shape(lambda: encoder(projections=True, **fields).init_with_output(jax.random.key(0), TOKENS)[0])


def test_a_masked_language_model_and_its_teacher_see_the_same_tokens_hidden():
    """A teacher that is the student itself says the same, unless it saw other tokens."""
    module = encoder(projections=True, **SHALLOW | {'depth': 1})
    model = Model(lambda key, x: dict(module.init(key, x)), module.apply, None)
    terms = [
        dict(name='token_targets', weight=5.0),
        dict(name='token_cosine', layers=['block1']),
        dict(name='minilm', layer='block1'),
    ]
    objective = mlm(model, vocabulary=20, mask_id=19, special=[0, 1], rate=0.4)
    facts = dict(num_classes=2, class_names='ab', num_examples={'train': 3})
    taught = distilled(objective, model=model, **facts, terms=terms, label_weight=2.0)
    batch = {'train': {'tokens': jnp.asarray(TOKENS)}}
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32)
    variables = jax.tree.map(draw, jax.eval_shape(objective.init, jax.random.key(0), batch))
    teacher = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    ask = jax.jit(
        lambda own, teacher, key: (
            taught.loss({**own, 'teacher': teacher, **PROGRESS}, batch, key),
            objective.loss(own, batch, key)[0],
        )
    )
    (value, aux), plain = ask(variables, variables, jax.random.key(3))
    for term in terms:
        np.testing.assert_allclose(aux.metrics[term['name']], 0, atol=1e-5)
    np.testing.assert_allclose(value, 2 * plain, rtol=1e-5)
    (value, aux), plain = ask(variables, teacher, jax.random.key(3))
    parts = {term['name']: float(aux.metrics[term['name']]) for term in terms}
    assert all(part > 1e-4 for part in parts.values()), parts
    total = 2 * plain + 5 * parts['token_targets'] + parts['token_cosine'] + parts['minilm']
    np.testing.assert_allclose(value, total, rtol=1e-5)


def test_projections_make_the_attention_of_the_network():
    """Softmax of scaled products of the endpoints, in float64, of the text of two tokens."""
    model, seen = encoder(projections=True, **SHALLOW), {}

    def look(run, args, kwargs, context):
        y = run(*args, **kwargs)
        seen['/'.join(context.module.path)] = y
        return y

    def run(variables):
        with nn.intercept_methods(look):
            return model.apply(variables, TOKENS), seen['backbone/block2/attention']

    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    endpoints, found = jax.jit(run)(variables)
    q, k, v = (np.asarray(endpoints[f'block2_{part}'][2, :2], np.float64) for part in ('query', 'key', 'value'))
    weights = np.exp(np.einsum('qhd,khd->hqk', q, k) / 2)
    y = np.einsum('hqk,khd->qhd', weights / weights.sum(-1, keepdims=True), v).reshape(2, 8)
    out = variables['params']['backbone']['block2']['attention']['out']
    expected = y @ np.asarray(out['kernel'], np.float64) + out['bias']
    np.testing.assert_allclose(found[2, :2], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(endpoints['mask'], TOKENS > 0)
    plain = jax.eval_shape(lambda: encoder(**SHALLOW).init_with_output(jax.random.key(0), TOKENS)[0])
    assert set(endpoints) - set(plain) == {f'block{i}_{part}' for i in (1, 2) for part in ('query', 'key', 'value')}


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        (dict(name='token_cosine', layers=['block1']), "the student's 'block1' has 8, the teacher's 'block1' 12"),
        (
            dict(name='token_cosine', layers=['features']),
            r"compares tokens, \[3, 5\] of them, and the student's 'features'",
        ),
        (dict(name='hidden_states', layers=['mlm_logits', 'block1']), 'one projection, and its layers differ in width'),
        (
            dict(name='hidden_states', layers=['block1'], projection=False),
            'hidden_states without a projection compares',
        ),
        (dict(name='attention_scores', layers=['block1']), "the student's 'block1_query' has 2, the teacher's .* 4"),
        (dict(name='minilm', layer='block1'), "the student's 'block1_query' has 2, the teacher's 'block1_query' 4"),
        (dict(name='minilm', layer='block1', heads=3), "heads: 3 do not divide the student's width 8"),
        (dict(name='minilm', layer='block1', heads=-1), 'heads must be a count'),
        (dict(name='minilm', layer='block1', relations=['qx']), "a list of pairs such as 'qk' and 'vv'"),
        (dict(name='token_targets', temperature=0.0), 'temperature must be above 0'),
        (dict(name='token_targets', teacher='block1'), 'both must tell the same tokens of one vocabulary'),
        (dict(name='token_targets', student='features', teacher='features'), 'both must tell|knows no padding'),
    ],
)
def test_what_does_not_fit_is_refused(section, message):
    student, teacher = shapes_of(**SHALLOW), shapes_of(**DEEP | {'heads': 4})
    with pytest.raises(UserError, match=message):
        terms_from([section], {})[0].term.init(jax.random.key(0), Pair(student, teacher, {}))
