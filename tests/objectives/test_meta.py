import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import objectives, trees
from tl_jax.errors import UserError
from tl_jax.networks import model_from
from tl_jax.objectives import Model
from tl_jax.train import train_and_evaluate

TASKS, SHOTS, QUERIES, DIM = 3, 4, 6, 2


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def tasks(seed=0, dim=DIM):
    rng = np.random.default_rng(seed)
    shape = {'support': SHOTS, 'query': QUERIES}
    fields = {f'{part}_inputs': rng.normal(size=(TASKS, n, dim)) for part, n in shape.items()}
    fields |= {f'{part}_target': rng.normal(size=(TASKS, n, 1)) for part, n in shape.items()}
    return fields


def linear_model():
    """y = x w, one leaf."""

    def init(key, inputs):
        return {'params': {'head': {'kernel': jax.random.normal(key, (inputs.shape[-1], 1))}}}

    def apply(variables, inputs, *, train, mutable=(), rngs=None):
        return {'logits': inputs @ variables['params']['head']['kernel']}, {}

    return Model(init, apply)


def network():
    """y = tanh(x a) b, with a role for each; infinitely differentiable, so that finite differences are exact."""

    def init(key, inputs):
        a, b = (
            jax.random.normal(k, s) for k, s in zip(jax.random.split(key), [(inputs.shape[-1], 5), (5, 1)], strict=True)
        )
        return {'params': {'backbone': {'kernel': a}, 'head': {'kernel': b}}}

    def apply(variables, inputs, *, train, mutable=(), rngs=None):
        features = jnp.tanh(inputs @ variables['params']['backbone']['kernel'])
        return {'features': features, 'logits': features @ variables['params']['head']['kernel']}, {}

    return Model(init, apply)


def meta_gradient(objective, variables, fields):
    def loss(params):
        return objective.loss({**variables, 'params': params}, {'train': fields}, jax.random.key(0))[0]

    return jax.jit(jax.value_and_grad(loss))(variables['params'])


def by_hand(w, fields, lr, steps, first_order):
    """Linear regression: each inner step is w - lr 2/n Xᵀ(Xw - y), with the Jacobian I - lr 2/n XᵀX."""
    loss, gradient = 0, 0
    for task in range(TASKS):
        x, y, xq, yq = (fields[name][task] for name in (
            'support_inputs', 'support_target', 'query_inputs', 'query_target'))  # fmt: skip
        adapted, jacobian = w.copy(), np.eye(len(w))
        for _ in range(steps):
            adapted = adapted - lr * 2 / SHOTS * x.T @ (x @ adapted - y)
            jacobian = (np.eye(len(w)) - lr * 2 / SHOTS * x.T @ x) @ jacobian
        loss += np.mean((xq @ adapted - yq) ** 2) / TASKS
        at_query = 2 / QUERIES * xq.T @ (xq @ adapted - yq)
        gradient += (at_query if first_order else jacobian.T @ at_query) / TASKS
    return loss, gradient


@pytest.mark.parametrize('first_order', [False, True])
@pytest.mark.parametrize('steps', [0, 1, 3])
def test_meta_gradient_is_the_closed_form_of_linear_regression(steps, first_order):
    fields = tasks()
    objective = objectives.OBJECTIVES['maml'](linear_model(), inner_lr=0.2, inner_steps=steps, first_order=first_order)
    variables = objective.init(jax.random.key(1), {'train': fields})
    value, grads = meta_gradient(objective, variables, fields)
    loss, gradient = by_hand(np.asarray(variables['params']['head']['kernel']), fields, 0.2, steps, first_order)
    np.testing.assert_allclose(value, loss, rtol=1e-12)
    np.testing.assert_allclose(grads['head']['kernel'], gradient, rtol=1e-10)


