"""Learning to adapt: objectives whose parameters are where the gradient descent of a new task begins.

A task of a batch is `support_*`, to adapt on, and `query_*`, to be judged by: `image`, `inputs` or `tokens` [B, S, …],
with `label` [B, S] (cross-entropy; accuracy) or `target` [B, S, D] (mean squared error). The tasks are independent:
`jax.vmap` runs them side by side, each with weights of its own, which a convolution takes best as a product of patches
(`Conv(form='patches')`).

The networks work in training mode throughout, as in Finn's code: batch normalisation uses the statistics of the task's
own support or query examples (so that queries are judged together, "transductively"), and the stored ones never move.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.gradients.reptile import INNER_OPTIMIZERS
from tl_jax.metrics import half_interval
from tl_jax.objectives.base import Aux, Model, Objective, accuracy, cross_entropy, forward, inputs_of

Loss = Callable[[trees.Tree], Float[Array, '']]


def maml(
    model: Model,
    *,
    inner_lr: float = 0.01,
    inner_steps: int = 1,
    eval_steps: int | None = None,
    inner_rule: str = '.*',
    first_order: bool = False,
    learn_lr: bool = False,
    stream: str = 'train',
) -> Objective:
    """Model-agnostic meta-learning (Finn et al. 2017, arXiv:1703.03400, eq. 1), and its kin.

    loss = mean over tasks of L_query(θ_K),  θ_{k+1} = θ_k - α ∘ ∇L_support(θ_k),  θ_0 = θ

    Differentiated through the K inner steps; `first_order` takes ∇L_support for a constant (their sec. 5.2).

    Args:
      model: the network.
      inner_lr: α.
      inner_steps: K.
      eval_steps: of the curve that evaluation reports; K unless given.
      inner_rule: regex over the parameters that adapt; 'head/.*' is ANIL (Raghu et al. 2020, arXiv:1909.09157).
      first_order: see above.
      learn_lr: Meta-SGD (Li et al. 2017, arXiv:1707.09835, eq. 5): α is learned, an entry for every parameter that
        adapts, as the role `inner_lr`; it starts from the number given.
      stream: of tasks.

    Nats, or squared units of the target. Figures: the mean over tasks of the queries' `accuracy` and `loss`, or `mse`,
    after each of 0 … `eval_steps` steps (`mse_step1`), the last also by its plain name, with 95% intervals
    (`mse_ci95`).
    """

    def init(key, batch):
        variables = model.init(key, inputs_of(batch[stream], 'support_')[0])
        adapting, _ = _divide(variables['params'], inner_rule)
        if learn_lr:
            rates = jax.tree.map(lambda leaf: jnp.full(leaf.shape, inner_lr, leaf.dtype), adapting)
            variables = {**variables, 'params': {**variables['params'], 'inner_lr': rates}}
        return variables

    def descent(variables):
        rates = variables['params'].get('inner_lr')
        if rates is None:
            return optax.sgd(inner_lr)
        return optax.stateless(lambda grads, _: jax.tree.map(lambda g, rate: -rate * g, grads, rates))

    def task_loss(variables, task, key):
        adapting, others = _divide(variables['params'], inner_rule)
        support, query = (_loss_of(model, variables, others, task, part, key) for part in ('support_', 'query_'))
        adapted, before = adapt(support, adapting, descent(variables), inner_steps, first_order=first_order)
        after, metrics = query(adapted)
        return after, {**metrics, 'support_loss': before}

    def loss(variables, batch, key):
        values, metrics = jax.vmap(task_loss, (None, 0, None))(variables, batch[stream], key)
        return jnp.mean(values), Aux(jax.tree.map(jnp.mean, metrics), {})

    def predict(variables, batch):
        steps = inner_steps if eval_steps is None else eval_steps
        return _adaptation(model, variables, batch, descent(variables), steps, inner_rule)

    return Objective(init, loss, predict, figures=adaptation_figures, streams=(stream,))


def joint(
    model: Model,
    *,
    inner_lr: float = 0.01,
    eval_steps: int = 1,
    inner_optimizer: Literal['sgd', 'adam'] = 'sgd',
    inner_rule: str = '.*',
    stream: str = 'train',
) -> Objective:
    """The plain loss of each task's support examples, and the same evaluation by adaptation as `maml`.

    loss = mean over tasks of L_support(θ)

    By itself it is the baseline of Finn et al. 2017 (arXiv:1703.03400, sec. 5.1), a network trained on all tasks
    jointly; with the gradient `reptile` it is Reptile. `inner_optimizer`, 'sgd' or 'adam' (with b1 = 0, as Reptile has
    it), is that of evaluation; other arguments, units and figures as of `maml`.
    """

    def init(key, batch):
        variables = model.init(key, inputs_of(batch[stream], 'support_')[0])
        _divide(variables['params'], inner_rule)
        return variables

    def loss(variables, batch, key):
        def task_loss(task):
            return _loss_of(model, variables, {}, task, 'support_', key)(variables['params'])

        values, metrics = jax.vmap(task_loss)(batch[stream])
        return jnp.mean(values), Aux(jax.tree.map(jnp.mean, metrics), {})

    def predict(variables, batch):
        optimizer = INNER_OPTIMIZERS[inner_optimizer](inner_lr)
        return _adaptation(model, variables, batch, optimizer, eval_steps, inner_rule)

    return Objective(init, loss, predict, figures=adaptation_figures, streams=(stream,))


def adapt(
    loss: Callable,
    params: trees.Tree,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    first_order: bool = False,
) -> tuple[trees.Tree, Float[Array, '']]:
    """Returns the parameters after `steps` steps of descent, differentiable, and the loss before the first.

    Args:
      loss: params -> (scalar, metrics).
      params: that adapt.
      optimizer: their update.
      steps: at least 0.
      first_order: whether the gradients count as constants.
    """

    def step(carry, _):
        params, state = carry
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params)
        if first_order:
            grads = jax.lax.stop_gradient(grads)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    if not steps:
        return params, loss(params)[0]
    # Kept for the outer gradient: the parameters after each step, no activations. One step alone has nothing to save.
    body = step if steps == 1 else jax.checkpoint(step, prevent_cse=False)
    (params, _), values = jax.lax.scan(body, (params, optimizer.init(params)), length=steps)
    return params, values[0]


def _adaptation(model, variables, batch, optimizer, steps, inner_rule) -> dict[str, Float[Array, 'tasks steps']]:
    """The query metrics of each task before the first and after each of the steps."""
    key = jax.random.key(0)

    def task_curve(task):
        adapting, others = _divide(variables['params'], inner_rule)
        support, query = (_loss_of(model, variables, others, task, part, key) for part in ('support_', 'query_'))

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(support, has_aux=True)(params)[0], state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), query(params)[1]

        _, curve = jax.lax.scan(step, (adapting, optimizer.init(adapting)), length=steps)
        return jax.tree.map(lambda first, rest: jnp.append(first, rest), query(adapting)[1], curve)

    tasks = {name: value for name, value in batch.items() if name.startswith(('support_', 'query_'))}
    return jax.vmap(task_curve)(tasks)


def adaptation_figures(predictions: dict[str, np.ndarray]) -> dict[str, float]:
    """Curves [tasks, steps + 1] as means over tasks with their 95% intervals, 1.96 standard errors."""
    figures = {}
    for metric in predictions.keys() & {'accuracy', 'loss', 'mse'}:
        curve = predictions[metric].astype(np.float64)
        means, intervals = curve.mean(0), half_interval(curve)
        names = [*(f'{metric}_step{step}' for step in range(len(means))), metric]
        for name, step in zip(names, [*range(len(means)), -1], strict=True):
            figures |= {name: means[step], f'{name}_ci95': intervals[step]}
    return figures


def _divide(params: trees.Tree, inner_rule: str) -> tuple[trees.Tree, trees.Tree]:
    """The network's parameters that adapt, and those that stay."""
    network = {role: tree for role, tree in params.items() if role != 'inner_lr'}
    rules = [(inner_rule, True)]
    chosen = trees.match(rules, trees.flatten(network), field='config.objective.inner_rule', default=False)
    return trees.split(network, chosen.__getitem__)


def _loss_of(
    model: Model, variables: Any, others: trees.Tree, task: dict[str, Any], part: str, key: Array
) -> Callable[[trees.Tree], tuple[Float[Array, ''], dict[str, Float[Array, '']]]]:
    """Returns adapting parameters -> (loss, metrics) of one task's support or query examples."""

    def loss(params):
        endpoints, _ = forward(model, {**variables, 'params': trees.merge(others, params)}, inputs_of(task, part), key)
        outputs = endpoints['logits']
        if part + 'target' in task:
            error = jnp.mean(jnp.square(outputs - task[part + 'target']))
            return error, {'mse': error}
        value = jnp.mean(cross_entropy(outputs, task[part + 'label']))
        return value, {'accuracy': accuracy(outputs, task[part + 'label']), 'loss': value}

    return loss
