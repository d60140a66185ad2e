import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.networks import model_from
from tl_jax.objectives.teachers import (
    binary_cross_entropy,
    class_imbalance,
    disagreement,
    gaussian_ramp,
    self_ensembling,
    squared,
    teacher_of,
)

PROGRESS = {'step': jnp.int32(0), 'fraction': jnp.float32(0.0)}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def compute_aug_loss(stu_logits, tea_out, *, loss, confidence_thresh, cls_balance, rampup_value=None):
    """`compute_aug_loss` of github.com/Britefury/self-ensemble-visual-domain-adapt in float64, one branch for its ramp-up."""
    stu_out, n_classes = softmax(stu_logits), tea_out.shape[1]
    robust = lambda pred, tgt: -(tgt * np.log(pred + 1e-6) + (1 - tgt) * np.log(1 - pred + 1e-6))
    aug_loss = robust(stu_out, tea_out) if loss == 'binary' else (stu_out - tea_out) ** 2
    aug_loss = aug_loss.mean(axis=1)
    equalise = robust(stu_out.mean(axis=0), 1.0 / n_classes).mean() * n_classes
    if rampup_value is not None:
        return aug_loss.mean() * rampup_value + equalise * rampup_value * cls_balance
    mask = (tea_out.max(axis=1) > confidence_thresh).astype(float)
    return (aug_loss * mask).mean() + equalise * mask.mean() * cls_balance


def slope(function, x, step=1e-6):
    """Central differences."""
    out = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[place] = step
        out[place] = (function(x + moved) - function(x - moved)) / (2 * step)
    return out


def slopes(loss):
    return jax.jit(jax.grad(loss, has_aux=True, allow_int=True))


def network(**options):
    return model_from(name='mlp', dense=[6], classes=4, dtype=jnp.float32, load=False, **options)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    draw = lambda: rng.normal(size=(16, 5)).astype(np.float32)
    return {
        'source': {'inputs': draw(), 'label': rng.integers(4, size=16)},
        'target': {'inputs': 3 + 2 * draw()},
    }


@pytest.mark.parametrize('name, compare', [('squared', squared), ('binary', binary_cross_entropy)])
@pytest.mark.parametrize('confidence', [0.0, 0.6])
def test_unsupervised_loss_and_gradient_equal_the_authors(name, compare, confidence):
    rng = np.random.default_rng(1)
    logits, teaching = rng.normal(size=(10, 5)), softmax(2 * rng.normal(size=(10, 5)))
    ours = lambda x: disagreement(jax.nn.softmax(x), jnp.float32(teaching), compare, confidence, 0.7)[0]
    theirs = lambda x: compute_aug_loss(x, teaching, loss=name, confidence_thresh=confidence, cls_balance=0.7)
    value, gradient = jax.jit(jax.value_and_grad(ours))(jnp.float32(logits))
    np.testing.assert_allclose(value, theirs(logits), rtol=1e-5)
    np.testing.assert_allclose(gradient, slope(theirs, logits), rtol=1e-3, atol=1e-6)
    assert 0 < (teaching.max(1) > confidence).mean() <= 1 and (confidence == 0 or (teaching.max(1) < confidence).any())


def test_only_confident_examples_count():
    p = jnp.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
    q = jnp.array([[0.99, 0.01], [0.5, 0.5], [0.04, 0.96]])
    value, parts = disagreement(p, q, squared, 0.965, 0.0)
    # The first alone is above 0.965: (0.49² + 0.49²) / 2 over three examples.
    np.testing.assert_allclose([value, parts['confident']], [0.49**2 / 3, 1 / 3], rtol=1e-5)


def test_class_imbalance_is_least_and_flat_at_even_predictions():
    even = jnp.full((3, 4), 0.25)
    closed = 4 * -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    value, gradient = jax.jit(jax.value_and_grad(class_imbalance))(even)
    np.testing.assert_allclose(value, closed, rtol=1e-4)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    rng = np.random.default_rng(0)
    for logits in rng.normal(size=(5, 3, 4)):
        assert class_imbalance(jnp.float32(softmax(logits))) > closed
    # It asks the mean alone to be even, not each example.
    np.testing.assert_allclose(class_imbalance(jnp.eye(4)), closed, rtol=1e-4)


def test_ramp_follows_the_gaussian():
    fractions = np.array([0.0, 0.1, 0.2, 0.4, 0.9])
    expected = [np.exp(-5), np.exp(-5 * 0.75**2), np.exp(-5 * 0.5**2), 1, 1]
    np.testing.assert_allclose(gaussian_ramp(jnp.float32(fractions), 0.4), expected, rtol=1e-5)