@pytest.mark.parametrize('fields', [{}, {'learn_lr': True}, {'inner_rule': 'head/.*'}], ids=str)
def test_meta_gradient_is_the_finite_difference(fields):
    batch = tasks(2)
    objective = objectives.OBJECTIVES['maml'](network(), inner_lr=0.1, inner_steps=2, **fields)
    variables = objective.init(jax.random.key(3), {'train': batch})
    if 'learn_lr' in fields:  # rates that differ, so that each must find its parameter
        rates = jax.tree.map(lambda x: x + 0.05 * np.random.default_rng(4).normal(size=x.shape),
                             variables['params']['inner_lr'])  # fmt: skip
        variables['params']['inner_lr'] = rates
    _, grads = meta_gradient(objective, variables, batch)
    loss = jax.jit(lambda params: objective.loss({'params': params}, {'train': batch}, jax.random.key(0))[0])
    rng, h = np.random.default_rng(5), 1e-5
    for path, leaf in trees.flatten(variables['params']).items():
        direction = rng.normal(size=leaf.shape)
        moved = [trees.merge(variables['params'], trees.unflatten({path: leaf + s * h * direction})) for s in (1, -1)]
        difference = (loss(moved[0]) - loss(moved[1])) / (2 * h)
        np.testing.assert_allclose(np.sum(trees.flatten(grads)[path] * direction), difference, rtol=1e-6, err_msg=path)


def test_gradient_of_a_learned_rate_is_minus_the_product_of_the_gradients():
    """After one step dL_query / dα = - ∇L_support(θ) ∘ ∇L_query(θ')."""
    fields = tasks(6)
    objective = objectives.OBJECTIVES['maml'](linear_model(), inner_lr=0.3, learn_lr=True)
    variables = objective.init(jax.random.key(7), {'train': fields})
    w = np.asarray(variables['params']['head']['kernel'])
    np.testing.assert_array_equal(variables['params']['inner_lr']['head']['kernel'], np.full_like(w, 0.3))
    _, grads = meta_gradient(objective, variables, fields)
    expected = 0
    for x, y, xq, yq in zip(*fields_in_order(fields), strict=True):
        at_support = 2 / SHOTS * x.T @ (x @ w - y)
        adapted = w - 0.3 * at_support
        expected -= at_support * (2 / QUERIES * xq.T @ (xq @ adapted - yq)) / TASKS
    np.testing.assert_allclose(grads['inner_lr']['head']['kernel'], expected, rtol=1e-10)


def fields_in_order(fields):
    return [fields[name] for name in ('support_inputs', 'support_target', 'query_inputs', 'query_target')]


@pytest.mark.parametrize(
    ('name', 'options'), [('maml', {'inner_rule': 'head/.*'}), ('joint', {'inner_rule': 'head/.*'})]
)
def test_where_the_head_alone_adapts_the_curve_is_linear_regression_on_the_features(name, options):
    fields = tasks(8)
    objective = objectives.OBJECTIVES[name](network(), inner_lr=0.2, eval_steps=3, **options)
    variables = objective.init(jax.random.key(9), {'train': fields})
    curve = jax.jit(objective.predict)(variables, fields)['mse']
    a, b = (np.asarray(variables['params'][role]['kernel']) for role in ('backbone', 'head'))
    for task, (x, y, xq, yq) in enumerate(zip(*fields_in_order(fields), strict=True)):
        x, xq, w, expected = np.tanh(x @ a), np.tanh(xq @ a), b, []
        for _ in range(4):
            expected.append(np.mean((xq @ w - yq) ** 2))
            w = w - 0.2 * 2 / SHOTS * x.T @ (x @ w - y)
        np.testing.assert_allclose(curve[task], expected, rtol=1e-10)


def test_joint_is_the_mean_loss_of_the_supports():
    fields = tasks(10)
    objective = objectives.OBJECTIVES['joint'](linear_model())
    variables = objective.init(jax.random.key(0), {'train': fields})
    value, grads = meta_gradient(objective, variables, fields)
    x, y, w = fields['support_inputs'], fields['support_target'], np.asarray(variables['params']['head']['kernel'])
    np.testing.assert_allclose(value, np.mean((x @ w - y) ** 2), rtol=1e-12)
    gradient = 2 * np.einsum('tnd,tno->do', x, x @ w - y) / y.size
    np.testing.assert_allclose(grads['head']['kernel'], gradient, rtol=1e-10)


def test_figures_are_means_and_intervals_over_tasks():
    curve = np.random.default_rng(0).normal(size=(7, 3))
    figures = objectives.OBJECTIVES['maml'](linear_model()).figures({'mse': curve, 'index': np.arange(7)})
    assert set(figures) == {'mse', 'mse_ci95', *(f'mse_step{k}{end}' for k in range(3) for end in ('', '_ci95'))}
    assert figures['mse_step1'] == pytest.approx(sum(curve[:, 1]) / 7)
    deviations = [(x - sum(curve[:, 2]) / 7) ** 2 for x in curve[:, 2]]
    assert (
        figures['mse_ci95'] == figures['mse_step2_ci95'] == pytest.approx(1.96 * (sum(deviations) / 7) ** 0.5 / 7**0.5)
    )


