"""Search over a config's fields: Optuna proposes, local processes train, the evaluation split decides.

A config file's `space()` gives `{field: dict(low=1e-4, high=1e-1, log=True)}` or `{field: [choices]}`; two integers as ends
give integers. In the search's directory:

    trial0007/     a run as any other; what it printed is in trial0007.log
    search.db      what was proposed and found; a search that was stopped goes on from it
    best.json      the winner; trials.json, table.md, report.html: all of them

The proposals are by TPE (Bergstra et al. 2011), and a trial whose best evaluation so far is below the median of the others at
the same step is stopped.
"""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from tl_jax import config as config_lib
from tl_jax.errors import UserError
from tl_jax.experiment import Experiment, build
from tl_jax.progress import say
from tl_jax.selection import Selection, selection_from
from tl_jax.workdir import METRICS, read_json, read_records, write_json

Command = Callable[[Path, Mapping[str, Any]], Sequence[str]]
STARTUP = 5  # trials at random before TPE and the median have something to go by


class Worker(NamedTuple):
    """A trial and the process that runs it; None for one that an earlier search left running."""

    trial: optuna.trial.Trial
    folder: Path
    process: subprocess.Popen | None

    def running(self) -> bool:
        return self.process.poll() is None if self.process else left_running(self.folder) is not None


def search(
    space: Mapping[str, Any],
    workdir: Path,
    selection: Selection,
    command: Command,
    *,
    trials: int = 20,
    workers: int = 1,
    seed: int = 0,
    poll: float = 0.5,
) -> list[FrozenTrial]:
    """Runs trials until there are `trials`, those of an earlier search of the same directory among them.

    Args:
      space: see above.
      workdir: of the search.
      selection: the evaluation metric that decides; it is also what every trial selects its checkpoint by.
      command: (directory, {field: value}) -> the command that trains a trial, or goes on with it.
      trials: finished, stopped and failed ones together.
      workers: how many run at once.
      seed: of the proposals.
      poll: seconds between looks at the records.

    Raises:
      UserError: the space is malformed, it is another than that of the search before, or every trial failed.
    """
    proposed = {field: distribution(spec, field) for field, spec in space.items()}
    study = open_study(workdir, proposed, selection, seed)
    running: list[Worker] = []
    try:
        for frozen in study.get_trials(states=[TrialState.RUNNING]):
            trial = optuna.trial.Trial(study, frozen._trial_id)  # Optuna has no public way to take a trial up again
            for field, spec in proposed.items():  # killed while it was proposed, it is given what it lacks
                suggest(trial, field, spec)
            running.append(start(trial, workdir, space, command))
        while True:
            total = len(study.get_trials(deepcopy=False))
            while len(running) < workers and total < trials:
                running.append(start(study.ask(proposed), workdir, space, command))
                total += 1
            if not running:
                break
            time.sleep(poll)
            running = [worker for worker in running if not settled(study, worker, selection)]
    finally:
        for worker in running:
            stop(worker)
    done = study.get_trials()
    if not any(trial.state is TrialState.COMPLETE for trial in done):
        raise UserError(f'{workdir}: no trial finished; the last one said: {last_words(folder_of(workdir, done[-1]))}')
    return done


def checked(config: Mapping[str, Any], space: Mapping[str, Any]) -> Selection:
    """How a search over a config decides, once every choice of a list and both ends of a range have been tried by shape.

    Each is tried with the first values of the other fields.

    Raises:
      UserError: a field is not the config's, a value does not suit it, or nothing but the test split could decide.
    """
    values = {field: _tried(distribution(spec, field)) for field, spec in space.items()}
    first = {field: tried[0] for field, tried in values.items()}
    others = [{**first, field: value} for field, tried in values.items() for value in tried[1:]]
    resolved, *rest = [_resolved(config, chosen) for chosen in (first, *others)]
    experiment = _shaped(resolved)
    for other in rest:
        _shaped(other)
    data, own = experiment.data, any(stage.objective.figures for stage in experiment.stages)
    options = {'metrics': None} if own else {}
    selection = selection_from(experiment.config['select_by'], list(data.eval), list(data.test), **options)
    if not selection.field or selection.oracle:
        known = f'{next(iter(data.eval))}/accuracy' if data.eval else 'val/accuracy, with a config.data.eval'
        raise UserError(f"config.select_by: '{experiment.config['select_by']}' cannot decide a search; choose {known}")
    return selection