@pytest.mark.parametrize('options', [dict(confidence=0.0, rampup=0.4), dict(confidence=0.9, rampup=0.0)])
def test_whole_loss_equals_the_authors(batch, options):
    model = network()
    objective = self_ensembling(model, weight=3.0, class_balance=0.1, view={}, **options)
    variables = objective.init(jax.random.key(0), batch)
    variables['params']['head']['kernel'] = 3 * variables['params']['head']['kernel']
    variables['teacher']['params'] = jax.tree.map(lambda x: x + 0.1, variables['params'])
    variables['progress'] = {**PROGRESS, 'fraction': jnp.float32(0.1)}
    value, aux = jax.jit(objective.loss)(variables, batch, jax.random.key(1))

    double = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    student = double(variables['params'])
    teacher = jax.tree.map(lambda t, s: 0.99 * t + 0.01 * s, double(variables['teacher']['params']), student)

    def logits(params, x):
        dense, head = params['backbone']['dense1'], params['head']
        return np.maximum(x @ dense['kernel'] + dense['bias'], 0) @ head['kernel'] + head['bias']

    p = softmax(logits(student, batch['source']['inputs']))
    supervised = -np.mean(np.log(p[np.arange(16), batch['source']['label']]))
    unsupervised = compute_aug_loss(
        logits(student, batch['target']['inputs']),
        softmax(logits(teacher, batch['target']['inputs'])),
        loss='squared',
        confidence_thresh=options['confidence'],
        cls_balance=0.1,
        rampup_value=np.exp(-5 * 0.75**2) if options['rampup'] else None,
    )
    np.testing.assert_allclose(value, supervised + 3 * unsupervised, rtol=1e-5)
    assert 3 * unsupervised > 0.01 * supervised and (options['rampup'] or 0.1 < aux.metrics['confident'] < 1)


def test_no_gradient_goes_through_the_teacher(batch):
    objective = self_ensembling(network(), confidence=0.0, decay=0.5, view={})
    variables = {**objective.init(jax.random.key(0), batch), 'progress': PROGRESS}
    grad = lambda inputs: slopes(objective.loss)(inputs, batch, jax.random.key(1))[0]
    assert all(not leaf.any() for leaf in jax.tree.leaves(grad(variables)['teacher']))
    # A teacher that equals the student and sees the same views pulls nowhere: (p - q)² is flat there.
    plain = self_ensembling(network(), weight=0.0, view={})
    alone = slopes(plain.loss)(variables, batch, jax.random.key(1))[0]
    free = self_ensembling(network(), confidence=0.0, class_balance=0.0, decay=0.5, view={})
    pulled = slopes(free.loss)(variables, batch, jax.random.key(1))[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), alone['params'], pulled['params'])


@pytest.mark.parametrize('averaged', [False, True])
def test_teacher_follows_as_the_authors_over_steps(batch, averaged):
    """Their order: the loss with t, the update of s, then t ← α t + (1 - α) s; `fix_ema` averages statistics too."""
    model = network(dense_norm='batch')
    objective = self_ensembling(model, decay=0.9, view={}, average_statistics=averaged)
    variables = {**objective.init(jax.random.key(0), batch), 'progress': PROGRESS}
    theirs = {k: np.asarray(v, np.float64) for k, v in trees.flatten(variables['teacher']['params']).items()}
    mean = np.zeros(6)
    rng, loss = np.random.default_rng(0), jax.jit(objective.loss)
    for _ in range(5):
        teacher = theirs['backbone/dense1/kernel'], theirs['backbone/dense1/bias']
        hidden = batch['target']['inputs'] @ teacher[0] + teacher[1]
        mean = 0.9 * mean + 0.1 * hidden.mean(0)
        _, aux = loss(variables, batch, jax.random.key(1))
        variables = trees.merge(variables, aux.collections)
        moved = jax.tree.map(lambda x: x + jnp.float32(0.3 * rng.normal(size=x.shape)), variables['params'])
        variables['params'] = moved
        student = trees.flatten(moved)
        theirs = {path: 0.9 * leaf + 0.1 * np.asarray(student[path], np.float64) for path, leaf in theirs.items()}
        if averaged:
            mean = 0.9 * mean + 0.1 * np.asarray(variables['batch_stats']['backbone']['dense_norm1']['mean'])
    ours = teacher_of(variables, 0.9, averaged)
    for path, leaf in trees.flatten(ours['params']).items():
        np.testing.assert_allclose(leaf, theirs[path], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours['batch_stats']['backbone']['dense_norm1']['mean'], mean, rtol=1e-5, atol=1e-5)
    predicted = objective.predict(variables, batch['target'])['logits']
    np.testing.assert_array_equal(predicted, model.apply(ours, batch['target']['inputs'], train=False)['logits'])


