"""Runs what is missing of a paper table, and prints it: paper · ours · seeds · selection · commit.

python -m experiments.run amazon --workdir=runs/amazon
python -m experiments.run amazon --only='DANN/*' --seeds=1
python -m experiments.run amazon --print

A run that was interrupted goes on where it stopped, a finished one is skipped, and one that fails does not stop the
others. Every finished run leaves `experiments/results/<table>/<cell>/seed<N>.json`; the table, `table.md` and
`table.html` beside them, is made from these files alone. `--quick` runs tiny variants in `<workdir>/quick` and leaves
their results there. The page of one run: `python -m tl_jax.report <workdir>/<cell>/seed<N>`.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from experiments import collect
from experiments.table import (
    HERE,
    REVERSE,
    Cell,
    Table,
    candidates_of,
    config_of,
    fingerprint,
    load_table,
    matching,
    seeds_from,
)
from tl_jax import workdir as workdir_lib
from tl_jax.errors import UserError, nearest
from tl_jax.report.table_page import format_paper_table, write_paper_table
from tl_jax.selection import direction

FLAGS = {
    'workdir': 'directory of the runs; runs/<table> unless given',
    'only': "cells to run, by name or pattern, separated by commas: --only='DANN/*,source/B>D'",
    'seeds': 'a count, or a list such as 0,1,4; the table’s unless given',
    'quick': 'tiny variants, apart from the results: shows that everything runs',
    'list': 'say what each cell is and what there is of it, and stop',
    'print': 'make the table from the committed results alone, and stop',
}


class Bench(NamedTuple):
    """A table and where its runs and results are; `train` is `(config, run directory) -> anything`."""

    table: Table
    workdir: Path
    results: Path
    quick: bool
    train: Callable[[Mapping[str, Any], Path], Any]


class Choice(NamedTuple):
    """A cell's run for a seed, and the scores of the candidates that it was chosen among (higher is better)."""

    candidate: str
    run: Path
    scores: Mapping[str, float]


def run_cells(bench: Bench, names: list[str], seeds: tuple[int, ...]) -> list[str]:
    """Runs the named cells where they lack a result. Returns a line for each that failed."""
    failed = []
    for name in names:
        for seed in seeds:
            try:
                if not has_result(bench, bench.table.cells[name], seed):
                    print(f'── {name}, seed {seed}', flush=True)
                    record(bench, bench.table.cells[name], seed)
            except UserError as error:
                failed.append(f'FAILED {name}, seed {seed}: {error}')
                print(failed[-1], file=sys.stderr, flush=True)
    return failed


def has_result(bench: Bench, cell: Cell, seed: int) -> bool:
    """Whether the run's JSON is there and was made from this config."""
    path = collect.result_path(bench.results, cell, seed)
    return path.is_file() and not collect.refusal(bench.table, cell, seed, path, bench.quick)


def record(bench: Bench, cell: Cell, seed: int) -> Path:
    """Runs what a cell lacks, writes its JSON unless that is there, and returns the directory of the chosen run."""
    choice = chosen(bench, cell, seed)
    if has_result(bench, cell, seed):
        return choice.run
    summary = workdir_lib.read_json(choice.run / 'summary.json')
    quick = ' --quick' if bench.quick else ''
    result = {
        'table': bench.table.name,
        'cell': cell.name,
        'seed': seed,
        'quick': bench.quick,
        'metrics': collect.measured(choice.run, cell.metric),
        'selection': {
            'rule': bench.table.selection,
            'checkpoint': summary.get('select_by'),
            'step': summary.get('selected_step'),
            'candidate': choice.candidate,
            'scores': choice.scores,
        },
        'steps': summary.get('steps'),
        'seconds': round(summary.get('seconds', 0.0), 2),
        'command': f"python -m experiments.run {bench.table.name} --only='{cell.name}' --seeds={seed},{quick}",
        'config': cell.config,
        'config_sha256': fingerprint(bench.table, cell, seed, quick=bench.quick),
        'commit': summary.get('commit'),
        'date': summary.get('started'),
        'machine': summary.get('device'),
        'versions': summary.get('versions'),
    }
    collect.write_result(collect.result_path(bench.results, cell, seed), result)
    return choice.run


def chosen(bench: Bench, cell: Cell, seed: int) -> Choice:
    """Trains what is missing of a cell's candidates and chooses among them by the table's rule."""
    runs = {label: trained(bench, cell, seed, label) for label in candidates_of(cell)}
    if not cell.candidates:
        return Choice('', runs[''], {})
    scores = {label: score(bench, cell, run) for label, run in runs.items()}
    best = max(scores, key=scores.__getitem__)
    run = trained(bench, cell, seed, best, refit=True) if cell.refit else runs[best]
    return Choice(best, run, scores)


def trained(bench: Bench, cell: Cell, seed: int, candidate: str, *, refit: bool = False) -> Path:
    """The directory of a finished run, trained or resumed if need be; first the cell that it comes after."""
    source = None
    if cell.after:
        first = seed if cell.after_seed is None else cell.after_seed
        base = record(bench, bench.table.cells[cell.after], first)
        source = os.path.relpath(base / 'model.safetensors')
    config = config_of(bench.table, cell, seed, candidate=candidate, source=source, quick=bench.quick, refit=refit)
    run = run_directory(bench, cell, seed, 'refit' if refit else candidate)
    finished(bench, config, run)
    return run


def finished(bench: Bench, config: Mapping[str, Any], run: Path) -> Mapping[str, Any]:
    """The summary of a run, trained or resumed if need be."""
    if not (workdir_lib.holds_run(run, config) and (run / 'summary.json').is_file()):
        bench.train(config, run)
    return workdir_lib.read_json(run / 'summary.json')