def open_study(
    workdir: Path, proposed: Mapping[str, BaseDistribution], selection: Selection, seed: int
) -> optuna.Study:
    """The study in `search.db`, new or as it was left."""
    workdir.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f'sqlite:///{workdir.absolute()}/search.db',
        study_name='search',
        load_if_exists=True,
        direction='maximize' if selection.sign > 0 else 'minimize',
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
    )
    before, here = study.user_attrs.get('about'), f'{selection}: {dict(sorted(proposed.items()))}'
    if before not in (None, here):
        raise UserError(f'{workdir}: holds a search of another space or metric; use another --workdir or delete it')
    study.set_user_attr('about', here)
    # The sampler's state is not stored: with the same seed a search that goes on would propose its first trials again.
    drawn = seed + len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=drawn, n_startup_trials=STARTUP, constant_liar=True)
    return study


def distribution(spec: Any, field: str) -> BaseDistribution:
    """What a field of `space()` says."""
    if isinstance(spec, list | tuple) and spec:
        try:
            return CategoricalDistribution([json.dumps(choice) for choice in spec])
        except (TypeError, ValueError) as error:
            raise UserError(
                f'space(): {field}: a choice must be plain data, such as a number or a dict: {error}'
            ) from None
    known = {'low', 'high', 'log'}
    if not isinstance(spec, Mapping) or not {'low', 'high'} <= spec.keys() <= known:
        raise UserError(f'space(): {field}: must be dict(low=…, high=…, log=True) or a list of choices, not {spec!r}')
    low, high, log = spec['low'], spec['high'], bool(spec.get('log', False))
    for end in ('low', 'high'):
        config_lib.check_type(spec[end], float, f'space(): {field}.{end}')
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f'space(): {field}: low {low} and high {high} must be finite')
    if not low <= high or (log and low <= 0):
        raise UserError(f'space(): {field}: low {low} and high {high} must rise, and be above 0 with log')
    whole = isinstance(low, int) and isinstance(high, int)
    return IntDistribution(low, high, log=log) if whole else FloatDistribution(low, high, log=log)


def suggest(trial: optuna.trial.Trial, field: str, spec: BaseDistribution) -> Any:
    """The trial's value of a field, the one it has where it has one."""
    if isinstance(spec, CategoricalDistribution):
        return trial.suggest_categorical(field, spec.choices)
    of_kind = trial.suggest_int if isinstance(spec, IntDistribution) else trial.suggest_float
    return of_kind(field, spec.low, spec.high, log=spec.log)


def values_of(params: Mapping[str, Any], space: Mapping[str, Any]) -> dict[str, Any]:
    """`{field: value}` of a trial; choices are stored as JSON, since Optuna keeps scalars alone."""
    listed = {field for field, spec in space.items() if not isinstance(spec, Mapping)}
    return {field: json.loads(value) if field in listed else value for field, value in params.items()}


def start(trial: optuna.trial.Trial, workdir: Path, space: Mapping[str, Any], command: Command) -> Worker:
    """Starts or resumes a trial in its directory."""
    folder = folder_of(workdir, trial)
    if left_running(folder) is not None:
        return Worker(trial, folder, None)
    values = values_of(trial.params, space)
    folder.mkdir(parents=True, exist_ok=True)
    log = workdir / f'{folder.name}.log'
    with log.open('a') as output:
        process = subprocess.Popen(command(folder, values), stdout=output, stderr=subprocess.STDOUT)
    pid_file(folder).write_text(str(process.pid))
    say(f'{folder.name}: ' + '  '.join(f'{field}={_short(value)}' for field, value in values.items()))
    return Worker(trial, folder, process)


def settled(study: optuna.Study, worker: Worker, selection: Selection) -> bool:
    """Reports what a trial has recorded; whether it is over."""
    trial, folder = worker.trial, worker.folder
    summary = folder / 'summary.json'
    running = worker.running()
    best: float | None = None
    seen = study.get_trials(deepcopy=False)[trial.number].intermediate_values
    for record in read_records(folder / METRICS):
        if selection.field in record:
            value = record[selection.field]
            best = value if best is None else max(best, value, key=lambda v: selection.sign * v)
            if record['step'] not in seen:
                trial.report(best, record['step'])
    if running:
        if best is None or not trial.should_prune():
            return False
        stop(worker)
        if not summary.exists():  # else it came to its end first
            study.tell(trial, state=TrialState.PRUNED)
            say(f'{folder.name}: stopped at {selection.field} {best:.4f}, below the median')
            return True
    pid_file(folder).unlink(missing_ok=True)
    if not summary.exists():
        study.tell(trial, state=TrialState.FAIL)
        say(f'{folder.name}: failed: {last_words(folder)}')
        return True
    value = read_json(summary)['metrics'][selection.field]
    study.tell(trial, value)
    say(f'{folder.name}: {selection.field} {value:.4f}')
    return True


