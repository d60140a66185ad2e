"""Two towers: losses and gradients against open_clip's and float64, recall against brute force, and whole runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tl_jax.errors import UserError
from tl_jax.networks import model_from
from tl_jax.objectives.contrastive import (
    clamp,
    clip_loss,
    contrastive,
    fingerprint,
    positive_pairs,
    retrieval_figures,
    siglip_loss,
    unit,
)
from tl_jax.trees import flatten


def network(name, num_classes, **fields):
    return model_from(name=name, num_classes=num_classes, classes=10, dtype=jnp.float32, load=False, **fields)


def towers(**fields):
    text = network('text_bag', 6, vocabulary=30, width=8, dense=[8])
    return contrastive(network('convnet', 6, widths=[4], norm='batch'), text=text, **fields)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 30, (8, 5)).astype(np.int32)
    tokens[3], tokens[6] = tokens[1], tokens[2]
    label = np.array([0, 1, 2, 1, 0, 3, 2, 4], np.int32)
    return {'train': {'image': rng.random((8, 6, 6, 1), np.float32), 'other_tokens': tokens, 'label': label}}


# From torch 2.13 in float64, with open_clip's ClipLoss and SigLipLoss (rank 0 of 1) written out:
#   rng = np.random.default_rng(0); a, b = (torch.tensor(rng.normal(size=(5, 3)), requires_grad=True) for _ in range(2))
#   x, y, scale, bias = F.normalize(a), F.normalize(b), 2.0 or 1.5 (exp of them), -2.5
#   clip = (F.cross_entropy(e**2 * x @ y.T, arange(5)) + F.cross_entropy(e**2 * y @ x.T, arange(5))) / 2
#   siglip = -F.logsigmoid((2 * eye(5) - 1) * (e**1.5 * x @ y.T - 2.5)).sum() / 5
# each: the loss, the sums of the gradients' absolute values for a and b, the gradients of log_scale (and bias).
GOLDEN = {
    'clip': (7.3657531479, 7.9373748654, 9.9635779789, 6.9010549987),
    'siglip': (5.6180630118, 4.8434009310, 5.4076035114, 5.0244296345, 0.3229079746),
}


@pytest.mark.parametrize('name', GOLDEN)
def test_losses_and_gradients_are_open_clips(name):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(5, 3)), jnp.float32) for _ in range(2))
    together = jnp.eye(5, dtype=bool)

    def clip(a, b, log_scale):
        return clip_loss(unit(a), unit(b), jnp.exp(log_scale), together)

    def siglip(a, b, log_scale, bias):
        return siglip_loss(unit(a), unit(b), jnp.exp(log_scale), bias, together)

    function, arguments = {'clip': (clip, (2.0,)), 'siglip': (siglip, (1.5, -2.5))}[name]
    value, grads = jax.jit(jax.value_and_grad(function, tuple(range(2 + len(arguments)))))(a, b, *arguments)
    got = [value, *(jnp.abs(g).sum() for g in grads[:2]), *grads[2:]]
    np.testing.assert_allclose(got, GOLDEN[name], rtol=2e-5)


@pytest.mark.parametrize('name', ['clip', 'siglip'])
def test_several_positives_against_float64(name):
    """UniCL's equations 3 and 4, and SigLIP's with more than one z_ij = 1 a row, as plain sums over pairs."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 6, 4))
    label = np.array([0, 1, 0, 2, 1, 0])
    scale, bias = 4.0, -1.0

    def reference(a, b):
        x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
        total = 0.0
        for i in range(6):
            own = [j for j in range(6) if label[j] == label[i]]
            for p, q in ((x, y), (y, x)) if name == 'clip' else ():
                for k in own:
                    share = np.exp(scale * p[i] @ q[k]) / sum(np.exp(scale * p[i] @ q[j]) for j in range(6))
                    total -= np.log(share) / len(own) / 2 / 6
            for j in range(6) if name == 'siglip' else ():
                sign = 1 if j in own else -1
                total += np.log1p(np.exp(-sign * (scale * x[i] @ y[j] + bias))) / 6
        return total

    together = jnp.asarray(label[:, None] == label)

    def ours(a, b):
        if name == 'clip':
            return clip_loss(unit(a), unit(b), jnp.float32(scale), together)
        return siglip_loss(unit(a), unit(b), jnp.float32(scale), jnp.float32(bias), together)

    value, grad = jax.jit(jax.value_and_grad(ours))(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(value, reference(a, b), rtol=1e-5)
    expected = np.empty_like(a)
    for place in np.ndindex(a.shape):
        step = np.zeros_like(a)
        step[place] = 1e-5
        expected[place] = (reference(a + step, b) - reference(a - step, b)) / 2e-5
    np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-5)


