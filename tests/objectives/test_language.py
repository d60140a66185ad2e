"""Objectives of texts against their formulas in float64 numpy, scipy and scikit-learn's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from tl_jax.errors import UserError
from tl_jax.evaluate import _collect
from tl_jax.models import create_model
from tl_jax.objectives.base import Model
from tl_jax.objectives.language import causal_lm, correlation, mask_tokens, mlm, regression, token_labelling

RNG = np.random.default_rng(0)
BERT = dict(vocabulary=50, length=12, width=8, depth=1, heads=2, mlp_width=16, pool='mean')
TOKENS = np.where(np.arange(12) < np.array([[12], [7], [3]]), RNG.integers(5, 50, (3, 12)), 0).astype(np.int32)
TOKENS[:, 0] = 2


def model_of(name, num_classes=None, **fields):
    module = create_model(name, num_classes=num_classes, **fields)

    def classify(variables, features, *, train=False, rngs=None):
        return module.apply(variables, features, train, rngs=rngs, method='classify')

    return Model(module.init, module.apply, classify)


def random_values(variables):
    leaves, tree = jax.tree.flatten(variables)
    return jax.tree.unflatten(tree, [jnp.asarray(RNG.normal(0, 0.3, leaf.shape), jnp.float32) for leaf in leaves])


def nats_of(logits, label):
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
    return -np.take_along_axis(log_p, np.asarray(label)[..., None], -1)[..., 0]


def test_masks_are_as_the_paper_says():
    tokens = jnp.asarray(RNG.integers(5, 1000, (40,)), jnp.int32)
    candidate = jnp.arange(40) < 30
    draw = jax.vmap(lambda key: mask_tokens(key, tokens, candidate, rate=0.15, mask_id=4, vocabulary=1000))
    masked = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), 4000)))
    assert masked.places.shape == (4000, 6)  # 15 % of 40: the most that fit
    assert (masked.real.sum(1) == 4).all()  # of 30, rounded to even
    assert (masked.places[masked.real] < 30).all()
    assert (masked.target == np.asarray(tokens)[masked.places]).all()
    shown = np.take_along_axis(masked.tokens, masked.places, 1)[masked.real]
    target = masked.target[masked.real]
    shares = [(shown == 4).mean(), (shown == target).mean()]
    np.testing.assert_allclose(shares, [0.8, 0.1], atol=0.01)
    counts = np.bincount(masked.places[masked.real], minlength=30)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    untouched = np.ones_like(masked.tokens, bool)
    np.put_along_axis(untouched, masked.places, ~masked.real, 1)
    assert (masked.tokens == np.asarray(tokens))[untouched].all()
    short = mask_tokens(jax.random.key(1), tokens, jnp.arange(40) == 7, rate=0.15, mask_id=4, vocabulary=1000)
    assert short.real.tolist() == [True] + [False] * 5 and short.places[0] == 7  # at least one


def test_mlm_is_the_cross_entropy_at_the_hidden_places():
    model = model_of('bert_tiny', mlm_head=True, **BERT)
    objective = mlm(model, vocabulary=50, mask_id=4, special=[0, 2, 3], rate=0.3)
    batch = {'train': {'tokens': TOKENS}}
    variables = random_values(objective.init(jax.random.key(0), batch))
    key = jax.random.key(5)
    loss, aux = jax.jit(objective.loss)(variables, batch, key)
    draw, _ = jax.random.split(key)
    apply, predict = jax.jit(functools.partial(model.apply, train=False)), jax.jit(objective.predict)
    nats, hits = [], []
    for row, k in zip(TOKENS, jax.random.split(draw, 3), strict=True):
        hidden = mask_tokens(k, jnp.asarray(row), ~np.isin(row, [0, 2, 3]), rate=0.3, mask_id=4, vocabulary=50)
        # All logits of the whole text, in place of those gathered ahead of the head.
        logits = apply(variables, hidden.tokens[None])['mlm_logits'][0]
        for place in np.asarray(hidden.places)[np.asarray(hidden.real)]:
            nats.append(nats_of(logits[place], row[place]))
            hits.append(int(np.argmax(logits[place])) == row[place])
    assert len(nats) == 3 + 2 + 1  # 0.3 of 11, 6 and 2
    assert loss == pytest.approx(np.mean(nats), rel=1e-5) and aux.metrics['accuracy'] == pytest.approx(np.mean(hits))
    rows = [
        {
            **predict(variables, {'tokens': TOKENS[i : i + 1], 'index': np.array([i])}),
            'mask': [1],
            'index': [i],
        }
        for i in range(3)
    ]
    alone = objective.figures({k: np.concatenate([np.asarray(r[k]) for r in rows]) for k in ('nats', 'hits', 'count')})
    whole = predict(variables, {'tokens': TOKENS, 'index': np.arange(3)})
    together = objective.figures({k: np.asarray(v) for k, v in whole.items()})
    assert alone == pytest.approx(together, rel=1e-6) and together['perplexity'] == pytest.approx(
        np.exp(together['loss'])
    )
    with pytest.raises(UserError, match=r'gives no mlm_logits; set mlm_head=True'):
        plain = mlm(model_of('bert_tiny', **BERT), vocabulary=50, mask_id=4, special=[0])
        plain.loss(plain.init(jax.random.key(0), batch), batch, key)


def test_causal_lm_tells_each_next_token():
    model = model_of('gpt2', vocabulary=50, length=12, width=8, depth=1, heads=2)
    objective = causal_lm(model)
    real = np.arange(12) < np.array([[12], [7], [3]])
    batch = {'train': {'tokens': TOKENS, 'token_mask': real}}
    variables = random_values(objective.init(jax.random.key(0), batch))
    logits = np.asarray(model.apply(variables, {'tokens': TOKENS, 'mask': real}, train=False)['lm_logits'])
    nats = nats_of(logits[:, :-1], TOKENS[:, 1:])
    loss, aux = jax.jit(objective.loss)(variables, batch, jax.random.key(1))
    assert loss == pytest.approx(nats[real[:, 1:]].mean(), rel=1e-5)
    assert aux.metrics['accuracy'] == np.float32((logits[:, :-1].argmax(-1) == TOKENS[:, 1:])[real[:, 1:]].mean())
    found = {k: np.asarray(v) for k, v in objective.predict(variables, batch['train']).items()}
    assert objective.figures(found)['loss'] == pytest.approx(float(loss), rel=1e-6)
    assert found['count'].tolist() == [11, 6, 2]
    padded = model_of('gpt2', vocabulary=50, length=12, width=8, depth=1, heads=2, pad_id=0)
    unmasked = {'train': {'tokens': TOKENS * real}}  # a tokenizer whose padding is a token of its own
    alone, _ = causal_lm(padded, pad_id=0).loss(variables, unmasked, jax.random.key(1))
    assert alone == pytest.approx(float(loss), rel=1e-5)


def test_token_labelling_by_the_head_on_each_word():
    names = ('O', 'B-PER', 'I-PER')
    model = model_of('bert_tiny', num_classes=3, **BERT)
    objective = token_labelling(model, num_classes=3, class_names=names)
    label = np.where((np.arange(12) % 2 == 1) & (TOKENS > 0), RNG.integers(0, 3, (3, 12)), -1).astype(np.int32)
    batch = {'train': {'tokens': TOKENS, 'token_label': label}}
    variables = random_values(objective.init(jax.random.key(0), batch))
    hidden = np.asarray(model.apply(variables, TOKENS, train=False)['block1'], np.float64)
    head = {k: np.asarray(v, np.float64) for k, v in variables['params']['head'].items()}
    logits = hidden @ head['kernel'] + head['bias']
    loss, _ = jax.jit(objective.loss)(variables, batch, jax.random.key(1))
    expected = nats_of(logits, np.maximum(label, 0))[label >= 0].mean()
    assert loss == pytest.approx(expected, rel=1e-5)
    # Two batches of two widths, as buckets give them.
    rows = []
    for part, width in ((slice(0, 1), 12), (slice(1, 3), 8)):
        fields = {'tokens': TOKENS[part, :width], 'token_label': label[part, :width]}
        outputs = {k: np.asarray(v) for k, v in objective.predict(variables, fields).items()}
        rows.append({**outputs, 'mask': np.ones(len(outputs['nats'])), 'index': np.arange(3)[part]})
    figures = objective.figures(_collect(rows))
    assert figures['loss'] == pytest.approx(expected, rel=1e-5)
    assert figures['accuracy'] == pytest.approx((logits.argmax(-1) == label)[label >= 0].mean())
    assert {'f1', 'precision', 'recall'} < figures.keys()
    with pytest.raises(UserError, match='has none; take away its `unlabelled`'):
        objective.loss(variables, {'train': {'tokens': TOKENS}}, jax.random.key(1))


def test_regression():
    model = model_of('bert_tiny', num_classes=1, **BERT)
    objective = regression(model)
    target = np.array([2.5, -1.0, 0.3], np.float32)
    batch = {'train': {'tokens': TOKENS, 'segments': (TOKENS % 2).astype(np.int32), 'target': target}}
    variables = random_values(objective.init(jax.random.key(0), batch))
    ours = objective.predict(variables, batch['train'])['predicted']
    loss, _ = jax.jit(objective.loss)(variables, batch, jax.random.key(1))
    assert loss == pytest.approx(np.mean((np.asarray(ours, np.float64) - target) ** 2), rel=1e-5)
    plain = objective.predict(variables, {'tokens': TOKENS, 'target': target})['predicted']
    assert np.abs(ours - plain).max() > 1e-3, 'segments reach the model'
    x, y = RNG.normal(size=50).round(1), RNG.normal(size=50).round(1)  # with ties
    figures = objective.figures({'predicted': x, 'target': y})
    assert figures['mse'] == pytest.approx(np.mean((x - y) ** 2))
    assert figures['pearson'] == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert figures['spearman'] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert correlation(np.ones(3), np.arange(3.0)) == 0
    wide = regression(model_of('bert_tiny', num_classes=2, **BERT))
    with pytest.raises(UserError, match=r'num_classes: a number is predicted by a head of 1, not 2'):
        wide.loss(wide.init(jax.random.key(0), batch), batch, jax.random.key(1))
    with pytest.raises(UserError, match="target='score'"):
        objective.init(jax.random.key(0), {'train': {'tokens': TOKENS}})
    with pytest.raises(UserError, match='has none; take away its `unlabelled`'):
        objective.predict(variables, {'tokens': TOKENS})
