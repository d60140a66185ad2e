"""Penalties: wrappers that add a term to an objective's loss, of its parameters or of what its forward pass gave."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.errors import UserError, nearest
from tl_jax.objectives.base import Aux, Objective, with_loss


def l1(objective: Objective, *, weight: float, params: str = '.*') -> Objective:
    """loss + weight · Σ |w| over the parameters whose path `params` matches; a frozen one adds a constant (Tibshirani 1996)."""

    def penalty(variables, batch, aux, key):
        del batch, aux, key
        return weight * sum(jnp.sum(jnp.abs(w)) for w in _of(variables, params, 'l1').values()), {}

    return added(objective, 'l1', penalty)


def l2(objective: Objective, *, weight: float, params: str = '.*') -> Objective:
    """loss + weight / 2 · Σ w² over the parameters whose path `params` matches; a frozen one adds a constant.

    Its gradient passes through the optimizer's scaling, unlike the `weight_decay` of adamw (Loshchilov & Hutter 2019,
    arXiv:1711.05101).
    """

    def penalty(variables, batch, aux, key):
        del batch, aux, key
        return weight * half_square(_of(variables, params, 'l2')), {}

    return added(objective, 'l2', penalty)


def bss(objective: Objective, *, weight: float = 1e-3, k: int = 1, layer: str = 'features') -> Objective:
    """Batch spectral shrinkage (Chen et al. 2019, NeurIPS, "Catastrophic forgetting meets negative transfer", eq. 4).

    loss + weight · Σ_{i ≤ k} σ_{-i}², σ_{-i} the i-th smallest singular value of the batch's features [B, D].

    Args:
      objective: gives `layer` in `Aux.endpoints`.
      weight: η; 0.001 in the paper.
      k: singular values that are pushed down, of min(B, D).
      layer: the endpoint; one of more axes counts as [B, the product of the others].
    """
    if k < 1:
        raise UserError(f'config.objective.bss.k: must be at least 1, not {k}')

    def penalty(variables, batch, aux, key):
        del variables, batch, key
        features = endpoint(aux, layer, 'bss')
        features = features.reshape(len(features), -1)
        if k > min(features.shape):
            raise UserError(
                f'config.objective.bss.k: {k}, and features {list(features.shape)} have fewer singular values'
            )
        return weight * smallest_squares(features, k), {}

    return added(objective, 'bss', penalty)


def smallest_squares(features: Float[Array, 'batch dim'], k: int) -> Float[Array, '']:
    """The sum of the squares of the k smallest singular values, in float32."""
    return jnp.sum(jnp.square(jnp.linalg.svd(features.astype(jnp.float32), compute_uv=False)[-k:]))


def added(objective: Objective, name: str, penalty: Callable) -> Objective:
    """The objective with a further term in its loss, and in that of each phase; it is logged as `name`.

    Where the loss has parts by task, the penalty is one more of them, so that what combines the parts does not lose it.

    Args:
      objective: that is wrapped.
      name: of the penalty.
      penalty: (variables, batch, aux of the wrapped loss, key) -> (scalar, collections that it changed). `variables` hold
        the collections as the wrapped loss has left them.
    """

    def change(loss):
        def penalised(variables, batch, key):
            value, aux = loss(variables, batch, key)
            term, moved = penalty(trees.merge(variables, aux.collections), batch, aux, key)
            parts = {**aux.losses, name: term} if aux.losses else {}
            collections = trees.merge(aux.collections, moved)
            return value + term, aux._replace(
                metrics={**aux.metrics, name: term}, collections=collections, losses=parts
            )

        return penalised

    return with_loss(objective, change)


def endpoint(aux: Aux, layer: str, name: str) -> Array:
    """What the wrapped loss's forward pass gave of a layer."""
    if not aux.endpoints:
        raise UserError(
            f"config.objective.{name}: needs features of the forward pass, which this objective does not show; use 'supervised'"
        )
    if layer not in aux.endpoints:
        raise UserError(f"config.objective.{name}: the network gives no '{layer}'; {nearest(layer, aux.endpoints)}")
    return aux.endpoints[layer]


def select(params: trees.Tree, rule: str, field: str) -> dict[str, Any]:
    """`{path: leaf}` of the parameters that a rule matches; it must match some."""
    chosen = trees.match([(rule, True)], trees.flatten(params), field=field, default=False)
    return {path: leaf for path, leaf in trees.flatten(params).items() if chosen[path]}


def half_square(leaves: dict[str, Array]) -> Float[Array, '']:
    """Σ w² / 2 over all numbers of the leaves, in float32."""
    return 0.5 * sum(jnp.sum(jnp.square(w.astype(jnp.float32))) for w in leaves.values())


def _of(variables: trees.Tree, rule: str, name: str) -> dict[str, Any]:
    return select(variables['params'], rule, f'config.objective.{name}.params')