def test_what_belongs_together(batch):
    fields = batch['train']
    tokens, label = fields['other_tokens'], fields['label']
    np.testing.assert_array_equal(positive_pairs(fields, 'pair'), np.eye(8, dtype=bool))
    captions = np.array([[np.array_equal(p, q) for q in tokens] for p in tokens])
    assert captions.sum() == 12
    np.testing.assert_array_equal(positive_pairs(fields, 'caption'), captions)
    np.testing.assert_array_equal(positive_pairs(fields, 'class'), label[:, None] == label)


def test_fingerprints_tell_inputs_apart():
    rng = np.random.default_rng(0)
    binary = rng.integers(0, 2, (4000, 12)).astype(np.float32)
    for inputs in (binary, binary.astype(np.int32), rng.random((50, 4, 4, 1), np.float32)):
        ids = np.asarray(jax.jit(fingerprint)(inputs))
        assert ids.dtype == np.uint32 and ids.shape == (len(inputs), 2)
        flat = inputs.reshape(len(inputs), -1)
        _, which = np.unique(flat, axis=0, return_inverse=True)
        _, found = np.unique(ids, axis=0, return_inverse=True)
        assert len(set(zip(which.ravel(), found.ravel(), strict=True))) == which.max() + 1 == found.max() + 1
        np.testing.assert_array_equal(jax.jit(fingerprint)(inputs[7:9]), ids[7:9])


def test_the_scale_stays_at_its_bound_and_can_return(batch):
    slope = lambda value, sign: jax.value_and_grad(lambda v: sign * clamp(v, 2.0))(value)
    for value, sign, expected in ((1.0, -1.0, (-1.0, -1.0)), (2.5, -1.0, (-2.0, 0.0)), (2.5, 1.0, (2.0, 1.0))):
        np.testing.assert_allclose(slope(value, sign), expected)
    objective = towers()
    variables = objective.init(jax.random.key(0), batch)
    variables['params']['temperature']['log_scale'] = jnp.float32(7.0)
    _, aux = jax.jit(objective.loss)(variables, batch, jax.random.key(1))
    np.testing.assert_allclose(aux.metrics['scale'], 100, rtol=1e-6)


