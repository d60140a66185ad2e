"""What each mode of `launch.py` does, from its flags to what it prints."""

import csv
import glob
import io
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tl_jax import config as config_lib
from tl_jax import data as data_lib
from tl_jax import evaluate as evaluate_lib
from tl_jax import mesh as mesh_lib
from tl_jax import overview, pretrained, report, train
from tl_jax import workdir as workdir_lib
from tl_jax.errors import UserError
from tl_jax.experiment_data import data_from
from tl_jax.finished import export_adapters, network, predict, trained
from tl_jax.merged_runs import folders_of, merge_runs
from tl_jax.probe import probe
from tl_jax.progress import say

Flags = Mapping[str, str]


def run_train(flags: Flags, assignments: Sequence[str]) -> None:
    """Trains one config, prints its figures and writes its page."""
    config = _config(flags, assignments)
    if 'dry_run' in flags:
        say(overview.describe(config_lib.resolve(config)))
        return
    workdir = _workdir(flags)
    train.train_and_evaluate(config, workdir)
    if jax.process_index() == 0:
        summary = workdir_lib.read_json(workdir / 'summary.json')
        figures = '  '.join(f'{k} {v:.4f}' for k, v in summary['metrics'].items())
        say(f'selected step {summary["selected_step"]} by {summary["select_by"]}: {figures}')
        say(f'report: {report.write_run_report(workdir)}')


def run_eval(flags: Flags, assignments: Sequence[str]) -> None:
    """Evaluates a finished run's model on the splits of its config, or of other data by `--config.data.test=…`."""
    workdir = _workdir(flags)
    config = config_lib.resolve(_config({'workdir': str(workdir)}, assignments))
    model = trained(workdir)
    data = data_from(config)
    if tuple(data.class_names) != model.class_names:
        raise UserError(f'config.data: its classes are not the ones that {workdir} was trained on')
    mesh = mesh_lib.mesh_from(config, 'eval_batch_size')
    step = evaluate_lib.create_eval_step(model.predict)
    placed = mesh_lib.put_everywhere(model.variables, mesh)
    for split, source in data.splits.items():
        figures, _ = evaluate_lib.evaluate(step, placed, data.batches(split, source), mesh)
        say(f'{split} ({source.length} examples): ' + '  '.join(f'{k} {v:.4f}' for k, v in figures.items()))


def run_predict(flags: Flags, assignments: Sequence[str]) -> None:
    """Writes a csv with a row for each image: file, predicted class, and each class's probability."""
    _refuse_assignments(assignments, 'predict')
    workdir = _workdir(flags)
    if 'files' not in flags:
        raise UserError("--files: name the images, such as --files='photos/*.jpg'")
    paths = _paths(flags['files'])
    folder = next((p for p in paths if Path(p).is_dir()), None)
    if folder:
        raise UserError(f"--files: {folder} is a folder; name the images in it, such as '{folder}/*.jpg'")
    model = trained(workdir)
    source = data_lib.open_files(paths, channels=model.input_shape[-1])
    predictions = predict(model, source, model.eval_transform)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['file', 'prediction', *model.class_names])
    for path, row in zip(paths, predictions.probabilities, strict=True):
        writer.writerow([path, model.class_names[row.argmax()], *(f'{p:.6f}' for p in row)])
    output = Path(flags.get('output', workdir / 'predictions.csv'))
    workdir_lib.write_atomically(output, text.getvalue())
    say(f'{len(paths)} predictions: {output}')


def run_export(flags: Flags, assignments: Sequence[str]) -> None:
    """Writes a finished run's network, or its adapters, under the names of another library, which then loads them."""
    workdir = _workdir(flags)
    if 'origin' not in flags or 'output' not in flags:
        raise UserError(
            '--origin, --output: say whose names to write, such as --origin=timm --output=model.safetensors'
        )
    _refuse_assignments(assignments, 'export')
    if flags['origin'] == 'peft':
        if 'merge' in flags:
            raise UserError('--merge: adapters for peft stay apart; leave it out, or name another --origin')
        names = export_adapters(workdir, Path(flags['output']))
    else:
        module, variables = network(workdir, merge=flags.get('merge', ''))
        names = pretrained.export_pretrained(flags['output'], variables, module, flags['origin'])
    say(f'{len(names)} tensors under the names of {flags["origin"]}: {flags["output"]}')


def run_sweep(flags: Flags, assignments: Sequence[str]) -> None:
    """Trains every variant that the config's `sweep()` yields, resuming what was begun, and prints their table."""
    if 'config' not in flags:
        raise UserError('--config: a sweep needs a config file')
    workdir, (module, arg) = _workdir(flags), config_lib.load_module(flags['config'])
    if 'trials' in flags or (hasattr(module, 'space') and not hasattr(module, 'sweep')):
        run_search(flags, assignments)
        return
    if not hasattr(module, 'sweep'):
        raise UserError(f'--config: {flags["config"]} defines no sweep(), which yields (variant, overrides)')
    if 'workers' in flags:
        raise UserError('--workers: is for a search over space(); the variants of a sweep() run one after the other')
    variants = [
        (variant, _variant(module, arg, variant, overrides, assignments))
        for variant, overrides in (module.sweep(arg) if arg else module.sweep())
    ]
    started = time.perf_counter()
    for number, (variant, config) in enumerate(variants):
        run = workdir / variant / f'seed{config["seed"]}'
        if (run / 'summary.json').exists() and workdir_lib.holds_run(run, config):
            continue
        train.train_and_evaluate(config, run)
        if jax.process_index() == 0:
            metrics = workdir_lib.read_json(run / 'summary.json')['metrics']
            figures = '  '.join(
                f'{k} {v:.4f}' for k, v in metrics.items() if k.endswith('accuracy') and 'balanced' not in k
            )
            say(f'[{number + 1}/{len(variants)}] {variant} seed {config["seed"]}: {figures}')
    if jax.process_index() == 0:
        page = report.write_sweep_report(workdir)
        say((workdir / 'table.md').read_text())
        say(f'{len(variants)} runs in {time.perf_counter() - started:.0f} s; report: {page}')


