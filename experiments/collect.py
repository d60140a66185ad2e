"""The committed results of a table: one small JSON a run, and the table that they make."""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.table import COMPARISONS, REVERSE, UNITS, Cell, Mean, Relation, Table, fingerprint, matching
from tl_jax import workdir as workdir_lib
from tl_jax.errors import UserError
from tl_jax.report.runs import number
from tl_jax.report.table_page import Claim, Line, PaperTable

Results = Mapping[tuple[str, int], Mapping[str, Any]]


def result_path(results: Path, cell: Cell, seed: int) -> Path:
    """Where the JSON of a run stands."""
    return results / cell.folder / f'seed{seed}.json'


def measured(run: Path, metric: str) -> dict[str, float]:
    """All figures of a finished run, and `metric` among them.

    `metric` is one of the summary's metrics, a number of the summary such as `seconds`, or recorded while training:
    `privacy/epsilon` is then the last record's, `privacy/epsilon@240` that of step 240.
    """
    summary = workdir_lib.read_json(run / 'summary.json')
    figures = {
        name: value for name, value in summary['metrics'].items() if number(summary, 'metrics', name) is not None
    }
    if metric in figures:
        return figures
    name, _, step = metric.partition('@')
    records = [r for r in workdir_lib.read_records(run / 'metrics.jsonl') if name in r]
    recorded = next((r[name] for r in reversed(records) if not step or str(r['step']) == step), None)
    value = recorded if recorded is not None else number(summary, metric)
    if value is None:
        known = ', '.join(sorted(figures)) or 'none'
        raise UserError(f"{run}: has no metric '{metric}'; its figures: {known}")
    return {**figures, metric: value}


def current_results(
    table: Table, results: Path, *, quick: bool = False
) -> tuple[dict[tuple[str, int], Mapping[str, Any]], list[str]]:
    """{(cell, seed): JSON} of what the table's configs gave, and a line for each file that something else gave."""
    found, refused = {}, []
    folders = {cell.folder: cell for cell in table.cells.values()}
    for path in sorted(results.glob('*/seed*.json')):
        where, digits = f'{path.parent.name}/{path.name}', path.stem.removeprefix('seed')
        cell = folders.get(path.parent.name)
        if cell is None or not digits.isdecimal():
            refused.append(f'{where}: belongs to no cell of this table; not counted.')
            continue
        reason = refusal(table, cell, int(digits), path, quick)
        if reason:
            refused.append(f'{where}: {reason}; not counted.')
        else:
            found[cell.name, int(digits)] = workdir_lib.read_json(path)
    order = {name: i for i, name in enumerate(table.cells)}
    return dict(sorted(found.items(), key=lambda item: (order[item[0][0]], item[0][1]))), refused


def refusal(table: Table, cell: Cell, seed: int, path: Path, quick: bool) -> str:
    """Why a JSON is not the result that the table declares; empty where it is."""
    try:
        stored = workdir_lib.read_json(path)
        expected = fingerprint(table, cell, seed, quick=quick)
    except UserError as error:
        return str(error)
    if not isinstance(stored, dict) or number(stored, 'seed') != seed or not isinstance(stored.get('metrics'), dict):
        return 'is not the result of a run of this seed'
    if stored.get('quick') != quick:
        return 'was made with --quick' if stored.get('quick') else 'was made without --quick'
    if stored.get('config_sha256') != expected:
        return f'was made with another config ({stored.get("config_sha256")}, now {expected}); run the cell again'
    if number(stored, 'metrics', cell.metric) is None:
        return f"has no metric '{cell.metric}'; run the cell again"
    return ''


def paper_table(table: Table, found: Results, *, seeds: Iterable[int], notes: Iterable[str], quick: bool) -> PaperTable:
    """The table as it is drawn, from results alone."""
    lines = {name: _cell_line(cell, found, seeds) for name, cell in table.cells.items()}
    for mean in table.means:
        lines[mean.name] = _mean_line(mean, [lines[name] for name in matching(table.cells, [mean.of])], seeds)
    claims = [claim for relation in table.relations for claim in _claims(relation, lines)]
    title = f'QUICK, not a result: {table.title}' if quick else table.title
    return PaperTable(table.name, title, tuple(lines.values()), tuple(claims), tuple(notes))