def images(seed=0, ways=3):
    rng = np.random.default_rng(seed)
    return {
        'support_image': rng.normal(size=(2, 2 * ways, 4, 4, 1)).astype(np.float32),
        'support_label': np.tile(np.arange(2 * ways, dtype=np.int32) % ways, (2, 1)),
        'query_image': rng.normal(size=(2, ways, 4, 4, 1)).astype(np.float32),
        'query_label': np.tile(np.arange(ways, dtype=np.int32), (2, 1)),
    }


def convnet(form):
    return model_from(
        name='convnet', widths=[2], norm='batch', conv_form=form, classes=3, dtype=jnp.float32, load=False
    )


def test_stored_statistics_neither_matter_nor_move():
    objective = objectives.OBJECTIVES['maml'](convnet('patches'), inner_lr=0.1, inner_steps=2)
    batch = {'train': images()}
    variables = objective.init(jax.random.key(0), batch)
    loss = jax.jit(objective.loss)
    value, aux = loss(variables, batch, jax.random.key(1))
    assert aux.collections == {}
    assert set(aux.metrics) == {'accuracy', 'loss', 'support_loss'}
    other = {**variables, 'batch_stats': jax.tree.map(lambda x: x + 1, variables['batch_stats'])}
    np.testing.assert_array_equal(loss(other, batch, jax.random.key(1))[0], value)
    curve = jax.jit(objective.predict)(variables, batch['train'])
    assert curve['accuracy'].shape == curve['loss'].shape == (2, 3)
    np.testing.assert_allclose(curve['loss'].mean(0)[2], value, rtol=1e-5)


def test_forms_of_convolution_give_the_same_meta_gradient():
    batch, grads = images(1), []
    for form in ('patches', 'xla'):
        objective = objectives.OBJECTIVES['maml'](convnet(form), inner_lr=0.1)
        variables = objective.init(jax.random.key(0), {'train': batch})
        grads.append(meta_gradient(objective, variables, batch)[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *grads)


@pytest.mark.parametrize('name', ['maml', 'joint'])
def test_a_rule_that_adapts_nothing(name):
    objective = objectives.OBJECTIVES[name](linear_model(), inner_rule='heads/.*')
    with pytest.raises(UserError, match=r"config.objective.inner_rule.*'heads/\.\*'.*matches no leaf.*head"):
        objective.init(jax.random.key(0), {'train': tasks()})


@pytest.mark.parametrize(
    ('objective', 'gradient'),
    [
        ({'name': 'maml', 'learn_lr': True}, {'name': 'plain'}),
        ({'name': 'joint'}, {'name': 'reptile', 'inner_steps': 2, 'inner_lr': 0.01, 'inner_batch': 2}),
    ],
    ids=['metasgd', 'reptile'],
)
def test_a_run_on_sinusoids(objective, gradient, tmp_path):
    """Through the loop: the state moves, and the summary holds the curve of every split."""
    with jax.enable_x64(False):
        train_and_evaluate(
            {
                'model': {'name': 'mlp', 'dense': [8], 'num_classes': 1},
                'objective': {**objective, 'eval_steps': 2},
                'gradient': gradient,
                'data': {
                    'train': {'spec': 'sinusoid:train', 'count': 100},
                    'eval': {'spec': 'sinusoid:val', 'count': 9},
                    'test': {'spec': 'sinusoid:test', 'count': 10, 'support': 10},
                },
                'stages': [{'steps': 4, 'train': [('.*', {'name': 'adam', 'lr': 1e-3})]}],
                'batch_size': 4,
                'eval_batch_size': 4,
                'select_by': 'val/mse_step1',
                'mesh': {'data': 1},
            },
            tmp_path,
        )
    summary = json.loads((tmp_path / 'summary.json').read_text())
    names = {f'mse{step}{end}' for step in ('', '_step0', '_step1', '_step2') for end in ('', '_ci95')}
    assert set(summary['metrics']) == {f'{split}/{name}' for split in ('val', 'test') for name in names}
    assert (
        summary['metrics']['test/mse'] == summary['metrics']['test/mse_step2'] != summary['metrics']['test/mse_step0']
    )
    assert summary['select_by'] == 'val/mse_step1'
