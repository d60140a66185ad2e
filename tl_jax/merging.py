"""Merging after training: from networks of one architecture one, by arithmetic on their parameters; nothing is trained.

Every function takes trees of parameters (nested dicts of arrays) and gives one. Sums are float64, results have the dtype of
the first tree's leaf. `start` is the network that the tuned ones began from; tuned - start is a task vector.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from tl_jax import trees
from tl_jax.errors import UserError, nearest
from tl_jax.models.layers import BatchNorm

Tree = Mapping[str, Any]


def wise_ft(start: Tree, tuned: Sequence[Tree], *, alpha: float = 0.5) -> Tree:
    """(1 - α) θ_start + α θ_tuned (Wortsman et al. 2022, arXiv:2109.01903, eq. 1); takes one tuned network."""
    if len(tuned) != 1:
        raise UserError(f'--files: wise_ft draws a line from the start to one tuned network, not to {len(tuned)}')
    return _combined([start, *tuned], lambda w0, w: (1 - alpha) * w0 + alpha * w)


def uniform_soup(networks: Sequence[Tree]) -> Tree:
    """mean_i θ_i (Wortsman et al. 2022, arXiv:2203.05482, table 2); SWA where they are of one run's steps (arXiv:1803.05407)."""
    return _combined(networks, lambda *ws: sum(ws) / len(ws))


def greedy_soup(
    networks: Sequence[Tree], scores: Sequence[float], measure: Callable[[Tree], float]
) -> tuple[Tree, tuple[int, ...]]:
    """The mean of what helps (arXiv:2203.05482, algorithm 1): from the best network down, each stays if the mean is no worse.

    Args:
      networks: candidates.
      scores: held-out score of each, higher is better; of equals the earlier comes first.
      measure: from parameters to their held-out score.

    Returns:
      the soup, and which networks are in it, in the order in which they came.
    """
    first, *others = sorted(range(len(networks)), key=lambda i: -scores[i])
    kept, best = [first], scores[first]
    for i in others:
        score = measure(uniform_soup([networks[j] for j in (*kept, i)]))
        if score >= best:
            kept, best = [*kept, i], score
    return uniform_soup([networks[i] for i in kept]), tuple(kept)


def task_arithmetic(start: Tree, tuned: Sequence[Tree], *, scale: float = 1.0) -> Tree:
    """θ_start + λ Σ_i (θ_i - θ_start) (Ilharco et al. 2023, arXiv:2212.04089, sec. 2); negative λ forgets the tasks."""
    return _combined([start, *tuned], lambda w0, *ws: w0 + scale * sum(w - w0 for w in ws))


def ties(start: Tree, tuned: Sequence[Tree], *, density: float = 0.2, scale: float = 1.0) -> Tree:
    """TIES (Yadav et al. 2023, arXiv:2306.01708, algorithm 1): trim, elect signs, mean over those that agree.

    τ̂_i keeps the `density` largest numbers of task vector i by magnitude, over all leaves together; γ = sgn(Σ_i τ̂_i);
    τ = mean of the τ̂_i ≠ 0 with the sign γ, 0 where there is none; the result is θ_start + λ τ.

    Args:
      start: θ_start.
      tuned: θ_i.
      density: the share that is kept, in (0, 1]; 0.2 in the paper.
      scale: λ; 1 in the paper where nothing is tuned.
    """
    if not 0 < density <= 1:
        raise UserError(f'--method: the density of ties lies in 0 … 1, above 0, not {density}')
    vectors = [trimmed(task_vector(start, network), density) for network in tuned]

    def merge(w0, *deltas):
        stacked = np.stack(deltas)
        agrees = np.sign(stacked) == np.sign(stacked.sum(0))
        agrees &= stacked != 0
        return w0 + scale * np.where(agrees, stacked, 0).sum(0) / np.maximum(agrees.sum(0), 1)

    return _combined([start, *vectors], merge)


