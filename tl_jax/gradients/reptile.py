"""Reptile: a direction that is no derivative of the loss."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from tl_jax.errors import UserError
from tl_jax.gradients.base import Gradient

INNER_OPTIMIZERS = {'sgd': optax.sgd, 'adam': lambda lr: optax.adam(lr, b1=0.0)}


def reptile(
    *,
    inner_steps: int,
    inner_lr: float,
    inner_batch: int | None = None,
    inner_optimizer: Literal['sgd', 'adam'] = 'sgd',
) -> Gradient:
    """The way back from where k steps on each task lead (Nichol et al. 2018, arXiv:1803.02999, algorithm 2).

    g = mean over tasks of θ - θ_k;  the outer rate is thus the ε of the paper, with 'sgd' θ ← θ + ε mean(θ_k - θ).

    Args:
      inner_steps: k.
      inner_lr: rate of the steps.
      inner_batch: support examples a step, drawn without replacement and, where they run out, in a new order; all of
        them unless given.
      inner_optimizer: 'sgd', or 'adam' with b1 = 0 as in the authors' code, started anew for every task (theirs carries
        its second moments from task to task).

    The loss must be one of `support_*` fields [tasks, examples, …], such as that of the objective `joint`, and all
    streams hold as many tasks. The value and the metrics are means over steps; collections stay.
    """

    def transform(loss: Callable) -> Callable:
        optimizer = INNER_OPTIMIZERS[inner_optimizer](inner_lr)

        def way(params, collections, task, key):
            def step(carry, inputs):
                params, state = carry
                rows, number = inputs
                compute = jax.value_and_grad(loss, has_aux=True)
                (value, aux), grads = compute(params, collections, _only(task, rows), jax.random.fold_in(key, number))
                updates, state = optimizer.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), (value, aux._replace(collections={}))

            rows = minibatches(key, _support_size(task), inner_steps, inner_batch)
            inputs = rows, jnp.arange(inner_steps)
            (end, _), (values, auxes) = jax.lax.scan(step, (params, optimizer.init(params)), inputs)
            return jax.tree.map(jnp.subtract, params, end), jnp.mean(values), jax.tree.map(jnp.mean, auxes)

        def gradient(params, collections, batch, key):
            count = jax.tree.leaves(batch)[0].shape[0]
            keys = jax.random.split(key, count)
            ways, values, auxes = jax.vmap(way, (None, None, 0, 0))(params, collections, batch, keys)
            grads, value, aux = jax.tree.map(lambda x: jnp.mean(x, 0), (ways, values, auxes))
            return grads, value, aux

        return gradient

    return Gradient(transform)


def minibatches(key: jax.Array, size: int, steps: int, batch: int | None) -> jax.Array:
    """Rows [steps, batch] of a set of `size`: its permutations one after the other, cut into batches."""
    if batch is None:
        return jnp.broadcast_to(jnp.arange(size), (steps, size))
    if batch < 1:
        raise UserError(f'config.gradient.inner_batch: must be at least 1, not {batch}')
    passes = jax.random.split(key, -(-steps * batch // size))
    rows = jax.vmap(lambda k: jax.random.permutation(k, size))(passes)
    return rows.reshape(-1)[: steps * batch].reshape(steps, batch)


def _only(task: dict, rows: jax.Array) -> dict:
    """The task, as a batch of one, with these of its support examples."""
    return {
        stream: {name: (x[rows] if name.startswith('support_') else x)[None] for name, x in fields.items()}
        for stream, fields in task.items()
    }


def _support_size(task: dict) -> int:
    sizes = [x.shape[0] for fields in task.values() for name, x in fields.items() if name.startswith('support_')]
    if not sizes:
        raise UserError(
            "config.gradient.name: 'reptile' needs tasks with support examples; add episodes=dict(…) to the data"
        )
    return sizes[0]
