"""report.html, table.md and table.json of a sweep."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from tl_jax.report import plots, runs, tables, views
from tl_jax.report.markup import caption, columns, escape, legend, notes, section, table, write_text
from tl_jax.report.page import document
from tl_jax.report.run_page import duration, main_split, selection
from tl_jax.report.runs import Run

NEIGHBOURS = 400
MISTAKES = 10

Runs = Mapping[tuple[str, int], Run | None]


def write_sweep_report(workdir: str | Path, published: Mapping[str, Any] | None = None) -> Path:
    """Write report.html, table.md and table.json into a sweep directory, from its runs' files alone.

    `published` maps a strategy to a fraction or to the fields of `tables.Published`: a column beside ours.
    Returns the path of report.html. Raises UserError where there are no `<strategy>/seed<N>/` directories.
    """
    workdir = Path(workdir).resolve()
    sweep = tables.read_sweep(workdir)
    comparison = tables.compare_runs(sweep, published)
    strategies = list(dict.fromkeys(strategy for strategy, _ in sweep))
    lost = [f'{item.strategy}, seed {item.seed}: {item.reason}.' for item in comparison.missing]
    body = '\n'.join(
        (
            header(workdir.name, comparison, sweep),
            notes(lost),
            section('Comparison', comparison_view(comparison)),
            section('Learning curves', curves_view(sweep, strategies)),
            *(strategy_view(strategy, sweep) for strategy in strategies),
            section('All runs', runs_view(sweep, comparison.split, workdir)),
        )
    )
    footer = f'Made by tl_jax from the files in {workdir}; `python -m tl_jax.report {workdir}` makes it again.'
    write_text(workdir / 'table.json', json.dumps(tables.as_json(comparison), indent=2) + '\n')
    write_text(workdir / 'table.md', tables.format_table(comparison, 'markdown'))
    return write_text(workdir / 'report.html', document(f'{workdir.name} · tl_jax sweep', body, footer))


def header(name: str, comparison: tables.Comparison, sweep: Runs) -> str:
    """Title, counts, and the selection rule."""
    counted = sum(len(row.seeds) for row in comparison.rows)
    devices = sorted({str(run.summary['device']) for run in sweep.values() if run and run.summary.get('device')})
    starts = sorted(str(run.summary['started']) for run in sweep.values() if run and run.summary.get('started'))
    parts = [f'{counted} of {len(sweep)} runs finished', *starts[:1], *devices]
    line = ' · '.join(parts)
    return (
        f'<h1>{escape(name)}</h1><p class="lead">{escape(line)}</p><p>Selection: {escape(comparison.selection)}.</p>\n'
    )


def comparison_view(comparison: tables.Comparison) -> str:
    """The table, a picture of its accuracies, and what must be known to trust it."""
    if not comparison.rows:
        return '<p>No run has finished.</p>'
    head, *body = tables.cells(comparison)
    rows = [[escape(cell) for cell in line] for line in body]
    ranges = plots.dots(
        [row.strategy for row in comparison.rows],
        [np.array(row.accuracy.values) for row in comparison.rows],
        f'{comparison.split} accuracy',
    )
    said = ''.join(caption(note) for note in tables.remarks(comparison))
    return table(head, rows) + f'<div class="wide">{ranges}</div>' + said


def curves_view(sweep: Runs, strategies: list[str]) -> str:
    """Each evaluation split's accuracy and loss: a thin line a seed, the mean and ± one deviation over it."""
    records = {key: run.records for key, run in sweep.items() if run}
    names = sorted({key for kept in records.values() for key in runs.keys(kept)})
    split = next((s for s in ('val', 'test') if f'{s}/accuracy' in names), None)
    split = split or next(
        (n.partition('/')[0] for n in names if n.endswith('/accuracy') and n[:6] != 'train/'), 'train'
    )
    panels = []
    for metric in ('accuracy', 'loss'):
        lines = []
        for position, strategy in enumerate(strategies):
            seeds = [runs.curve(kept, f'{split}/{metric}') for (name, _), kept in records.items() if name == strategy]
            lines += over_seeds([c for c in seeds if len(c[0])], plots.color_of(position))
        if lines:
            lines.sort(key=lambda line: not line.thin)
            panels.append(plots.Panel(f'{split} {metric}', lines, percent=metric == 'accuracy', log=metric == 'loss'))
    if not panels:
        return ''
    drawn = plots.learning_curves(panels, [], f'{split} accuracy and loss of {len(strategies)} strategies by step')
    said = 'Thin: one seed. Thick: the mean over the steps that all seeds share, ± one standard deviation.'
    keys = legend((plots.color_of(i), '▬', name) for i, name in enumerate(strategies))
    return f'<div class="wide">{drawn}</div>{keys}{caption(said)}'