@pytest.mark.parametrize('name', ['clip', 'siglip'])
def test_roles_start_and_what_each_loss_moves(name, batch):
    objective = towers(loss=name, positives='class')
    variables = objective.init(jax.random.key(0), batch)
    assert set(variables['params']) == {'backbone', 'head', 'text', 'temperature'}
    assert set(variables['params']['text']) == {'backbone', 'head'}
    start = {'clip': {'log_scale': np.log(1 / 0.07)}, 'siglip': {'log_scale': np.log(10), 'bias': -10}}[name]
    assert variables['params']['temperature'] == pytest.approx(start)

    def loss(params):
        return objective.loss({**variables, 'params': params}, batch, jax.random.key(1))

    (value, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])
    assert np.isfinite(value) and set(aux.metrics) == {'accuracy', 'scale'}
    still = {path for path, grad in flatten(grads).items() if not np.abs(grad).max() > 0}
    assert not still
    assert set(aux.collections['batch_stats']) == {'backbone'}
    before, after = variables['batch_stats'], aux.collections['batch_stats']
    assert any(not np.allclose(x, y) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_loss_is_that_of_the_embeddings(batch):
    """The whole objective: its loss is the formula's of the two towers' outputs in training mode."""
    objective = towers(positives='caption')
    variables = objective.init(jax.random.key(0), batch)
    variables['params']['temperature']['log_scale'] = jnp.float32(1.2)
    value, aux = jax.jit(objective.loss)(variables, batch, jax.random.key(1))
    image = network('convnet', 6, widths=[4], norm='batch')
    text = network('text_bag', 6, vocabulary=30, width=8, dense=[8])
    train = lambda net, v, x: jax.jit(lambda v, x: net.apply(v, x, train=True, mutable=['batch_stats'])[0])(v, x)
    first = train(image, variables, batch['train']['image'])
    second = train(text, {'params': variables['params']['text']}, batch['train']['other_tokens'])
    x, y = (np.asarray(e['logits'], np.float64) for e in (first, second))
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    tokens = batch['train']['other_tokens']
    p = (tokens[:, None] == tokens).all(-1)
    logits = np.exp(1.2) * x @ y.T
    ways = [
        -np.mean(np.sum(q / q.sum(1, keepdims=True) * (s - np.log(np.exp(s).sum(1, keepdims=True))), 1))
        for s, q in ((logits, p), (logits.T, p.T))
    ]
    np.testing.assert_allclose(value, np.mean(ways), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics['accuracy'], p[np.arange(8), logits.argmax(1)].mean())


@pytest.mark.parametrize('name', ['clip', 'siglip'])
def test_any_mesh_gives_the_same(name, batch):
    """A batch split over eight devices has the negatives of the whole batch."""
    objective = towers(loss=name, positives='class')
    variables = jax.tree.map(np.asarray, objective.init(jax.random.key(0), batch))

    def loss(params, variables, batch):
        return objective.loss({**variables, 'params': params}, batch, jax.random.key(1))[0]

    results = []
    for count in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:count]), ('data',))
        rows, everywhere = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
        placed = jax.device_put(batch, rows), jax.device_put(variables, everywhere)
        results.append(jax.jit(jax.value_and_grad(loss))(placed[1]['params'], placed[1], placed[0]))
    (one, grads), (eight, sharded) = results
    np.testing.assert_allclose(one, eight, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


def brute_force(predictions, k):
    """Recall both ways, by sets of what each distinct input occurred with, and by sorting, ties the worst way."""
    keys = [[tuple(i) for i in predictions[name]] for name in ('identity', 'other_identity')]
    vectors = [predictions['embedding'], predictions['other_embedding']]
    found = []
    for own, other in ((0, 1), (1, 0)):
        partners, query, candidate = {}, {}, {}
        for n, (key, partner) in enumerate(zip(keys[own], keys[other], strict=True)):
            partners.setdefault(key, set()).add(partner)
            query.setdefault(key, vectors[own][n])
            candidate.setdefault(partner, vectors[other][n])
        hits = []
        for key, vector in query.items():
            ranked = sorted(candidate, key=lambda c, v=vector, o=partners[key], m=candidate: (-float(v @ m[c]), c in o))
            hits.append(bool(partners[key] & set(ranked[:k])))
        found.append(np.mean(hits))
    return found


@pytest.mark.parametrize('texts', [40, 12])
def test_recall_against_brute_force(texts):
    """With repeats of both inputs, and embeddings on a grid, so that many similarities are exactly equal."""
    rng = np.random.default_rng(texts)
    text, image = rng.integers(0, texts, 60), rng.integers(0, 45, 60)
    grid = lambda n: rng.integers(-2, 3, (n, 4)).astype(np.float32)
    text_vectors = grid(texts)
    image_vectors = grid(45) + 2 * text_vectors[rng.integers(0, texts, 45)]
    image_vectors[image] += text_vectors[text]
    predictions = {
        'identity': np.stack([image, image * 7], 1).astype(np.uint32),
        'other_identity': np.stack([text % 3, text], 1).astype(np.uint32),
        'embedding': image_vectors[image],
        'other_embedding': text_vectors[text],
    }
    figures = retrieval_figures(predictions)
    assert set(figures) == {f'{way}_text_recall@{k}' for way in ('to', 'from') for k in (1, 5, 10)}
    for k in (1, 5, 10):
        expected = brute_force(predictions, k)
        assert (figures[f'to_text_recall@{k}'], figures[f'from_text_recall@{k}']) == pytest.approx(expected)
        assert k > 1 or 0 < min(expected) <= max(expected) < 1


def test_recall_by_class_takes_any_text_of_the_class():
    text, image = np.array([0, 1, 2, 3]), np.arange(4)
    predictions = {
        'identity': np.stack([image, image], 1).astype(np.uint32),
        'other_identity': np.stack([text, text], 1).astype(np.uint32),
        'embedding': np.eye(4, dtype=np.float32)[[1, 0, 0, 3]],  # of text 1, 0, 0 and 3
        'other_embedding': np.eye(4, dtype=np.float32),
        'label': np.array([5, 5, 9, 9]),
    }
    assert retrieval_figures(predictions)['to_text_recall@1'] == 0.25
    figures = retrieval_figures(predictions, by_class=True)
    assert figures['to_text_recall@1'] == 0.75  # image 2 finds a text of the other class
    # Text 0 is as near to image 2 as to image 1, text 1 is nearest to image 0, text 3 to image 3; text 2 ties with all.
    assert figures['from_text_recall@1'] == 0.5


def test_a_collapsed_network_finds_nothing():
    ids = np.stack([np.arange(20)] * 2, 1).astype(np.uint32)
    same = np.ones((20, 3), np.float32)
    predictions = dict(identity=ids, other_identity=ids, embedding=same, other_embedding=same, label=np.arange(20) % 4)
    assert set(retrieval_figures(predictions).values()) == {0.0}


def test_zero_shot_accuracy():
    """Three classes, the first of which has two texts, one of them rare: its embedding is the mean of both."""
    texts = np.array([[1, 0], [0, 1], [-0.6, 0.8], [-1, 0]], np.float32)
    label, text = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 2, 2, 3])
    embedding = np.array([[0.6, 0.8], [1, 0], [0, 1], [-0.6, 0.8], [0.8, 0.6], [-1, 0]], np.float32)
    predictions = {
        'identity': np.stack([np.arange(6)] * 2, 1).astype(np.uint32),
        'other_identity': np.stack([text, text], 1).astype(np.uint32),
        'embedding': embedding,
        'other_embedding': texts[text],
        'label': label,
    }
    classes = np.array([[np.sqrt(0.5), np.sqrt(0.5)], [-0.6, 0.8], [-1, 0]])
    expected = np.mean((embedding @ classes.T).argmax(1) == label)
    assert 0 < expected < 1
    assert retrieval_figures(predictions)['zero_shot_accuracy'] == pytest.approx(expected)


