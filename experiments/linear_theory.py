"""The two-layer linear theory of Kumar et al. 2022 (arXiv:2202.10054, section 3): fine-tuning distorts features; LP-FT does not.

    python -m experiments.linear_theory          # 20 seeds, a quarter of a minute of CPU; writes results/linear_theory

Labels y = v*ᵀ B* x, with B* [k, d] of orthonormal rows. Pretraining has given B₀ = U B* (U orthogonal), or such a one turned
by an angle. The n examples lie in a subspace of m dimensions, k < m < d; whoever is out of distribution sees all d. Squared
error, full-batch gradient descent in float64 until nothing moves (the paper's gradient flow):

    LP     v alone, from 0
    FT     v and B, from a random v
    LP-FT  v and B, from LP's v

Each is a rule list of the library's own step. Errors are those of w = Bᵀ v over the population, E (wᵀx - w*ᵀx)²: with the
identity as covariance, ‖w - w*‖² out of distribution and ‖P (w - w*)‖² within, P projecting on the subspace. The paper
proves: FT's error out of distribution is bounded away from 0 (theorem 3.2), LP's goes to 0 with B₀'s (theorem 3.4), and
LP-FT's is 0 where B₀ is exact (proposition 3.5).
"""

import functools
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tl_jax.gradients import GRADIENTS
from tl_jax.objectives import Aux, Objective
from tl_jax.optimizers import create_partition
from tl_jax.state import create_state, enter_stage
from tl_jax.step import create_train_step

HERE = Path(__file__).resolve().parent
SEEDS = 20
DIM, FEATURES, SUBSPACE, EXAMPLES = 40, 4, 16, 60  # d, k, m, n
ANGLES = {'exact': 0.0, '0.1 rad': 0.1, '0.3 rad': 0.3}
STEPS, RATE = 8_000, 0.05
METHODS = {
    'LP': [['head/.*']],
    'FT': [['.*']],
    'LP-FT': [['head/.*'], ['.*']],
}


class Problem(NamedTuple):
    """Arrays of one seed: X [n, d] and y [n], w* [d], the projection on the data's subspace [d, d], B₀ [k, d], a random v [k]."""

    x: np.ndarray
    y: np.ndarray
    truth: np.ndarray
    project: np.ndarray
    pretrained: np.ndarray
    random_head: np.ndarray


def problem(seed: int, angle: float) -> Problem:
    """Draws a problem whose pretrained features stand at `angle` to the true ones, each in a direction of its own."""
    rng = np.random.default_rng(seed)
    orthonormal = lambda rows: np.linalg.qr(rng.normal(size=(DIM, rows)))[0].T
    both = orthonormal(2 * FEATURES)
    features, away = both[:FEATURES], both[FEATURES:]
    head = rng.normal(size=FEATURES)
    head /= np.linalg.norm(head)
    turn = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0]
    basis = orthonormal(SUBSPACE)
    x = rng.normal(size=(EXAMPLES, SUBSPACE)) @ basis
    truth = features.T @ head
    pretrained = turn @ (np.cos(angle) * features + np.sin(angle) * away)
    return Problem(x, x @ truth, truth, basis.T @ basis, pretrained, rng.normal(size=FEATURES) / np.sqrt(FEATURES))


def squared_error() -> Objective:
    """mean_i (vᵀ B x_i - y_i)² / 2 over the stream `train`."""

    def loss(variables, batch, key):
        del key
        params, fields = variables['params'], batch['train']
        error = fields['inputs'] @ params['backbone']['kernel'].T @ params['head']['kernel'] - fields['target']
        return jnp.mean(error**2) / 2, Aux({}, {})

    return Objective(init=None, loss=loss, predict=None)


