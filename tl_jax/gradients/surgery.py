"""Gradients of several tasks, combined where they meet: PCGrad and MGDA.

Both read `Aux.losses = {task: term}`, whose sum is the loss, and weigh the terms' gradients anew for the parameters that the
tasks share. One forward pass and T pullbacks give the gradients; of these both methods need only the inner products, so that
each is a function of the T × T Gram matrix.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.gradients.base import Gradient

Normalisation = Literal['none', 'l2', 'loss', 'loss+']


def pcgrad(*, shared: str = 'backbone/.*') -> Gradient:
    """Projecting conflicting gradients (Yu et al. 2020, arXiv:2001.06782, algorithm 1).

    g_i starts as task i's gradient; for every other task j in random order: g_i -= min(0, g_i · g_j) / |g_j|² g_j, where g_j
    is as it was. The shared parameters move by Σ_i g_i, all others by the gradient of the sum.

    Args:
      shared: regex over the parameters that the tasks share.
    """

    def weigh(gram, losses, key):
        return projected_weights(gram, key), jnp.ones_like(losses)

    return Gradient(lambda loss: _weighted(loss, weigh, shared))


def mgda(*, shared: str = 'backbone/.*', normalize: Normalisation = 'none') -> Gradient:
    """Multiple-gradient descent (Sener & Koltun 2018, arXiv:1810.04650, algorithm 2 on the gradients of the parameters).

    All parameters move by Σ_t α_t g_t, where α on the simplex minimises |Σ_t α_t g_t / n_t|² over the shared parameters. The
    variant through the representation, MGDA-UB, is the objective `multitask` with `weights='mgda_ub'`.

    Args:
      shared: regex over the parameters that the tasks share.
      normalize: n_t, as in the authors' code: 1, the gradient's norm, the loss, or the product of both ('loss+').
    """

    def weigh(gram, losses, key):
        del key
        weights = min_norm_weights(normalized(gram, losses, normalize))
        return weights, weights

    return Gradient(lambda loss: _weighted(loss, weigh, shared))


def projected_weights(gram: Float[Array, 'tasks tasks'], key: Array) -> Float[Array, 'tasks']:
    """PCGrad's Σ_i g_i as weights of the tasks' gradients, from their inner products."""
    tasks = len(gram)
    squares = jnp.diag(gram)

    def project(own, key):
        def remove(weights, other):
            conflict = jnp.minimum(gram[other] @ weights, 0) / jnp.where(squares[other] > 0, squares[other], 1)
            return weights.at[other].add(jnp.where(other == own, 0, -conflict)), None

        start = jnp.zeros(tasks, gram.dtype).at[own].set(1)
        return jax.lax.scan(remove, start, jax.random.permutation(key, tasks))[0]

    return jnp.sum(jax.vmap(project)(jnp.arange(tasks), jax.random.split(key, tasks)), 0)


def min_norm_weights(gram: Float[Array, 'tasks tasks'], iterations: int = 250) -> Float[Array, 'tasks']:
    """The point α of the simplex that minimises α' gram α, by Frank-Wolfe with exact line search.

    Each iteration moves weight from the worst task that has some to the best, which converges linearly (pairwise steps,
    Lacoste-Julien & Jaggi 2015, arXiv:1511.05932, algorithm 2). For two tasks one move is the closed form
    α_1 = clip((g_2 - g_1) · g_2 / |g_1 - g_2|², 0, 1); the authors' code clips at 0.001 and 0.999.
    """
    tasks = len(gram)

    def move(_, weights):
        slope = jnp.matmul(gram, weights, precision='highest')
        best, worst = jnp.argmin(slope), jnp.argmax(jnp.where(weights > 0, slope, -jnp.inf))
        curvature = gram[best, best] + gram[worst, worst] - 2 * gram[best, worst]
        step = (slope[worst] - slope[best]) / jnp.where(curvature > 0, curvature, 1)
        step = jnp.clip(jnp.where(curvature > 0, step, 0), 0, weights[worst])
        return weights.at[best].add(step).at[worst].add(-step)

    return jax.lax.fori_loop(0, 1 if tasks == 2 else iterations, move, jnp.full(tasks, 1 / tasks, gram.dtype))


def normalized(
    gram: Float[Array, 'tasks tasks'], losses: Float[Array, 'tasks'], normalize: Normalisation
) -> Float[Array, 'tasks tasks']:
    """The inner products of the gradients divided by their `normalize`."""
    norms = jnp.sqrt(jnp.diag(gram))
    by = {'none': jnp.ones_like(norms), 'l2': norms, 'loss': losses, 'loss+': losses * norms}[normalize]
    by = jnp.where(by > 0, by, 1)
    return gram / (by[:, None] * by[None, :])


def _weighted(loss: Callable, weigh: Callable, shared: str) -> Callable:
    """The gradient Σ_t w_t g_t, `weigh(gram, losses, key)` giving the weights of shared parameters and of the others."""

    def gradient(params, collections, batch, key):
        grads, losses, value, aux = _task_gradients(loss, params, collections, batch, key)
        is_shared = _chosen(shared, params)
        common, own = zip(*(trees.split(g, is_shared) for g in grads), strict=True)
        weights, own_weights = weigh(_gram(common), losses, jax.random.fold_in(key, 1))
        metrics = {f'weight_{task}': weight for task, weight in zip(aux.losses, weights, strict=True)}
        grads = trees.merge(_combine(common, weights), _combine(own, own_weights))
        return grads, value, aux._replace(metrics={**aux.metrics, **metrics})

    return gradient


def _task_gradients(loss, params, collections, batch, key) -> tuple[list[Any], Float[Array, 'tasks'], Array, Any]:
    """Each task's gradient, by one forward pass and as many pullbacks."""

    def terms(params):
        value, aux = loss(params, collections, batch, key)
        if not aux.losses:
            raise UserError(
                'config.gradient: pcgrad and mgda combine the losses of several tasks; use an objective that has them, such as'
                " config.objective.name='multitask'"
            )
        return list(aux.losses.values()), (value, aux)

    losses, pullback, (value, aux) = jax.vjp(terms, params, has_aux=True)
    one_hot = jnp.eye(len(losses), dtype=losses[0].dtype)
    return [pullback(list(row))[0] for row in one_hot], jnp.stack(losses), value, aux


def _chosen(rule: str, params: trees.Tree) -> Callable[[str], bool]:
    pattern = trees.compiled(rule, 'config.gradient.shared')
    if not any(map(pattern.fullmatch, trees.flatten(params))):
        paths = list(trees.flatten(params))
        raise UserError(f"config.gradient.shared: '{rule}' matches no trained parameter, such as '{paths[0]}'")
    return lambda path: bool(pattern.fullmatch(path))


def _gram(grads: Sequence[Any]) -> Float[Array, 'tasks tasks']:
    def product(one, other):
        return sum(
            jnp.vdot(a.astype(jnp.float32), b.astype(jnp.float32), precision='highest')
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        )

    return jnp.array([[product(one, other) for other in grads] for one in grads])


def _combine(grads: Sequence[Any], weights: Float[Array, 'tasks']) -> Any:
    return jax.tree.map(
        lambda *leaves: sum(w.astype(g.dtype) * g for w, g in zip(weights, leaves, strict=True)), *grads
    )