def run_merge(flags: Flags, assignments: Sequence[str]) -> None:
    """Merges the networks of finished runs, chosen by the held-out split of their config, into a run of its own."""
    workdir = _workdir(flags)
    if 'files' not in flags or 'method' not in flags:
        raise UserError(
            "--method, --files: say how and what to merge, such as --method=greedy_soup --files='runs/*/seed0'"
        )
    folders = folders_of(_paths(flags['files']))
    config = config_lib.resolve(_config({'workdir': str(folders[0])}, assignments))
    start = Path(flags['start']) if 'start' in flags else None
    summary = merge_runs(config, folders, start, flags['method'], workdir)
    if jax.process_index() == 0:
        say((workdir / 'candidates.csv').read_text())
    figures = '  '.join(f'{k} {v:.4f}' for k, v in summary['metrics'].items())
    say(f'{summary["merge"]["method"]}, chosen by {summary["select_by"]}: {figures}')


def run_probe(flags: Flags, assignments: Sequence[str]) -> None:
    """Fits the head of a config's network to convergence on frozen features, and writes a run like training's."""
    workdir = _workdir(flags)
    summary = probe(config_lib.resolve(_config(flags, assignments)), workdir)
    figures = '  '.join(f'{k} {v:.4f}' for k, v in summary['metrics'].items())
    say(f'C = {summary["probe"]["C"]:.4g}, {summary["probe"]["iterations"]} iterations: {figures}')
    if jax.process_index() == 0:
        say(f'report: {report.write_run_report(workdir)}')


def run_search(flags: Flags, assignments: Sequence[str]) -> None:
    """Searches the config file's `space()` for the fields with which the evaluation split likes the model best."""
    from tl_jax import search  # Optuna takes a second to import

    workdir, (module, arg) = _workdir(flags), config_lib.load_module(flags['config'])
    if not hasattr(module, 'space'):
        raise UserError(f'--config: {flags["config"]} defines no space(), which gives {{field: dict(low=…, high=…)}}')
    space = dict(module.space(arg) if arg else module.space())
    config = _config(flags, assignments)
    selection = search.checked(config, space)
    command = search.launched(flags['config'], assignments, Path(__file__).resolve().parent.parent / 'launch.py')
    counts = {name: _count(flags, name) for name in ('trials', 'workers') if name in flags}
    trials = search.search(space, workdir, selection, command, seed=config.seed, **counts)
    best = search.write_results(workdir, trials, selection, space)
    page = report.write_search_report(workdir)
    say((workdir / 'table.md').read_text())
    say(f'best: {best["trial"]}, {selection} {best["value"]:.4f}: {best["fields"]}; report: {page}')


def run_lr_range(flags: Flags, assignments: Sequence[str]) -> None:
    """Trains the config's first stage for a hundred steps with a growing learning rate, and suggests one."""
    from tl_jax.lr_range import lr_range

    ends = {}
    if 'range' in flags:
        try:
            ends = dict(zip(('low', 'high'), map(float, flags['range'].split(',')), strict=True))
        except ValueError:
            raise UserError(f'--range: must be two rates, such as 1e-6,1; not {flags["range"]}') from None
    workdir = _workdir(flags)
    found = lr_range(config_lib.resolve(_config(flags, assignments)), workdir, **ends)
    say(f'steepest descent at {found.steepest:.2g}; a tenth of the lowest: {found.tenth:.2g}')
    say(f'the highest rate of the first stage is meant; the others keep their ratios to it: {workdir / "lr_range.png"}')


JOBS: Mapping[str, Callable[[Flags, Sequence[str]], None]] = {
    'train': run_train,
    'eval': run_eval,
    'predict': run_predict,
    'probe': run_probe,
    'sweep': run_sweep,
    'export': run_export,
    'lr_range': run_lr_range,
    'merge': run_merge,
}


def _variant(
    module: types.ModuleType, arg: str, variant: str, overrides: Mapping[str, Any], assignments: Sequence[str]
) -> dict[str, Any]:
    """The resolved config of one variant of a sweep."""
    return config_lib.resolved_with(
        lambda: config_lib.with_defaults(module.get_config(','.join(filter(None, (arg, variant))))),
        (*(f'{k}={v!r}' for k, v in overrides.items()), *assignments),
        f'sweep(): {variant}',
    )


def _refuse_assignments(assignments: Sequence[str], mode: str) -> None:
    if assignments:
        raise UserError(f'--config.{assignments[0]}: --mode={mode} uses the finished run as it is; leave it out')


def _count(flags: Flags, name: str) -> int:
    if not flags[name].isdecimal() or int(flags[name]) < 1:
        raise UserError(f'--{name}: must be a whole number above 0, not {flags[name]}')
    return int(flags[name])


def _paths(files: str) -> list[str]:
    """What a comma-separated list of patterns names; a pattern that finds nothing stays, for the reader to refuse."""
    return [path for item in files.split(',') for path in (sorted(glob.glob(item)) or [item])]


def _workdir(flags: Flags) -> Path:
    if 'workdir' not in flags:
        raise UserError('--workdir: name the directory of the run')
    return Path(flags['workdir'])


def _config(flags: Flags, assignments: Sequence[str]) -> Any:
    spec = flags.get('config') or str(_workdir(flags) / 'config.json')
    config = config_lib.load(spec)
    for assignment in assignments:
        config_lib.override(config, assignment)
    return config
