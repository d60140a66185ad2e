"""The linear probe to convergence: logistic regression on frozen features, its L2 penalty chosen on held-out data.

The protocol of CLIP (Radford et al. 2021, arXiv:2103.00020, app. A.3): L-BFGS for at most 1000 iterations; the penalty by a
search over 12 decades that halves its step around the best value, down to eight values a decade, by accuracy on a held-out
split; then a last fit on the training and held-out examples together. Examples are seen as in evaluation.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.optimize
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from tl_jax import mesh as mesh_lib
from tl_jax import workdir as workdir_lib
from tl_jax.checkpoint import Place
from tl_jax.config import call
from tl_jax.data import eval_batches
from tl_jax.errors import UserError
from tl_jax.evaluate import create_eval_step
from tl_jax.experiment import Experiment, build
from tl_jax.features import with_features
from tl_jax.progress import say
from tl_jax.run import Run, evaluate_splits, final_figures
from tl_jax.selection import selection_from
from tl_jax.state import TrainState
from tl_jax.step import layouts
from tl_jax.train import initial_state

LIMIT = 1  # L-BFGS-B's status where it ran out of iterations


class Fit(NamedTuple):
    """A fitted linear head; float64.

    Attributes:
      kernel: [D, K].
      bias: [K], not penalised; its sum is 0.
      loss: the mean cross-entropy in nats, without the penalty.
      iterations: that it took.
      converged: whether they were enough.
    """

    kernel: np.ndarray
    bias: np.ndarray
    loss: float
    iterations: int
    converged: bool


class Protocol(NamedTuple):
    """The fields of `config.probe`.

    Attributes:
      C: of the one fit, in place of a search; scikit-learn's, see `fit`.
      low: log10 of the smallest C searched.
      high: log10 of the largest.
      first_step: of the search, in decades; halved until it is at most `last_step`.
      last_step: its resolution, in decades.
      max_iterations: of L-BFGS.
      refit: whether the last fit is to the held-out examples as well; their own figures are of the head before it.
    """

    C: float | None = None
    low: float = -6.0
    high: float = 6.0
    first_step: float = 2.0
    last_step: float = 0.125
    max_iterations: int = 1000
    refit: bool = True


def fit(
    features: Float[np.ndarray, 'examples dim'],
    label: Int[np.ndarray, ' examples'],
    num_classes: int,
    *,
    C: float,
    max_iterations: int = 1000,
    tolerance: float = 1e-8,
    start: Fit | None = None,
) -> Fit:
    """Multinomial logistic regression by L-BFGS-B in float64.

    minimises  C · sum_i CE(x_i W + b, y_i) + ½ ‖W‖²  (scikit-learn's objective), divided by C · N.

    For two classes scikit-learn has one column w = W₂ - W₁, which at its 2 C is the same classifier.

    Args:
      features: x.
      label: y.
      num_classes: K.
      C: inverse strength of the penalty, above 0.
      max_iterations: of L-BFGS.
      tolerance: largest component of the gradient at which it stops.
      start: where from; zero unless given.
    """
    x, (count, dim) = features.astype(np.float64), features.shape
    penalty = 1 / (C * count)
    rows = np.arange(count)

    def value_and_gradient(theta):
        kernel, bias = theta[: dim * num_classes].reshape(dim, num_classes), theta[dim * num_classes :]
        log_p = _log_softmax(x @ kernel + bias)
        error = np.exp(log_p)
        error[rows, label] -= 1
        error /= count
        value = -np.mean(log_p[rows, label]) + penalty / 2 * np.sum(kernel**2)
        return value, np.concatenate([(x.T @ error + penalty * kernel).ravel(), error.sum(0)])

    zero = np.zeros((dim + 1) * num_classes)
    found = scipy.optimize.minimize(
        value_and_gradient,
        zero if start is None else np.concatenate([start.kernel.ravel(), start.bias]),
        method='L-BFGS-B',
        jac=True,
        options={
            'maxiter': max_iterations,
            'maxfun': 4 * max_iterations,
            'gtol': tolerance,
            'ftol': 1e-14,
            'maxls': 50,
        },
    )
    kernel, bias = found.x[: dim * num_classes].reshape(dim, num_classes), found.x[dim * num_classes :]
    loss = found.fun - penalty / 2 * np.sum(kernel**2)
    return Fit(kernel, bias, float(loss), int(found.nit), found.status != LIMIT)


def accuracy(fitted: Fit, features: Float[np.ndarray, 'examples dim'], label: Int[np.ndarray, ' examples']) -> float:
    """Share of examples whose highest logit is the label's."""
    return float(np.mean(np.argmax(features @ fitted.kernel + fitted.bias, 1) == label))


def search(
    score: Callable[[float], float], *, low: float, high: float, first_step: float, last_step: float
) -> dict[float, float]:
    """Every value tried, and its score: a grid from `low` to `high`, then halved steps to both sides of the best value.

    Of equal scores the smaller value, here the stronger penalty, counts as the best.
    """
    grid = np.arange(low, high + first_step / 2, first_step).tolist()
    scores = {value: score(value) for value in grid}
    step = first_step
    while step > last_step:
        step /= 2
        best = best_of(scores)
        for value in (best - step, best + step):
            if low <= value <= high and value not in scores:
                scores[value] = score(value)
    return scores


def best_of(scores: Mapping[float, float]) -> float:
    """The smallest value that has the highest score."""
    return max(sorted(scores), key=scores.__getitem__)


def probe(config: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """Fits the head of a config's network to its data and writes a run directory like training's; returns its summary.

    Args:
      config: resolved; its stages and objective do not matter, its `probe` holds the fields of `Protocol`.
      workdir: of the run.

    Raises:
      UserError: the head is not linear, the data have no labels or no held-out split, or the config is bad otherwise.
    """
    began, about = time.perf_counter(), workdir_lib.environment()
    protocol = call(Protocol, config['probe'], 'config.probe')
    if not (
        protocol.low <= protocol.high and min(protocol.first_step, protocol.last_step, protocol.max_iterations) > 0
    ):
        raise UserError('config.probe: low must not be above high, and steps and max_iterations be above 0')
    config = as_probe(config)
    workdir_lib.holds_run(workdir, config)
    experiment = build(config)
    split = _held_out(config, experiment, protocol)
    mesh = mesh_lib.mesh_from(config, 'eval_batch_size')
    state = initial_state(experiment, mesh)
    head = state.params.get('head', {})
    if set(head) != {'kernel', 'bias'}:
        raise UserError(
            f"config.model.head: a probe fits a kernel and a bias, and it has {', '.join(head)}; use 'linear'"
        )
    workdir_lib.claim(workdir, config)
    log = workdir_lib.MetricsLog(workdir, [], resume_step=0)
    by = split if protocol.C is None else 'last'
    selection = selection_from(by, list(experiment.data.eval), list(experiment.data.test))
    run = Run(
        workdir,
        experiment,
        mesh,
        layouts(experiment, mesh),
        selection,
        None,  # a fit is one step: there is nothing to resume
        log,
        lambda objective: create_eval_step(objective.predict),
        lambda: time.perf_counter() - began,
    )
    seen = with_features(_as_evaluated(run, split), state, 0)
    if 'features' not in seen.experiment.data.streams['train'].batch_at(0):
        raise UserError('config.model: its features cannot be computed once, for the reason above')
    chosen, fitted, figures = fit_and_refit(seen, split, protocol, log)
    final = final_figures(seen, _with_head(state, fitted, mesh), Place(0, 0), {})
    if fitted is not chosen:  # the last fit has seen the split that chose: its figures are those that it was chosen by
        objective, held_out = seen.experiment.stages[0].objective, {split: experiment.data.eval[split]}
        final['metrics'] |= evaluate_splits(seen, _with_head(state, chosen, mesh), objective, held_out, store='')
    summary = {'steps': figures['tried'], **final, 'probe': figures}
    summary |= {'seconds': time.perf_counter() - began, **about}
    log.close()
    if jax.process_index() == 0:
        workdir_lib.write_json(workdir / 'summary.json', summary)
    return summary


def as_probe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run of one stage that trains the head, on cached features."""
    section = dict(config['data'])
    train = section['train']
    if isinstance(train, Mapping) and 'spec' not in train and set(train) != {'train'}:
        raise UserError(f"config.data.train: a probe learns from one stream, 'train', not {', '.join(train)}")
    # Two epochs: the features are computed for a stage that is sure to see every example.
    stage = {'name': 'probe', 'epochs': 2, 'train': [['head/.*', {'name': 'sgd', 'lr': 0.0}]]}
    changes = {'stages': [stage], 'objective': {'name': 'supervised'}, 'gradient': {'name': 'plain'}}
    return {**config, **changes, 'ema': 0.0, 'ema_from': 0.0, 'cache_features': True}


def fit_and_refit(run: Run, split: str | None, protocol: Protocol, log: Any) -> tuple[Fit, Fit, dict[str, Any]]:
    """Chooses the penalty, fits, and says what was found; the first fit has not seen what chose it."""
    data, config = run.experiment.data, run.experiment.config
    classes = len(data.class_names)
    source = data.streams['train'].loader.source
    train = _collected(eval_batches(source, batch_size=config['eval_batch_size']), 'config.data.train')
    options = {'num_classes': classes, 'max_iterations': protocol.max_iterations}
    if protocol.C is not None:
        fitted = fit(*train, C=protocol.C, **options)
        log.write(1, 0, {'probe/log10_C': float(np.log10(protocol.C)), 'train/loss': fitted.loss})
        return fitted, fitted, {'C': protocol.C, 'tried': 1, **_figures(fitted, protocol)}
    batches = map(_of_all_processes, data.batches(split, data.eval[split]))
    held_out = _collected(batches, f'config.data.eval.{split}')
    fits: dict[float, Fit] = {}

    def score(exponent):
        nearest = min(fits, key=lambda other: abs(other - exponent), default=None)
        fits[exponent] = fit(*train, C=10**exponent, start=fits.get(nearest), **options)
        found = accuracy(fits[exponent], *held_out)
        values = {'probe/log10_C': exponent, 'train/loss': fits[exponent].loss, f'{split}/accuracy': found}
        log.write(len(fits), 0, values)
        say(f'probe: C = 1e{exponent:g}  train/loss {fits[exponent].loss:.4g}  {split}/accuracy {found:.4f}')
        return found

    scores = search(score, **{k: getattr(protocol, k) for k in ('low', 'high', 'first_step', 'last_step')})
    best = best_of(scores)
    chosen = fitted = fits[best]
    if protocol.refit:
        both = tuple(np.concatenate(parts) for parts in zip(train, held_out, strict=True))
        fitted = fit(*both, C=10**best, start=chosen, **options)
    figures = {'C': 10**best, 'tried': len(scores), 'refit': protocol.refit, **_figures(fitted, protocol)}
    return chosen, fitted, figures


def _figures(fitted: Fit, protocol: Protocol) -> dict[str, Any]:
    if not fitted.converged:
        say(f'probe: not converged in {protocol.max_iterations} iterations; raise config.probe.max_iterations')
    return {'iterations': fitted.iterations, 'converged': fitted.converged, 'train/loss': fitted.loss}


def _held_out(config: Mapping[str, Any], experiment: Experiment, protocol: Protocol) -> str | None:
    """The split that chooses C; the one of `select_by`, or the first."""
    if protocol.C is not None:
        if not protocol.C > 0:
            raise UserError(f'config.probe.C: must be above 0, not {protocol.C}')
        return next(iter(experiment.data.eval), None)
    named = config['select_by'].partition('/')[0]
    split = named if named in experiment.data.eval else next(iter(experiment.data.eval), None)
    if split is None:
        raise UserError('config.data.eval: there is none to choose the penalty by; name a split, or set config.probe.C')
    return split


def _as_evaluated(run: Run, split: str | None) -> Run:
    """The run whose training examples are transformed as those of a split, or of the stream's own evaluation."""
    data = run.experiment.data
    transforms = data.eval_transforms[split or 'train']
    return run._replace(experiment=run.experiment._replace(data=data._replace(train_transforms={'train': transforms})))


def _collected(batches: Any, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] and labels [N] of all examples; L-BFGS would stop at once where one is not finite, as if converged."""
    parts = []
    for batch in batches:
        features, label, index = (batch[name][batch['mask'] > 0] for name in ('features', 'label', 'index'))
        bad = index[~np.isfinite(features).all(1)]
        if len(bad):
            raise UserError(
                f'{field}: example {bad[0]}: its features are not finite; mend or leave out the example, or compute and '
                'store them in float32: config.dtype, config.cache_dtype'
            )
        parts.append((features, label))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _of_all_processes(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The rows that the processes hold of a batch, together: each must choose the same penalty."""
    if jax.process_count() == 1:
        return batch
    fields = {name: batch[name] for name in ('features', 'label', 'mask', 'index')}
    return multihost_utils.process_allgather(fields, tiled=True)


def _with_head(state: TrainState, fitted: Fit, mesh: jax.sharding.Mesh) -> TrainState:
    head = {'kernel': fitted.kernel.astype(np.float32), 'bias': fitted.bias.astype(np.float32)}
    return state._replace(params={**state.params, 'head': mesh_lib.put_everywhere(head, mesh)})


def _log_softmax(logits: Float[np.ndarray, 'examples classes']) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