def stop(worker: Worker) -> None:
    """Asks a trial's process to save and end, and waits for it."""
    if worker.process is None:
        pid = left_running(worker.folder)
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
        while left_running(worker.folder) is not None:
            time.sleep(0.1)
    elif worker.process.poll() is None:
        worker.process.terminate()
        worker.process.wait()
    pid_file(worker.folder).unlink(missing_ok=True)


def left_running(folder: Path) -> int | None:
    """The process that an earlier search left at work on a trial, if it still is."""
    try:
        pid = int(pid_file(folder).read_text())
        about = Path(f'/proc/{pid}')
        arguments = os.fsdecode((about / 'cmdline').read_bytes()).split('\0')
        began_in = (about / 'cwd').readlink()
    except (OSError, ValueError):
        return None
    # The number may have gone to another process since; and either search may have named the folder from where it was.
    works_on = [began_in / a.removeprefix('--workdir=') for a in arguments if a.startswith('--workdir=')]
    return pid if folder.resolve() in [path.resolve() for path in works_on] else None


def pid_file(folder: Path) -> Path:
    """Beside the trial's directory, which is the run's alone."""
    return folder.with_name(f'{folder.name}.pid')


def last_words(folder: Path) -> str:
    """The last line that a trial printed."""
    log = folder.with_name(f'{folder.name}.log')
    lines = log.read_text().strip().splitlines() if log.exists() else []
    return lines[-1] if lines else 'nothing'


def folder_of(workdir: Path, trial: FrozenTrial | optuna.trial.Trial) -> Path:
    return workdir / f'trial{trial.number:04d}'


def launched(spec: str, assignments: Sequence[str], program: Path) -> Command:
    """The command of a trial: `launch.py` with this config, these assignments and the trial's values."""

    def command(folder: Path, values: Mapping[str, Any]) -> list[str]:
        fields = [*(f'--config.{a}' for a in assignments), *(f'--config.{f}={v!r}' for f, v in values.items())]
        return [sys.executable, str(program), f'--config={spec}', f'--workdir={folder}', *fields]

    return command


def write_results(
    workdir: Path, trials: Sequence[FrozenTrial], selection: Selection, space: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes `trials.json` and `best.json`; returns the latter."""
    rows = [
        {
            'trial': folder_of(workdir, t).name,
            'state': t.state.name.lower(),
            'value': t.value if t.state is TrialState.COMPLETE else last_value(t),
            'seconds': t.duration.total_seconds() if t.duration else None,
            'fields': values_of(t.params, space),
        }
        for t in trials
    ]
    finished = [row for row in rows if row['state'] == 'complete']
    best = max(finished, key=lambda row: selection.sign * row['value'])
    write_json(workdir / 'trials.json', {'select_by': str(selection), 'trials': rows})
    write_json(workdir / 'best.json', {'select_by': str(selection), **best})
    return best


def last_value(trial: FrozenTrial) -> float | None:
    """The best evaluation of a trial that did not finish; reports are of the best so far."""
    return trial.intermediate_values[trial.last_step] if trial.intermediate_values else None


def _tried(spec: BaseDistribution) -> list[Any]:
    """The values of a field to try before the search."""
    if isinstance(spec, CategoricalDistribution):
        return [json.loads(choice) for choice in spec.choices]
    return list(dict.fromkeys((spec.low, spec.high)))


def _resolved(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved config with fields of the space set."""
    assignments = (f'{field}={value!r}' for field, value in chosen.items())
    return config_lib.resolved_with(lambda: copy.deepcopy(config), assignments, 'space()')


def _shaped(config: Mapping[str, Any]) -> Experiment:
    """The experiment of a resolved config, every rule of which has been tried."""
    experiment = build(config)
    for number in range(len(experiment.stages)):
        experiment.partition(number, experiment.shapes(number)['params'])
    return experiment


def _short(value: Any) -> str:
    return f'{value:.3g}' if isinstance(value, float) else str(value)