def _cell_line(cell: Cell, found: Results, seeds: Iterable[int]) -> Line:
    mine = {seed: stored for (name, seed), stored in found.items() if name == cell.name}
    convert = UNITS.get(cell.unit, float)
    return Line(
        row=cell.row,
        column=cell.column,
        unit=cell.unit,
        values={seed: convert(stored['metrics'][cell.metric]) for seed, stored in mine.items()},
        missing=tuple(seed for seed in seeds if seed not in mine),
        published=cell.published,
        accepted=_accepted(cell),
        source=cell.source,
        selections=_distinct(_selection(stored) for stored in mine.values()),
        commits=_distinct(str(stored.get('commit') or 'no commit') for stored in mine.values()),
    )


def _mean_line(mean: Mean, members: list[Line], seeds: Iterable[int]) -> Line:
    """Seeds that every member has; the others are missing."""
    if len({line.unit for line in members}) > 1:
        raise UserError(f"mean '{mean.name}': its cells have different units")
    shared = sorted(set.intersection(*(set(line.values) for line in members)))
    return Line(
        row=mean.row,
        column=mean.column,
        unit=members[0].unit,
        values={seed: statistics.fmean(line.values[seed] for line in members) for seed in shared},
        missing=tuple(seed for seed in seeds if seed not in shared),
        published=mean.published,
        accepted=_accepted(mean),
        source=mean.source,
        selections=_distinct(rule for line in members for rule in line.selections),
        commits=_distinct(commit for line in members for commit in line.commits),
    )


def _accepted(figure: Cell | Mean) -> tuple[float | None, float | None] | None:
    if figure.accept is not None or figure.published is None or figure.tolerance is None:
        return figure.accept
    return figure.published - figure.tolerance, figure.published + figure.tolerance


def _selection(stored: Mapping[str, Any]) -> str:
    """How checkpoint and, where there were several, candidate were chosen."""
    chosen = stored.get('selection', {})
    said = str(chosen.get('checkpoint'))
    if chosen.get('scores'):
        rule, count = chosen.get('rule') or chosen.get('checkpoint'), len(chosen['scores'])
        said = f'{rule} among {count}' + (f', checkpoint: {said}' if rule == REVERSE else '')
    return said


def _claims(relation: Relation, lines: Mapping[str, Line]) -> list[Claim]:
    """One claim for two lines; for two rows, one for each column that both have."""
    if relation.left in lines:
        pairs = [('', lines[relation.left], lines[relation.right])]
    else:
        columns = dict.fromkeys(line.column for line in lines.values())
        sides = [(c, lines.get(f'{relation.left}/{c}'), lines.get(f'{relation.right}/{c}')) for c in columns]
        pairs = [(column, left, right) for column, left, right in sides if left and right]
    return [_claim(relation, column, left, right) for column, left, right in pairs]


def _claim(relation: Relation, column: str, left: Line, right: Line) -> Claim:
    """Of the means over the seeds that both have: a seed that one side lacks may be an easy or a hard one."""
    shared = sorted(left.values.keys() & right.values.keys())
    if not shared:
        return Claim(relation.text, column, None, None, None)
    mean, bound = (statistics.fmean(line.values[seed] for seed in shared) for line in (left, right))
    bound = relation.factor * bound + relation.offset
    return Claim(relation.text, column, mean, bound, bool(COMPARISONS[relation.compare](mean, bound)))


def _distinct(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


def write_result(path: Path, values: Mapping[str, Any]) -> None:
    """By rename, and only what JSON can say: a figure that is not finite must not enter a table."""
    workdir_lib.write_json(path, json.loads(json.dumps(values, allow_nan=False)))
