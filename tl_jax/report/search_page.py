"""report.html and table.md of a search, from its `trials.json`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_jax.report import plots
from tl_jax.report.markup import caption, escape, legend, section, table, write_text
from tl_jax.report.page import document
from tl_jax.selection import direction


def write_search_report(workdir: str | Path) -> Path:
    """Writes the page of a search and its table of trials, the best first; returns the page's path."""
    workdir = Path(workdir).resolve()
    found = json.loads((workdir / 'trials.json').read_text())
    name, trials = found['select_by'], found['trials']
    finished = [trial for trial in trials if trial['state'] == 'complete']
    ranked = sorted(finished, key=lambda t: -direction(name) * t['value'])
    ranked += [trial for trial in trials if trial['state'] != 'complete']
    fields = list(dict.fromkeys(field for trial in trials for field in trial['fields']))
    head = ['trial', 'state', name, 'seconds', *fields]
    rows = [[_shown(cell) for cell in _cells(trial, fields)] for trial in ranked]
    lines = [f'| {" | ".join(head)} |', '|' + ' --- |' * len(head), *(f'| {" | ".join(row)} |' for row in rows)]
    write_text(workdir / 'table.md', '\n'.join(lines) + '\n')
    links = [[_link(workdir, row[0]), *map(escape, row[1:])] for row in rows]
    states = {state: sum(trial['state'] == state for trial in trials) for state in ('complete', 'pruned', 'fail')}
    said = f'{states["complete"]} trials finished, {states["pruned"]} were stopped early, {states["fail"]} failed'
    body = '\n'.join(
        (
            f'<h1>{escape(workdir.name)}</h1><p class="lead">{escape(said)}</p><p>Selection: {escape(name)}.</p>',
            section('History', history_view(trials, name)),
            section('Trials', table(head, links, texts=2)),
        )
    )
    footer = f'Made by tl_jax from the files in {workdir}.'
    return write_text(workdir / 'report.html', document(f'{workdir.name} · tl_jax search', body, footer))


def history_view(trials: Sequence[Mapping[str, Any]], name: str) -> str:
    """The values of finished trials in the order of their proposal, and the best so far."""
    done = [(number, trial['value']) for number, trial in enumerate(trials) if trial['state'] == 'complete']
    if not done:
        return '<p>No trial has finished.</p>'
    numbers, values = (np.array(column, float) for column in zip(*done, strict=True))
    best = direction(name) * np.maximum.accumulate(direction(name) * values)
    lines = [
        plots.Series(numbers, values, plots.color_of(1), thin=True),
        plots.Series(numbers, best, plots.color_of(0)),
    ]
    panel = plots.Panel(name, lines, percent=name.endswith(('accuracy', 'f1')), xlabel='trial')
    drawn = plots.learning_curves([panel], [], f'{name} of {len(done)} trials in order, and the best so far')
    keys = legend([(plots.color_of(1), '▬', 'each trial'), (plots.color_of(0), '▬', 'the best so far')])
    return f'<div class="wide">{drawn}</div>{keys}' + caption(
        'The winner is the best of many looks at one split: its figure there flatters it, the test split does not.'
    )


def _cells(trial: Mapping[str, Any], fields: Sequence[str]) -> list[Any]:
    return [trial['trial'], trial['state'], trial['value'], trial['seconds'], *(trial['fields'].get(f) for f in fields)]


def _shown(value: Any) -> str:
    if value is None:
        return '–'
    if isinstance(value, float):
        return f'{value:.4g}'
    return value if isinstance(value, str) else json.dumps(value)


def _link(workdir: Path, trial: str) -> str:
    page = 'report.html' if (workdir / trial / 'report.html').is_file() else ''
    return f'<a href="{escape(trial)}/{page}">{escape(trial)}</a>'