def test_refusals(batch):
    single = {'train': {'image': batch['train']['image']}}
    with pytest.raises(UserError, match="stream 'train' has no second view"):
        towers().init(jax.random.key(0), single)
    unlabelled = {'train': {k: v for k, v in batch['train'].items() if k != 'label'}}
    with pytest.raises(UserError, match="positives: 'class' needs labels, and stream 'train' has none"):
        towers(positives='class').init(jax.random.key(0), unlabelled)
    text = network('text_bag', 5, vocabulary=30)
    with pytest.raises(UserError, match=r'its output has width 5, the first tower’s 6; give config.model'):
        contrastive(network('lenet', 6, widths=[4], dense=[]), text=text).init(jax.random.key(0), batch)


def run(config, folder):
    from tl_jax.train import train_and_evaluate

    train_and_evaluate(config, folder)
    return json.loads((folder / 'summary.json').read_text())['metrics']


NAMES = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
ADAM = dict(name='adam', lr=3e-3)


def test_digits_find_their_names(digits_config, tmp_path):
    """A whole run on scikit-learn's digits: 600 images and the ten words; chance is 0.1."""
    pairs = lambda part: dict(spec=f'pairs:sklearn:digits/{part}', captions=NAMES, length=6)
    config = digits_config(
        model=dict(name='mlp', dense=[64], num_classes=16),
        objective=dict(
            name='contrastive',
            positives='class',
            text=dict(name='text_bag', num_classes=16, vocabulary=257, dense=[32]),
        ),
        stages=[dict(steps=80, train=[('.*', ADAM)])],
        batch_size=64,
    )
    config['data'] |= dict(train=pairs('train'), eval=pairs('val'))
    metrics = run(config, tmp_path / 'run')
    assert metrics['val/zero_shot_accuracy'] > 0.7
    assert metrics['val/to_text_recall@1'] == pytest.approx(metrics['val/zero_shot_accuracy'])  # one text a class
    assert metrics['val/to_text_recall@10'] == 1