def run_directory(bench: Bench, cell: Cell, seed: int, candidate: str) -> Path:
    """`<workdir>/<cell>/seed<N>[/<candidate, or refit>]`; cells that differ by their metric alone share a run."""
    declared = lambda c: (c.config, c.overrides, c.after, c.into, c.after_seed, c.candidates, c.refit)
    first = next(c for c in bench.table.cells.values() if declared(c) == declared(cell))
    return bench.workdir / first.folder / f'seed{seed}' / quote(candidate, safe='=,')


def score(bench: Bench, cell: Cell, run: Path) -> float:
    """A candidate's score by the table's rule, higher is better.

    `reverse validation` (Ganin et al. 2016, arXiv:1505.07818, sec. 5.1.5, after Zhong et al. 2010): the accuracy on
    held-out labelled source examples of a network that learnt from this run's labels of the target. An evaluation
    split's metric is read from the summary. `oracle` takes the table's own figure, the test labels'.
    """
    rule = bench.table.selection
    if rule == REVERSE:
        from tl_jax.reverse import reverse_config

        run = Path(os.path.relpath(run))  # the reverse run's config names it: one spelling, whatever --workdir was
        config = reverse_config(workdir_lib.read_json(run / 'config.json'), run)
        return finished(bench, config, run.with_name(f'{run.name}.reverse'))['metrics']['source_val/accuracy']
    field = rule or workdir_lib.read_json(run / 'summary.json').get('select_by')
    field = cell.metric if field == 'oracle' else field
    field = f'{field}/accuracy' if field and '/' not in field else field
    return direction(field) * collect.measured(run, field)[field]


def inventory(bench: Bench, seeds: tuple[int, ...]) -> str:
    """A line a cell: which seeds have results, what was begun, and its config."""
    found, refused = collect.current_results(bench.table, bench.results, quick=bench.quick)
    width = max(map(len, bench.table.cells))
    lines = []
    for name, cell in bench.table.cells.items():
        done = [seed for seed in seeds if (name, seed) in found]
        begun = [s for s in seeds if s not in done and (bench.workdir / cell.folder / f'seed{s}').is_dir()]
        state = f'{len(done)}/{len(seeds)} seeds' + (f', begun: {begun}' if begun else '')
        after = f' after {cell.after}' if cell.after else ''
        several = f', {len(cell.candidates)} candidates' if cell.candidates else ''
        lines.append(f'{name:{width}}  {state:12}  {cell.config}{after}{several}')
    return '\n'.join([*lines, *refused])


def main(arguments: list[str]) -> int:
    if not arguments or '--help' in arguments:
        print(__doc__ + '\n' + '\n'.join(f'  --{name:8} {meaning}' for name, meaning in FLAGS.items()))
        return 0
    name, flags = parse(arguments)
    table, quick = load_table(name), 'quick' in flags
    asked = seeds_from(flags['seeds']) if 'seeds' in flags else table.seeds[:1] if quick else table.seeds
    names = select(table, flags.get('only', '*'))
    workdir = Path(flags.get('workdir', f'runs/{table.name}'))
    workdir, results = (
        (workdir / 'quick', workdir / 'quick/results') if quick else (workdir, HERE / 'results' / table.name)
    )
    bench = Bench(table, workdir, results, quick, _train)
    if 'list' in flags:
        print(inventory(bench, asked))
        return 0
    failed = [] if 'print' in flags else run_cells(bench, names, asked)
    expected = asked if quick else tuple(sorted({*table.seeds, *asked}))
    drawn = publish(bench, expected, failed)
    print(drawn)
    return 1 if failed else 0


def publish(bench: Bench, seeds: tuple[int, ...], failed: list[str]) -> str:
    """Writes table.md and table.html beside the results and returns the table for a terminal."""
    found, refused = collect.current_results(bench.table, bench.results, quick=bench.quick)
    drawn = collect.paper_table(bench.table, found, seeds=seeds, notes=refused, quick=bench.quick)
    write_paper_table(drawn, bench.results)
    return format_paper_table(drawn._replace(notes=(*drawn.notes, *failed))) + f'\n{bench.results / "table.html"}'


def parse(arguments: list[str]) -> tuple[str, dict[str, str]]:
    """Returns the table's name and the flags."""
    names = [argument for argument in arguments if not argument.startswith('--')]
    if len(names) != 1:
        raise UserError(f'name one table, such as `python -m experiments.run amazon`; got {names or "none"}')
    flags = {}
    for argument in arguments:
        if argument.startswith('--'):
            flag, _, value = argument.removeprefix('--').partition('=')
            if flag not in FLAGS:
                raise UserError(f'{argument}: unknown flag; {nearest(flag, FLAGS)}')
            flags[flag] = value
    return names[0], flags


def select(table: Table, only: str) -> list[str]:
    """The cells that `--only` names, in the table's order."""
    patterns = [pattern for pattern in only.split(',') if pattern]
    for pattern in patterns or ['']:
        if not matching(table.cells, [pattern]):
            raise UserError(f"--only: no cell of {table.name} matches '{pattern}'; {nearest(pattern, table.cells)}")
    return matching(table.cells, patterns)


def _train(config: Mapping[str, Any], run: Path) -> None:
    from launch import keep_compilations
    from tl_jax.train import train_and_evaluate

    keep_compilations()
    train_and_evaluate(config, run)


def _command() -> int:
    from tl_jax.train import Preempted

    try:
        return main(sys.argv[1:])
    except Preempted as saved:
        print(saved)
        return 1
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    sys.exit(_command())
