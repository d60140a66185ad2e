"""The learning-rate range test (Smith 2015, arXiv:1506.01186, sec. 3.3): one short run whose rate grows from step to step."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from tl_jax import data as data_lib
from tl_jax import mesh as mesh_lib
from tl_jax.errors import UserError
from tl_jax.experiment import Experiment, build
from tl_jax.objectives import started
from tl_jax.state import TrainState, enter_stage, variables_of, with_variables
from tl_jax.step import create_train_step, layouts
from tl_jax.train import initial_state
from tl_jax.workdir import write_atomically, write_json

SMOOTHING = 0.98
DIVERGED = 4.0  # times the lowest loss


class RangeTest(NamedTuple):
    """What the test found.

    Attributes:
      rates: of the rule with the highest rate, one a step.
      losses: nats.
      smooth: the same, averaged over the steps before.
      steepest: the rate where the smoothed loss falls fastest in the rate's logarithm.
      tenth: a tenth of the rate where the smoothed loss is lowest.
    """

    rates: Float[np.ndarray, 'steps']
    losses: Float[np.ndarray, 'steps']
    smooth: Float[np.ndarray, 'steps']
    steepest: float
    tenth: float


def lr_range(
    config: Mapping[str, Any], workdir: Path, *, low: float = 1e-7, high: float = 10.0, steps: int = 100
) -> RangeTest:
    """Trains the first stage of a config with rates from `low` to `high`, equal factors apart, until the loss explodes.

    The rules keep the ratios of their rates; the highest gets the rates named here. Writes `lr_range.json` and
    `lr_range.png` into `workdir`, and nothing else.

    Args:
      config: resolved.
      workdir: a directory.
      low: the first rate.
      high: the rate after the last step.
      steps: how many.
    """
    if not 0 < low < high:
        raise UserError(f'--range: must be two rates, the lower one first, such as 1e-6,1; not {low:g},{high:g}')
    experiment = build({**config, 'ema': 0.0, 'ema_from': 0.0})
    stage = experiment.stages[0]
    if stage.objective.refresh:
        raise UserError(
            'config.objective: passes over whole data sets between steps, which a range test leaves out; choose a rate '
            'for another objective'
        )
    # Whatever is wrong with the rules is said by what builds them.
    experiment.partition(0, experiment.shapes(0)['params'])
    rules = ranged(experiment.rules(0), low, high)
    experiment = experiment._replace(stages=[stage._replace(rules=rules, steps=steps)])
    rates = np.array([low * (high / low) ** (step / steps) for step in range(steps)])
    losses = np.array(losses_of(experiment))
    found = judged(rates[: len(losses)], losses)
    if jax.process_index() == 0:
        write_json(workdir / 'lr_range.json', {k: np.asarray(v).tolist() for k, v in found._asdict().items()})
        write_atomically(workdir / 'lr_range.png', drawn(found))
    return found


def ranged(rules: Sequence[tuple[str, Any]], low: float, high: float) -> list[tuple[str, Any]]:
    """The rules with growing rates, in the ratios that they had."""

    def base(spec):
        lr = spec['lr']
        return lr['peak'] if isinstance(lr, Mapping) else lr

    bases = [base(spec) for _, spec in rules if spec is not None]
    if min(bases) <= 0:
        raise UserError('config.stages[0].train: a range test keeps the ratios of the rates; give each one above 0')
    highest = max(bases)

    def grown(spec):
        share = base(spec) / highest
        return {**spec, 'lr': {'name': 'exponential', 'peak': low * share, 'end': high * share}}

    return [(regex, None if spec is None else grown(spec)) for regex, spec in rules]


def losses_of(experiment: Experiment) -> list[float]:
    """The loss of each step of the only stage, up to where it explodes."""
    config, stage = experiment.config, experiment.stages[0]
    mesh = mesh_lib.mesh_from(config, 'batch_size')
    layout = layouts(experiment, mesh)(0)

    def enter(state: TrainState) -> TrainState:
        state = with_variables(state, started(stage.objective, variables_of(state)))
        return enter_stage(state, layout.partition, ema=0.0)

    state = jax.jit(enter, out_shardings=layout.shardings)(initial_state(experiment, mesh))
    step = jax.jit(
        create_train_step(
            stage.objective, stage.gradient, layout.partition, config['clip_norm'], 0.0, steps=stage.steps
        ),
        donate_argnums=0,
        out_shardings=(layout.shardings, None),
    )
    losses: list[float] = []
    batches = data_lib.iterate(experiment.streams(0), 0, jax.process_index(), jax.process_count())
    try:
        for _ in range(stage.steps):
            state, metrics = step(state, mesh_lib.put_batch(next(batches), mesh))
            loss = float(next(value for name, value in metrics.items() if name.endswith('/loss')))
            if not np.isfinite(loss):
                break
            losses.append(loss)
            if loss > DIVERGED * min(losses) and len(losses) > stage.steps // 10:
                break
    finally:
        batches.close()
    return losses


def judged(rates: np.ndarray, losses: np.ndarray) -> RangeTest:
    """Smooths the losses, as fastai does, and reads the two rates from them."""
    if len(losses) < 3:
        raise UserError('--range: the loss explodes within three steps; begin with a lower rate')
    mean, smooth = 0.0, np.empty(len(losses))
    for step, loss in enumerate(losses):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smooth[step] = mean / (1 - SMOOTHING ** (step + 1))
    lowest = int(np.argmin(smooth))
    # The mean of the first few losses is hardly one.
    begin = min(len(losses) // 10, max(lowest - 2, 0))
    fall = slice(begin, max(lowest + 1, begin + 3))
    slope = np.gradient(smooth[fall], np.log(rates[fall]))
    return RangeTest(rates, losses, smooth, float(rates[fall][np.argmin(slope)]), float(rates[lowest] / 10))


def drawn(found: RangeTest) -> bytes:
    """The loss by the rate, with both suggestions, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout='constrained')
    axes = figure.subplots()
    axes.semilogx(found.rates, found.losses, color='0.75', linewidth=1)
    axes.semilogx(found.rates, found.smooth, color='C0', label='smoothed')
    axes.axvline(found.steepest, color='C1', label=f'steepest descent: {found.steepest:.2g}')
    axes.axvline(found.tenth, color='C2', linestyle='--', label=f'lowest / 10: {found.tenth:.2g}')
    low, high = min(found.smooth), found.smooth[0]
    axes.set(xlabel='learning rate', ylabel='training loss', ylim=(low - 0.1 * abs(high - low), 1.5 * high))
    axes.legend(frameon=False)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()
