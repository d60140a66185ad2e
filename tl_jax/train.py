"""The loop: one function trains every method, on any mesh, through any stages, and resumes exactly."""

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from tl_jax import data as data_lib
from tl_jax import mesh as mesh_lib
from tl_jax import trees
from tl_jax import workdir as workdir_lib
from tl_jax.checkpoint import Checkpoints, Place
from tl_jax.config import resolve
from tl_jax.evaluate import create_eval_step
from tl_jax.experiment import Experiment, build, bytes_of, inherited, parameter_count
from tl_jax.features import with_features
from tl_jax.guard import settle
from tl_jax.objectives import Objective, started
from tl_jax.optimizers import Partition
from tl_jax.progress import Progress, say
from tl_jax.run import Run, evaluate_splits, final_figures, fixed_figures
from tl_jax.selection import selection_from
from tl_jax.state import TrainState, create_state, enter_stage, variables_of, with_variables
from tl_jax.step import create_train_step, layouts
from tl_jax.teaching import with_fixed_networks


class Preempted(Exception):
    """The run was asked to stop and has saved; the same command resumes it."""


def train_and_evaluate(config: Mapping[str, Any], workdir: str | Path) -> TrainState:
    """Trains what a config says and returns the selected state; its directory holds all that happened.

    Args:
      config: see `tl_jax.config.DEFAULTS`.
      workdir: of this run; started again with the same config, it resumes where it stopped, bit for bit.

    Raises:
      UserError: the input is bad, or training became non-finite.
      Preempted: SIGTERM came; everything is saved.
    """
    config, workdir, about = resolve(config), Path(workdir), workdir_lib.environment()
    start = time.perf_counter()
    mesh = mesh_lib.mesh_from(config, 'batch_size', 'eval_batch_size')
    experiment = build(config)
    records = workdir_lib.read_records(workdir / workdir_lib.METRICS)
    layout_of = layouts(experiment, mesh, records)
    for number in range(len(experiment.stages)):  # every rule is tried before the first step
        layout_of(number)
    selection = selection_from(
        config['select_by'],
        list(experiment.data.eval),
        list(experiment.data.test),
        patience=config['patience'],
        **({'metrics': None} if any(stage.objective.figures for stage in experiment.stages) else {}),
    )
    # Nothing is written before the weights are read: a bad checkpoint leaves no directory behind.
    state = None if workdir_lib.holds_run(workdir, config) else initial_state(experiment, mesh)
    workdir_lib.claim(workdir, config)
    checkpoints = Checkpoints(workdir, keep=config['keep'])
    restored = checkpoints.restore_latest(layout_of)
    if restored:
        say(f'resuming {workdir} at step {int(restored[0].step)}')
    state, place = restored or (state or initial_state(experiment, mesh), None)
    log = workdir_lib.MetricsLog(workdir, records, resume_step=int(state.step))
    before = next((r['seconds'] for r in reversed(log.records) if 'seconds' in r), 0.0)
    eval_step_of = functools.cache(lambda o: create_eval_step(o.predict, classification=o.figures is None))
    seconds = lambda: before + time.perf_counter() - start
    run = Run(workdir, experiment, mesh, layout_of, selection, checkpoints, log, eval_step_of, seconds)

    with sigterm() as asked_to_stop, contextlib.closing(log), contextlib.closing(checkpoints):
        for number in range(place.stage if place else 0, len(experiment.stages)):
            if place is None or place.stage != number:
                place = Place(number, int(state.step))
                state = begin_stage(run, state, number)
            seen = with_features(with_fixed_networks(run, state, number), state, number)
            state = train_stage(seen, state, place, asked_to_stop)
        checkpoints.wait()
        comparable = [r for r in log.records if r['stage'] >= experiment.first_comparable]
        steps, best = int(state.step), selection.best(comparable)
        if best and best['step'] != steps:
            state, place = checkpoints.restore(best['step'], layout_of)
            seen = seen if place.stage == number else with_features(run, state, place.stage)
        # What was spent counts to the last step, whichever checkpoint is chosen: the choice has seen them all.
        spent = experiment.stages[-1].gradient.figures(steps - place.first_step)
        figures = {**final_figures(seen, state, place, spent), **fixed_figures(run, state, place)}
        summary = {'steps': steps, **figures, 'seconds': seconds(), **about}
        if jax.process_index() == 0:
            workdir_lib.write_json(workdir / 'summary.json', summary)
        if jax.process_count() > 1:  # where one has returned, the others find the run finished
            multihost_utils.sync_global_devices('summary.json')
    return state


