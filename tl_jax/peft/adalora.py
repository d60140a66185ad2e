"""AdaLoRA: low-rank adapters whose ranks compete for a budget.

Three parts: the adapter here; the optimizer 'adalora', which gives ranks up; the wrapper `orthogonal` of the objective.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.peft.base import Adapter, Parts, Site
from tl_jax.peft.products import check_rank, low_rank, matrix_shape

TRIPLET = ('lora_a', 'lora_e', 'lora_b')


def adalora(*, rank: int = 12, alpha: float = 12.0, dropout: float = 0.0, targets: str | None = None) -> Adapter:
    """AdaLoRA's adapter (Zhang et al. 2023, arXiv:2303.10512, eq. 3): y = x W + (α / r) x P diag(λ) Q, λ = 0 at first.

    Learns `lora_a` P [rows, r], `lora_e` λ [r], `lora_b` Q [r, columns]. To be trained by the optimizer 'adalora', with
    `objective.orthogonal=dict(weight=0.5)`; by any other optimizer every layer keeps its rank.

    Args:
      rank: r that every layer begins with.
      alpha: α.
      dropout: of what goes through P, in training.
      targets: regex of module paths; the family's own unless given.
    """

    def init(key, site: Site, weights) -> Parts:
        del weights
        check_rank(rank, site)
        rows, columns = matrix_shape(site)
        for_a, for_b = jax.random.split(key)
        draw = lambda key, shape: 0.02 * jax.random.normal(key, shape)  # as the authors' code
        return Parts(
            {'lora_a': draw(for_a, (rows, rank)), 'lora_e': jnp.zeros(rank), 'lora_b': draw(for_b, (rank, columns))}
        )

    def factors(parts: Parts, site: Site):
        return parts.params['lora_a'] * parts.params['lora_e'], alpha / rank * parts.params['lora_b']

    return low_rank(init, factors, dropout=dropout, targets=targets)


class Budgeted(NamedTuple):
    """State of `budgeted`: the optimizer's own, updates so far, and each leaf's smoothed sensitivity and uncertainty."""

    inner: Any
    count: Array
    sensitivity: dict[str, Array]
    uncertainty: dict[str, Array]


def budgeted(
    learning_rate: Any,
    *,
    rank: float,
    begin: float = 0.1,
    end: float = 0.6,
    every: int = 10,
    smooth: float = 0.85,
    smooth_uncertainty: float = 0.85,
    weight_decay: float = 0.0,
    steps: int,
    field: str,
) -> optax.GradientTransformation:
    """AdamW that sets the least important λ of all layers to zero (arXiv:2303.10512, algorithm 1).

    After each update, I = |w ∂L/∂w|, Ī ← β₁ Ī + (1 − β₁) I (eq. 9), Ū ← β₂ Ū + (1 − β₂) |I − Ī| (eq. 10), s = Ī Ū (eq. 11),
    S_k = s(λ_k) + mean s(P_·k) + mean s(Q_k·) (eq. 8); every so many updates between `begin` and `end`, and at each one after
    it, the λ that are not among the b(t) of highest S become 0. They may come back, as their gradient goes on. b falls from
    all ranks to `rank` times the layers as a cube (eq. 12, as the authors' code has it, whose cube begins at 1).

    Args:
      learning_rate: number or schedule.
      rank: what is left on average for each layer, less than it begins with.
      begin, end: of the fall, as fractions of the stage.
      every: updates between two cuts.
      smooth, smooth_uncertainty: β₁ and β₂, each at least 0 and less than 1.
      weight_decay: of AdamW.
      steps: updates in the stage.
      field: of the optimizer in the config, for error messages.
    """
    if every < 1:
        raise UserError(f'{field}.every: must be at least 1, not {every}')
    for name, share in (('smooth', smooth), ('smooth_uncertainty', smooth_uncertainty)):
        if not 0 <= share < 1:
            raise UserError(f'{field}.{name}: must be at least 0 and less than 1, not {share}')
    if not 0 <= begin < end <= 1:
        raise UserError(f'{field}.begin: must be a fraction below end, also one, not {begin} and {end}')
    adam = optax.adamw(learning_rate, weight_decay=weight_decay)
    first, last = int(begin * steps), int(end * steps)
    if first == last:
        raise UserError(f'{field}.end: {end} of {steps} updates is the same one as begin, {begin}; lengthen the stage')

    def init(params) -> Budgeted:
        leaves = triplets(params)
        if not leaves:
            raise UserError(f"{field}.name: 'adalora' is for the adapters of that name, and its rule matches none")
        ranks = [leaf.size for path, leaf in leaves.items() if path.endswith('/lora_e')]
        left, total = round(rank * len(ranks)), sum(ranks)
        if not 1 <= left < total:
            raise UserError(
                f'{field}.rank: {rank} a layer leaves {left} of the {total} ranks of {len(ranks)} layers; must leave fewer, '
                'and at least one'
            )
        zeros = {path: jnp.zeros_like(leaf) for path, leaf in leaves.items()}
        return Budgeted(adam.init(params), jnp.zeros((), jnp.int32), zeros, dict(zeros))

    def update(grads, state: Budgeted, params):
        updates, inner = adam.update(grads, state.inner, params)
        gradient, leaves, moves = triplets(grads), triplets(params), triplets(updates)
        now = {path: jnp.abs(leaf * gradient[path]) for path, leaf in leaves.items()}
        mix = lambda share, old, new: {path: share * old[path] + (1 - share) * new[path] for path in old}
        mean = mix(smooth, state.sensitivity, now)
        spread = mix(smooth_uncertainty, state.uncertainty, {path: jnp.abs(now[path] - mean[path]) for path in now})
        scores = importance({path: mean[path] * spread[path] for path in now})
        count = state.count + 1
        cutting = (count > first) & ((count > last) | (count % every == 0))
        total = sum(score.size for score in scores.values())
        kept = kept_ranks(count, total=total, target=round(rank * len(scores)), first=first, last=last)
        threshold = jnp.sort(jnp.concatenate(list(scores.values())))[total - kept]
        masked = {}
        for path, score in scores.items():
            value = leaves[path] + moves[path]
            masked[path] = jnp.where(cutting & (score < threshold), 0.0, value) - leaves[path]
        updates = trees.merge(updates, trees.unflatten(masked))
        return updates, Budgeted(inner, count, mean, spread)

    return optax.GradientTransformation(init, update)


def triplets(tree: trees.Tree) -> dict[str, Array]:
    """The leaves of AdaLoRA's adapters, by path."""
    flat = trees.flatten(tree)
    modules = {p.rpartition('/')[0] for p, leaf in flat.items() if p.endswith('/lora_e') and hasattr(leaf, 'shape')}
    return {path: leaf for path, leaf in flat.items() if path.rpartition('/')[0] in modules and path.endswith(TRIPLET)}


def importance(scores: dict[str, Array]) -> dict[str, Float[Array, 'rank']]:
    """S of each rank, by the path of its λ: that entry's score and the means of its column of P and its row of Q."""
    return {
        path: score + jnp.mean(scores[path[:-1] + 'a'], 0) + jnp.mean(scores[path[:-1] + 'b'], 1)
        for path, score in scores.items()
        if path.endswith('/lora_e')
    }


def kept_ranks(count: Array, *, total: int, target: int, first: int, last: int) -> Array:
    """b(t): `total` until the update `first`, `target` from `last` on, and a falling cube between."""
    left = 1 - jnp.clip((count - first) / (last - first), 0, 1)
    return (target + (total - target) * left**3).astype(jnp.int32)