def dare(start: Tree, tuned: Sequence[Tree], *, rate: float = 0.9, scale: float = 1.0, seed: int = 0) -> Tree:
    """DARE (Yu et al. 2024, arXiv:2311.03099, eq. 2–3): task vectors thinned at random and rescaled, then added.

    θ_start + λ Σ_i (1 - m_i) δ_i / (1 - p), m_i ~ Bernoulli(p) for each number: in expectation `task_arithmetic`.

    Args:
      start: θ_start.
      tuned: θ_i; δ_i = θ_i - θ_start.
      rate: p, the share that is dropped, below 1.
      scale: λ.
      seed: of the masks.
    """
    if not 0 <= rate < 1:
        raise UserError(f'--method: the rate of dare lies in 0 … 1, below 1, not {rate}')
    if seed < 0:
        raise UserError(f'--method: the seed of dare is at least 0, not {seed}')
    draw = np.random.default_rng(seed)

    def merge(w0, *ws):
        kept = [(draw.random(w0.shape) >= rate) * (w - w0) for w in ws]
        return w0 + scale / (1 - rate) * sum(kept)

    return _combined([start, *tuned], merge)


def task_vector(start: Tree, tuned: Tree) -> Tree:
    """θ_tuned - θ_start, in float64."""
    before, after = trees.flatten(start), trees.flatten(tuned)
    return trees.unflatten({path: np.asarray(after[path], np.float64) - before[path] for path in before})


def trimmed(vector: Tree, density: float) -> Tree:
    """The vector with all but its largest numbers zero; ties at the threshold stay."""
    flat = trees.flatten(vector)
    sizes = np.concatenate([np.abs(leaf).ravel() for leaf in flat.values()])
    keep = max(1, int(sizes.size * density))
    least = np.partition(sizes, sizes.size - keep)[sizes.size - keep]
    return trees.unflatten({path: np.where(np.abs(leaf) >= least, leaf, 0) for path, leaf in flat.items()})


def batch_statistics(apply: Callable, variables: Tree, inputs: Iterable[Any]) -> Tree:
    """Batch norm's statistics measured anew: the means over batches of their means and unbiased variances.

    What a merged network needs, as its activations are those of none of its parts (Izmailov et al. 2018,
    arXiv:1803.05407, sec. 3.2; torch.optim.swa_utils.update_bn). Each batch passes in training mode, without dropout's draws
    being averaged out.

    Args:
      apply: a Linen module's.
      variables: `params` and `batch_stats`.
      inputs: batches of them.

    Returns:
      `batch_stats`.
    """

    @jax.jit
    def measure(x):
        seen = {}

        def look(run, args, kwargs, context):
            if isinstance(context.module, BatchNorm) and context.method_name == '__call__':
                batch = args[0].astype(jnp.float32).reshape(-1, args[0].shape[-1])
                path = '/'.join(context.module.path)
                seen[path] = {'mean': jnp.mean(batch, 0), 'var': jnp.var(batch, 0, ddof=1)}
            return run(*args, **kwargs)

        with linen.intercept_methods(look):
            apply(variables, x, train=True, mutable=['batch_stats'], rngs={'dropout': jax.random.key(0)})
        return seen

    total, count = None, 0
    for x in inputs:
        measured = measure(x)
        total = measured if total is None else jax.tree.map(jnp.add, total, measured)
        count += 1
    found = {f'{path}/{name}': leaf / count for path, leaves in total.items() for name, leaf in leaves.items()}
    return trees.unflatten(found)


def check_alike(networks: Mapping[str, Tree]) -> None:
    """Refuses networks whose leaves differ in name or shape from the first one's."""
    (first, tree), *others = networks.items()
    wanted = {path: np.shape(leaf) for path, leaf in trees.flatten(tree).items()}
    for name, other in others:
        found = {path: np.shape(leaf) for path, leaf in trees.flatten(other).items()}
        path = next((p for p in (*wanted, *found) if wanted.get(p) != found.get(p)), None)
        if path is not None:
            says = {p: list(s[path]) if path in s else 'absent' for p, s in ((first, wanted), (name, found))}
            raise UserError(
                f"--files: '{path}' is {says[first]} in {first} and {says[name]} in {name}; merge networks of one architecture"
            )


def _combined(networks: Sequence[Tree], combine: Callable) -> Tree:
    """A tree of `combine(leaf of the first, leaf of the second, …)` in float64, with the first tree's dtypes."""
    first, *others = (trees.flatten(network) for network in networks)
    for other in others:
        if other.keys() != first.keys():
            path = next(iter(other.keys() ^ first.keys()))
            raise UserError(f"merging: '{path}' is not in all networks; {nearest(path, first)}")
    merged = {}
    for path, leaf in first.items():
        wide = [np.asarray(network[path], np.float64) for network in (first, *others)]
        merged[path] = combine(*wide).astype(np.asarray(leaf).dtype)
    return trees.unflatten(merged)