def test_batch_norm_sees_each_domain_alone(batch):
    objective = self_ensembling(network(dense_norm='batch'), view={})
    variables = {**objective.init(jax.random.key(0), batch), 'progress': PROGRESS}
    _, aux = jax.jit(objective.loss)(variables, batch, jax.random.key(1))
    dense = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params']['backbone']['dense1'])
    source, target = (batch[name]['inputs'] @ dense['kernel'] + dense['bias'] for name in ('source', 'target'))
    mean, var = np.zeros(6), np.ones(6)
    for hidden in (source, target):
        mean, var = 0.9 * mean + 0.1 * hidden.mean(0), 0.9 * var + 0.1 * hidden.var(0, ddof=1)
    student = aux.collections['batch_stats']['backbone']['dense_norm1']
    np.testing.assert_allclose(student['mean'], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(student['var'], var, rtol=1e-4)
    teacher = aux.collections['teacher']['batch_stats']['backbone']['dense_norm1']
    np.testing.assert_allclose(teacher['mean'], 0.1 * target.mean(0), rtol=1e-4, atol=1e-5)


def test_statistics_that_a_stage_freezes_stay_in_both(batch):
    objective = self_ensembling(network(dense_norm='batch'), view={})
    variables = {**objective.init(jax.random.key(0), batch), 'progress': PROGRESS}
    marked = {'backbone': {'dense_norm1': {'frozen': jnp.zeros((), bool)}}}
    _, aux = jax.jit(objective.loss)(
        {**variables, 'batch_stats': trees.merge(variables['batch_stats'], marked)}, batch, jax.random.key(1)
    )
    teacher = aux.collections['teacher']
    jax.tree.map(np.testing.assert_array_equal, teacher['batch_stats'], variables['teacher']['batch_stats'])
    np.testing.assert_array_equal(aux.collections['batch_stats']['backbone']['dense_norm1']['mean'], np.zeros(6))


def test_start_makes_the_teacher_of_the_student_that_came(batch):
    objective = self_ensembling(network(), view={})
    variables = objective.init(jax.random.key(0), batch)
    trained = {**variables, 'params': jax.tree.map(lambda x: x + 1, variables['params'])}
    jax.tree.map(np.testing.assert_array_equal, objective.start(trained)['teacher']['params'], trained['params'])


def test_collections_keep_their_structure(batch):
    for model in (network(), network(dense_norm='batch')):
        objective = self_ensembling(model, view={'noise': 0.1})
        variables = {**objective.init(jax.random.key(0), batch), 'progress': PROGRESS}
        _, aux = jax.jit(objective.loss)(variables, batch, jax.random.key(1))
        after = trees.merge(variables, aux.collections)
        assert jax.tree.structure(after['teacher']) == jax.tree.structure(variables['teacher'])
        assert trees.flatten(after).keys() == trees.flatten(variables).keys()


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(decay=1.0), 'config.objective.decay: must lie'),
        (dict(confidence=1.5), 'config.objective.confidence: must lie'),
        (dict(rampup=80.0), 'config.objective.rampup: is a share of the stage'),
        (dict(view={'translate': 2.0}), 'config.objective.view.translate: unknown field.*translation'),
        (dict(source_view={'noise': -1.0}), 'view.noise: must be at least 0'),
    ],
)
def test_bad_fields_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        self_ensembling(network(), **options)


def test_end_to_end_the_teacher_follows_clusters_that_turned(tmp_path):
    """Four clusters on a circle; the target's are turned by 35 of the 45 degrees to the boundary."""
    from tl_jax.train import train_and_evaluate

    rng = np.random.default_rng(0)
    label = rng.integers(4, size=(2, 800))
    angle = label * (np.pi / 2) + np.array([[0.0], [np.deg2rad(35)]]) + 0.15 * rng.normal(size=label.shape)
    points = np.stack([np.cos(angle), np.sin(angle)], -1)
    for name, x, y in zip(('source', 'target'), points, label, strict=True):
        np.savez(tmp_path / f'{name}.npz', x_train=np.float32(x), y_train=y)
    config = dict(
        model=dict(name='mlp', dense=[32]),
        data=dict(
            train=dict(
                source=f'npz:{tmp_path}/source.npz/train',
                target=dict(spec=f'npz:{tmp_path}/target.npz/train', unlabelled=True),
            ),
            eval=f'npz:{tmp_path}/target.npz/train',
        ),
        objective=dict(name='self_ensembling', confidence=0.0, rampup=0.5, weight=10.0, view=dict(noise=0.2)),
        stages=[dict(steps=400, train=[('.*', dict(name='adam', lr=1e-2))])],
        **dict(batch_size=64, eval_batch_size=400, mesh={'data': 1}, log_every=200),
    )
    train_and_evaluate(config, tmp_path / 'run')
    figures = json.loads((tmp_path / 'run' / 'summary.json').read_text())['metrics']
    nearest = np.mean(np.argmax(points[1] @ np.array([[1, 0, -1, 0], [0, 1, 0, -1]]), 1) == label[1])
    assert figures['val/accuracy'] > nearest + 0.05, (figures, nearest)
