"""The table of a sweep: one row a strategy, computed from the runs' summary.json and from nothing else."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tl_jax.errors import UserError
from tl_jax.report import runs as runs_lib

BASELINE = 'scratch'


class Spread(NamedTuple):
    """Values over seeds, their mean and sample standard deviation (n - 1; None for one value)."""

    values: tuple[float, ...]
    mean: float
    std: float | None


class Gain(NamedTuple):
    """Accuracy over the baseline's, in percentage points. `error` is the standard error, None for one seed."""

    points: float
    error: float | None
    paired: bool


class Published(NamedTuple):
    """A figure from the literature, as a fraction. `tolerance` says how near ours should come."""

    accuracy: float
    source: str = ''
    tolerance: float | None = None


class Row(NamedTuple):
    """One strategy. Accuracy and macro-F1 are fractions; `trainable` holds one count a stage."""

    strategy: str
    seeds: tuple[int, ...]
    accuracy: Spread
    macro_f1: Spread | None
    gain: Gain | None
    trainable: tuple[int, ...]
    total: int | None
    seconds: Spread | None
    published: Published | None


class Missing(NamedTuple):
    """A run that the table cannot count, and why."""

    strategy: str
    seed: int
    reason: str


class Comparison(NamedTuple):
    """The whole table: what was measured on which split, how checkpoints were selected, what is missing."""

    split: str
    rows: tuple[Row, ...]
    missing: tuple[Missing, ...]
    selection: str
    commits: tuple[str, ...]


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and sample standard deviation of the values that are there; None if none is."""
    known = tuple(v for v in values if v is not None)
    if not known:
        return None
    return Spread(known, statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def transfer_gain(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Gain | None:
    """Difference of mean accuracies by seed, in points.

    Where both have the same seeds the error is that of the paired differences, std(d) / √n; otherwise the
    means are taken as independent, √(s₁²/n₁ + s₂²/n₂).
    """
    if not ours or not baseline:
        return None
    points = 100 * (statistics.fmean(ours.values()) - statistics.fmean(baseline.values()))
    if ours.keys() == baseline.keys():
        differences = [100 * (ours[seed] - baseline[seed]) for seed in ours]
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
        return Gain(points, error, True)
    if min(len(ours), len(baseline)) < 2:
        return Gain(points, None, False)
    variances = [1e4 * statistics.variance(side.values()) / len(side) for side in (ours, baseline)]
    return Gain(points, math.sqrt(sum(variances)), False)


def compare(workdir: str | Path, published: Mapping[str, Any] | None = None) -> Comparison:
    """Read a sweep directory (`<strategy>/seed<N>/`) and compare its strategies.

    The split compared is `test` if any run measured it, else the first one that has an accuracy. `published`
    maps a strategy to a fraction, or to the fields of `Published`. Raises UserError where no run is.
    """
    return compare_runs(read_sweep(workdir), published)


def compare_runs(
    runs: Mapping[tuple[str, int], runs_lib.Run | None], published: Mapping[str, Any] | None = None
) -> Comparison:
    """`compare` for a sweep that has been read."""
    split = reported_split(run for run in runs.values() if run)
    accuracy: dict[str, dict[int, float]] = {strategy: {} for strategy, _ in runs}
    missing = []
    for (strategy, seed), run in runs.items():
        value = runs_lib.number(run.summary, 'metrics', f'{split}/accuracy') if run else None
        if value is None:
            missing.append(Missing(strategy, seed, _why(run, split)))
        else:
            accuracy[strategy][seed] = value
    rows = [
        _row(strategy, runs, by_seed, split, accuracy.get(BASELINE), published)
        for strategy, by_seed in accuracy.items()
        if by_seed
    ]
    counted = [runs[strategy, seed] for strategy, by_seed in accuracy.items() for seed in by_seed]
    commits = sorted({str(run.summary.get('commit') or 'no commit') for run in counted})
    return Comparison(split, tuple(rows), tuple(missing), _selection(counted, split), tuple(commits))


def read_sweep(workdir: str | Path) -> dict[tuple[str, int], runs_lib.Run | None]:
    """Every run of a sweep, None where a directory or its files are missing.

    A strategy without one of the seeds that another strategy has counts as missing that run. The baseline
    comes first, then the strategies in the order in which they were started.
    """
    found = runs_lib.find_runs(workdir)
    runs = {key: runs_lib.read_run(path) if runs_lib.is_run(path) else None for key, path in found.items()}
    started: dict[str, str] = {}
    for (strategy, _), run in runs.items():
        time = str(run.summary.get('started') or '~') if run else '~'
        started[strategy] = min(time, started.get(strategy, time))
    order = sorted(started, key=lambda name: (name != BASELINE, started[name], name))
    seeds = sorted({seed for _, seed in runs})
    return {(strategy, seed): runs.get((strategy, seed)) for strategy in order for seed in seeds}


def reported_split(runs: Iterable[runs_lib.Run]) -> str:
    """`test` where some summary has its accuracy, else the first split that has one, else `test`."""
    names = set()
    for run in runs:
        metrics = run.summary.get('metrics')
        if isinstance(metrics, Mapping):
            names |= {key.removesuffix('/accuracy') for key in metrics if key.endswith('/accuracy')}
    return 'test' if 'test' in names or not names else min(names)


def format_table(comparison: Comparison, style: str = 'plain') -> str:
    """The table as text. `style` is 'plain' (for a terminal) or 'markdown'; notes follow below the table."""
    if style not in ('plain', 'markdown'):
        raise UserError(f"format_table: style is {style!r}; it should be 'plain' or 'markdown'")
    head, *body = cells(comparison)
    if style == 'markdown':
        body = [[_inert(cell) for cell in line] for line in body]
    else:
        body = [[_printable(cell) for cell in line] for line in body]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [_aligned(line, widths) for line in [head, *body]]
    if style == 'markdown':
        rule = ['-' * widths[0], *('-' * (w - 1) + ':' for w in widths[1:])]
        text = ['| ' + ' | '.join(line) + ' |' for line in [lines[0], rule, *lines[1:]]]
    else:
        text = ['  '.join(line).rstrip() for line in [lines[0], ['─' * w for w in widths], *lines[1:]]]
    said = [f'Selection: {comparison.selection}.', *remarks(comparison)]
    said += [f'MISSING {item.strategy}, seed {item.seed}: {item.reason}.' for item in comparison.missing]
    notes = [f'- {_inert(note)}' if style == 'markdown' else _printable(note) for note in said]
    return '\n'.join([*text, '', *notes]) + '\n'


def cells(comparison: Comparison) -> list[list[str]]:
    """Header and rows as text, shared by the terminal, markdown and HTML. The first column is the strategy."""
    with_published = any(row.published for row in comparison.rows)
    head = [
        'strategy',
        f'{comparison.split} accuracy %',
        'macro-F1 %',
        f'gain over {BASELINE}',
        'trainable parameters',
        'seconds',
        'seeds',
    ]
    return [head + ['published %'] * with_published] + [
        [
            row.strategy,
            _percent(row.accuracy),
            _percent(row.macro_f1),
            _gain(row),
            ' → '.join(f'{count:,}' for count in row.trainable) or '–',
            f'{row.seconds.mean:.1f}' if row.seconds else '–',
            str(len(row.seeds)),
        ]
        + [_published(row)] * with_published
        for row in comparison.rows
    ]


def remarks(comparison: Comparison) -> list[str]:
    """What a reader must know to trust the table, one sentence or two each."""
    notes = []
    gains = [row.gain for row in comparison.rows if row.gain]
    counts = sorted({len(row.seeds) for row in comparison.rows})
    if counts:
        over = ' or '.join(map(str, counts)) + (' seeds' if counts[-1] > 1 else ' seed')
        notes.append(f'Accuracy and macro-F1: mean ± sample standard deviation over {over}.')
    if gains:
        paired = {gain.paired for gain in gains}
        kind = 'paired by seed' if paired == {True} else 'of independent means'
        kind = 'paired by seed where both have the same seeds' if len(paired) == 2 else kind
        notes.append(f'Gain: difference of mean accuracies in points ± its standard error, {kind}.')
    elif comparison.rows:
        notes.append(f'No gain: no finished run of a strategy named {BASELINE} to compare with.')
    if any(len(row.trainable) > 1 for row in comparison.rows):
        notes.append('a → b: parameters trained in one stage, then in the next.')
    for row in comparison.rows:
        if row.published and row.published.source:
            notes.append(f'Published figure of {row.strategy}: {row.published.source}.')
    if comparison.commits:
        notes.append(f'Commit: {", ".join(comparison.commits)}.')
    return notes


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Plain data for table.json: named tuples become objects, accuracies stay fractions."""
    return {'baseline': BASELINE, **_plain(comparison)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, '_asdict'):
        return {key: _plain(field) for key, field in value._asdict().items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _row(
    strategy: str,
    runs: Mapping[tuple[str, int], Any],
    accuracy: Mapping[int, float],
    split: str,
    baseline: Mapping[int, float] | None,
    published: Mapping[str, Any] | None,
) -> Row:
    summaries = [runs[strategy, seed].summary for seed in accuracy]
    totals = [runs_lib.number(summary, 'parameters', 'total') for summary in summaries]
    trainable = [runs_lib.integers(summary, 'parameters', 'trainable') for summary in summaries]
    return Row(
        strategy=strategy,
        seeds=tuple(accuracy),
        accuracy=spread(list(accuracy.values())),
        macro_f1=spread([runs_lib.number(s, 'metrics', f'{split}/macro_f1') for s in summaries]),
        gain=transfer_gain(accuracy, baseline) if baseline and strategy != BASELINE else None,
        trainable=trainable[0],
        total=None if totals[0] is None else int(totals[0]),
        seconds=spread([runs_lib.number(s, 'seconds') for s in summaries]),
        published=_as_published(published, strategy),
    )


def _as_published(published: Mapping[str, Any] | None, strategy: str) -> Published | None:
    value = (published or {}).get(strategy)
    if value is None or isinstance(value, Published):
        return value
    return Published(**value) if isinstance(value, Mapping) else Published(float(value))


def _why(run: runs_lib.Run | None, split: str) -> str:
    if run is None:
        return 'no run directory, or an empty one'
    if run.finished:
        return f'summary.json has no {split}/accuracy'
    return f'not finished; its last record is of step {runs_lib.last_step(run.records)}'


def _selection(runs: Sequence[runs_lib.Run], split: str) -> str:
    rules = Counter(str(run.summary.get('select_by') or 'not stated') for run in runs)
    if not rules:
        return 'no finished run'
    text = rules.most_common(1)[0][0] if len(rules) == 1 else ', '.join(f'{r} ({n} runs)' for r, n in rules.items())
    on_reported = any(rule.startswith((f'{split}/', 'oracle')) for rule in rules)
    return f'checkpoint by {text}' + (', the split reported here, so the figures are optimistic' * on_reported)


def _percent(value: Spread | None) -> str:
    if value is None:
        return '–'
    return f'{100 * value.mean:.2f}' + (f' ± {100 * value.std:.2f}' if value.std is not None else '')


def _gain(row: Row) -> str:
    if row.gain is None:
        return '–'
    return f'{row.gain.points:+.2f}' + (f' ± {row.gain.error:.2f}' if row.gain.error is not None else '')


def _published(row: Row) -> str:
    if row.published is None:
        return '–'
    difference = row.accuracy.mean - row.published.accuracy
    text = f'{100 * row.published.accuracy:.2f} ({100 * difference:+.2f})'
    if row.published.tolerance is None:
        return text
    return text + (' ✓' if abs(difference) <= row.published.tolerance else ' ✗')


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]


def _printable(text: str) -> str:
    """No control characters: a directory's name must not move a terminal's cursor."""
    return ''.join(c if c.isprintable() else '�' for c in text)


def _inert(text: str) -> str:
    """Text that markdown shows as it is."""
    return re.sub(r'([\\`*\[\]<>|])', r'\\\1', _printable(text))