def test_lit_trains_the_text_tower_and_loads_the_other(digits_config):
    from safetensors.numpy import load_file

    from tl_jax.config import resolve
    from tl_jax.experiment import build
    from tl_jax.pretrained.sources import SHIPPED

    text = dict(name='text_bag', num_classes=576, vocabulary=257, dense=[32])
    place = [dict(name='resize', size=[20, 20]), dict(name='pad', padding=4), 'to_float']
    config = digits_config(
        model=dict(
            name='convnet',
            widths=[16, 32, 64],
            num_classes=0,
            source='shipped:mnist_convnet',
            ignore=['params/head/.*'],
        ),
        data=dict(train=dict(spec='pairs:sklearn:digits/train', captions=NAMES, length=6), train_transform=place),
        objective=dict(name='contrastive', positives='class', text=text),
        stages=[dict(steps=2, train=[('text/.*|temperature/.*', ADAM)])],
    )
    experiment = build(resolve(config))
    params = experiment.stages[0].init(jax.random.key(0), experiment.batch)['params']
    assert set(params) == {'backbone', 'text', 'temperature'}
    trainable = experiment.partition(0, params).trainable
    assert set(trainable) == {path for path in flatten(params) if not path.startswith('backbone')}
    stored = load_file(SHIPPED / 'mnist_convnet.safetensors')
    for path, leaf in flatten(params['backbone']).items():
        np.testing.assert_array_equal(leaf, stored[f'params/backbone/{path}'])


def test_sentences_find_their_translations(digits_config, tmp_path):
    """A made-up language, each of whose words is an English one spelt backwards; 150 sentences held out."""
    rng = np.random.default_rng(0)
    words = [''.join(rng.choice(list('abcdefgh'), 5)) for _ in range(60)]
    lines = [' '.join(rng.choice(words, 6)) for _ in range(750)]
    (tmp_path / 'text.a').write_text('\n'.join(lines))
    (tmp_path / 'text.b').write_text('\n'.join(' '.join(w[::-1] for w in line.split()) for line in lines))
    spec = f'bitext:{tmp_path}/text.{{a,b}}'
    part = lambda span: dict(spec=spec + span, tokenizer=dict(name='hashed', vocabulary=500), length=8)
    tower = dict(name='text_bag', vocabulary=500, width=32, dense=[])
    config = digits_config(
        model=dict(tower, num_classes=32),
        data=dict(train=part('[:600]'), eval=part('[600:]')),
        objective=dict(name='contrastive', text=dict(tower, num_classes=32)),
        stages=[dict(steps=100, train=[('.*', dict(name='adam', lr=1e-2))])],
        batch_size=100,
    )
    metrics = run(config, tmp_path / 'run')
    assert metrics['val/to_text_recall@1'] > 0.5 and metrics['val/from_text_recall@1'] > 0.5
    assert 'val/zero_shot_accuracy' not in metrics