def solve(drawn: Problem, method: str) -> dict[str, jax.Array]:
    """The errors of a method's solution, within and out of distribution, and the training error."""
    start = drawn.random_head if method == 'FT' else jnp.zeros(FEATURES)
    params = {'backbone': {'kernel': drawn.pretrained}, 'head': {'kernel': start}}
    batch = {'train': {'inputs': drawn.x, 'target': drawn.y}}
    state = create_state({'params': params}, 0)
    for rules in METHODS[method]:
        optimizer = {'name': 'sgd', 'lr': RATE}
        partition = create_partition([(rule, optimizer) for rule in rules], params, steps=STEPS)
        step = create_train_step(squared_error(), GRADIENTS['plain'](), partition, 0.0, 0.0, steps=STEPS)
        state = enter_stage(state, partition, ema=0.0)
        state, metrics = lax.scan(lambda state, _, step=step: step(state, batch), state, length=STEPS)
    error = state.params['backbone']['kernel'].T @ state.params['head']['kernel'] - drawn.truth
    within = jnp.sum((drawn.project @ error) ** 2)
    return {'id': within, 'ood': jnp.sum(error**2), 'train': metrics['train/loss'][-1]}


def claims(errors: dict[str, dict[str, dict[str, list[float]]]]) -> list[tuple[str, bool]]:
    """What the paper says, and whether it holds here, over all seeds."""
    of = lambda case, method, kind: np.array(errors[case][method][kind])
    found = [
        ('exact: the error of LP out of distribution is 0', of('exact', 'LP', 'ood').max() < 1e-8),
        ('exact: the error of LP-FT out of distribution is 0', of('exact', 'LP-FT', 'ood').max() < 1e-8),
        ('exact: the error of FT out of distribution is not', of('exact', 'FT', 'ood').min() > 1e-3),
    ]
    for case in list(ANGLES)[1:]:
        means = {(m, kind): of(case, m, kind).mean() for m in METHODS for kind in ('id', 'ood')}
        found += [
            (f'{case}: out of distribution LP < FT', means['LP', 'ood'] < means['FT', 'ood']),
            (f'{case}: out of distribution LP-FT < FT', means['LP-FT', 'ood'] < means['FT', 'ood']),
            (f'{case}: within FT < LP', means['FT', 'id'] < means['LP', 'id']),
            (f'{case}: within LP-FT < LP', means['LP-FT', 'id'] < means['LP', 'id']),
        ]
    return [(text, bool(holds)) for text, holds in found]


def table(errors: dict, seconds: float) -> str:
    """The results as markdown."""
    lines = [
        f'# {__doc__.splitlines()[0]}',
        '',
        f'Mean ± standard deviation over {SEEDS} seeds of the squared error; d = {DIM}, k = {FEATURES}, m = {SUBSPACE}, '
        f'n = {EXAMPLES}; {seconds:.0f} s of CPU. `python -m experiments.linear_theory`.',
        '',
        '| B₀ | method | within distribution | out of distribution |',
        '|---|---|---|---|',
    ]
    for case, methods in errors.items():
        for method, kinds in methods.items():
            cells = (f'{np.mean(kinds[k]):.2e} ± {np.std(kinds[k], ddof=1):.1e}' for k in ('id', 'ood'))
            lines.append(f'| {case} | {method} | {" | ".join(cells)} |')
    lines += ['', *(f'- {"holds" if holds else "**does not hold**"}: {text}' for text, holds in claims(errors))]
    return '\n'.join(lines) + '\n'


def main() -> None:
    jax.config.update('jax_enable_x64', True)
    began, errors = time.process_time(), {}
    for case, angle in ANGLES.items():
        problems = [problem(seed, angle) for seed in range(SEEDS)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
        found = {m: jax.jit(jax.vmap(functools.partial(solve, method=m)))(stacked) for m in METHODS}
        errors[case] = {m: {kind: np.asarray(v).tolist() for kind, v in kinds.items()} for m, kinds in found.items()}
        worst = max(max(kinds['train']) for m, kinds in errors[case].items() if m != 'LP')
        print(f'{case}: largest training loss of FT and LP-FT {worst:.1e}')
    text = table(errors, time.process_time() - began)
    folder = HERE / 'results' / 'linear_theory'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'errors.json').write_text(json.dumps(errors, indent=1) + '\n')
    (folder / 'table.md').write_text(text)
    print(text)


if __name__ == '__main__':
    main()