def train_stage(run: Run, state: TrainState, place: Place, asked_to_stop: threading.Event) -> TrainState:
    """Runs one stage from wherever `state` is in it to its end; the loop."""
    config, data = run.experiment.config, run.experiment.data
    layout, stage = run.layout_of(place.stage), run.experiment.stages[place.stage]
    objective, gradient = stage.objective, stage.gradient
    step, first, end = int(state.step), place.first_step, place.first_step + stage.steps
    watched = {**data.eval, **(data.test if run.selection.oracle else {})}
    train_step = jax.jit(
        create_train_step(
            objective,
            gradient,
            layout.partition,
            config['clip_norm'],
            config['ema'],
            first_step=first,
            steps=stage.steps,
            ema_from=config['ema_from'],
        ),
        donate_argnums=0,
        out_shardings=(layout.shardings, None),
    )
    progress = Progress(stage.name, first, end, config['batch_size'])
    pending: list[dict[str, Any]] = []
    batches = data_lib.iterate(run.experiment.streams(place.stage), step, jax.process_index(), jax.process_count())
    with contextlib.closing(batches):
        while step < end and not run.selection.exhausted(run.log.records, place.stage, config['patience']):
            if objective.refresh and (step == first or due(step - first, config['refresh_every'])):
                state = refreshed(run, state, objective)
            state, metrics = train_step(state, mesh_lib.put_batch(next(batches), run.mesh))
            step += 1
            pending.append(metrics)
            last, stop = step == end, mesh_lib.preempted(asked_to_stop.is_set(), step)
            evaluating = bool(watched) and (last or due(step - first, config['eval_every']))
            saving = last or stop or due(step - first, config['checkpoint_every'])
            saving |= evaluating and (bool(run.selection.field) or not config['checkpoint_every'])
            if evaluating or saving or due(step - first, config['log_every']):
                values = settle(pending, step, objective, run.experiment.streams(place.stage), layout.partition)
                values |= learning_rates(layout.partition, step - 1 - first)
                values |= {'examples_per_second': progress.rate(step), 'seconds': run.seconds()}
                run.log.write(step, place.stage, values)
                progress.show(step, values)
                pending = []
            spent = gradient.figures(step - first) if last or due(step - first, config['eval_every']) else {}
            if spent:
                run.log.write(step, place.stage, spent)
                progress.show(step, spent, keep=True)
            # Patience may end the stage at any evaluation.
            measured = layout.partition.figures(state.opt_state) if last or evaluating else {}
            if measured:
                run.log.write(step, place.stage, measured)
            score = None
            if evaluating:
                values = evaluate_splits(run, state, objective, watched)
                run.log.write(step, place.stage, values)
                progress.show(step, values, keep=True)
                score = run.selection.score(values) if place.stage >= run.experiment.first_comparable else None
            if saving:
                run.checkpoints.save(state, place, layout.partition.trainable, score=score)
            if stop:
                run.checkpoints.wait()
                raise Preempted(
                    f'{run.workdir}: stopped by SIGTERM, saved at step {step}; resume with the same command'
                )
    return state


def initial_state(experiment: Experiment, mesh: jax.sharding.Mesh) -> TrainState:
    """Initialises, which also loads pretrained weights; what a stage adds is built by `begin_stage` from the result."""
    seed = experiment.config['seed']
    variables = experiment.stages[0].init(jax.random.key(seed), experiment.batch)
    return mesh_lib.put_everywhere(create_state(variables, seed), mesh)


def begin_stage(run: Run, state: TrainState, number: int) -> TrainState:
    """Builds what the stage adds to the state, stores what it leaves alone, and says what it trains.

    In this order: the roles of a new objective (those of the stage before are taken over), what it copies from them, the
    optimizer and the averages.
    """
    experiment, layout = run.experiment, run.layout_of(number)
    stage, ema, config = experiment.stages[number], experiment.config['ema'], experiment.config
    if number and experiment.begins(number):
        key = jax.random.fold_in(jax.random.key(config['seed']), number)
        fresh = mesh_lib.put_everywhere(stage.init(key, experiment.batch), run.mesh)
        variables = inherited(fresh, variables_of(state), f'config.stages[{number}].objective')
        state = with_variables(state, variables)

    def enter(state):
        if experiment.begins(number):
            state = with_variables(state, started(stage.objective, variables_of(state)))
        return enter_stage(state, layout.partition, ema=ema)

    state = jax.jit(enter, out_shardings=layout.shardings)(state)
    if config['report_before'] and number == len(experiment.stages) - 1:
        evaluate_splits(run, state, stage.objective, experiment.data.splits, store='before')
    run.checkpoints.save_frozen(state, number, layout.partition.trainable)
    trained, frozen = trees.split(state.params, layout.partition.trainable.__contains__)
    say(
        f'{stage.name}: trains {parameter_count(trained):,} parameters, '
        f'{parameter_count(frozen):,} frozen; optimizer state {bytes_of(state.opt_state) / 1e6:.2f} MB'
    )
    return state


def due(done: int, every: int) -> bool:
    """Whether something that happens every so many steps of a stage happens after `done` of them."""
    return every > 0 and done % every == 0


def refreshed(run: Run, state: TrainState, objective: Objective) -> TrainState:
    """The state after the objective's pass over whole data sets."""
    data = run.experiment.data

    def batches(stream):
        for batch in data.batches(stream, data.sources[stream]):
            yield mesh_lib.put_batch(batch, run.mesh)

    changed = mesh_lib.to_host(objective.refresh(variables_of(state), batches))
    where = {name: jax.tree.map(lambda leaf: leaf.sharding, state.collections[name]) for name in changed}
    return state._replace(collections={**state.collections, **mesh_lib.put(changed, where)})


def learning_rates(partition: Partition, step: int) -> dict[str, float]:
    """The learning rate of each rule at a step of the stage."""
    rates = {rule: float(schedule(step)) for rule, schedule in partition.schedules.items()}
    return (
        {'lr': next(iter(rates.values()))} if len(rates) == 1 else {f'lr/{rule}': rate for rule, rate in rates.items()}
    )


@contextlib.contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, in place of ending the process, while the context lasts."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, previous)