def over_seeds(curves: list[tuple[np.ndarray, np.ndarray]], color: str) -> list[plots.Series]:
    """A thin line a seed, and their mean and deviation over the common steps."""
    lines = [plots.Series(*plots.thinned(*c), color, thin=True) for c in curves]
    if not curves:
        return lines
    steps = sorted(set.intersection(*(set(c[0]) for c in curves)))
    values = np.array([[value for step, value in zip(*c, strict=True) if step in set(steps)] for c in curves])
    if not steps:
        return lines
    mean = values.mean(0)
    if len(curves) == 1:
        return [plots.Series(*plots.thinned(np.array(steps), mean), color)]
    deviation = values.std(0, ddof=1)
    return [*lines, plots.Series(np.array(steps), mean, color, mean - deviation, mean + deviation)]


def strategy_view(strategy: str, sweep: Runs) -> str:
    """Confusion, embedding and mistakes of a strategy's first finished run that kept predictions."""
    problems: list[str] = []
    for (name, seed), run in sweep.items():
        if name != strategy or run is None or not run.finished:
            continue
        split = main_split(run)
        predictions, found = runs.read_predictions(run.path / f'predictions/{split}.npz') if split else (None, [])
        problems += [f'seed {seed}: {problem}' for problem in found]
        if predictions:
            features = views.embedding_view(predictions, NEIGHBOURS, linear=False, size=4.2)
            said = caption(f'Seed {seed}, {len(predictions.label):,} examples of {split}. {selection(run)}')
            beside = columns(views.confusion_view(predictions, 400, tips=False), features)
            pictures = views.mistakes_view(predictions, MISTAKES)
            return section(strategy, notes(problems), said, beside, pictures)
    return section(strategy, notes(problems), caption('No finished run of this strategy kept predictions.'))


def runs_view(sweep: Runs, split: str, workdir: Path) -> str:
    """One line a run, with a link to its page, or to its directory where it has none."""
    return table(
        ['strategy', 'seed', 'state', f'{split} accuracy %', 'macro-F1 %', 'selected step', 'time'],
        [_run_line(strategy, seed, run, split, workdir) for (strategy, seed), run in sweep.items()],
        texts=3,
    )


def _run_line(strategy: str, seed: int, run: Run | None, split: str, workdir: Path) -> list[str]:
    name = escape(strategy)
    if run is None:
        return [name, str(seed), 'missing', '–', '–', '–', '–']
    page = 'report.html' if (run.path / 'report.html').is_file() else ''
    name = f'<a href="{escape(quote(run.path.relative_to(workdir).as_posix()))}/{page}">{name}</a>'
    metric = lambda key: runs.number(run.summary, 'metrics', f'{split}/{key}')
    percent = lambda value: '–' if value is None else f'{100 * value:.2f}'
    step, seconds = runs.number(run.summary, 'selected_step'), runs.number(run.summary, 'seconds')
    state = 'finished' if run.finished else f'stopped at step {runs.last_step(run.records)}'
    return [
        name,
        str(seed),
        state,
        percent(metric('accuracy')),
        percent(metric('macro_f1')),
        '–' if step is None else f'{step:,.0f}',
        '–' if seconds is None else duration(seconds),
    ]
