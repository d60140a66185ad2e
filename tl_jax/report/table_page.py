"""A paper's table beside ours, as markdown and as a page. Everything in it was measured or is declared by the table file."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tl_jax.report import plots
from tl_jax.report.markup import caption, cards, clean, escape, notes, section, table, write_text
from tl_jax.report.page import document

IN, OUT, OPEN = '✓', '✗', '–'
HEAD = ['', '', 'paper', 'ours', 'difference', 'accepted', '', 'seeds', 'selection', 'commit']


class Line(NamedTuple):
    """One figure.

    Attributes:
      row: the method.
      column: the data set.
      unit: of all figures of the line.
      values: by seed.
      missing: seeds that were expected and have no result.
      published: the paper's figure, None where there is none.
      accepted: (low, high) that count as reproduced, either end None for open; None where nothing is claimed.
      source: where the published figure stands.
      selections: how the checkpoint or candidate was chosen; one entry for each way that occurs.
      commits: of the runs.
    """

    row: str
    column: str
    unit: str
    values: Mapping[int, float]
    missing: tuple[int, ...] = ()
    published: float | None = None
    accepted: tuple[float | None, float | None] | None = None
    source: str = ''
    selections: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f'{self.row}/{self.column}'

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds (n - 1)."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def reproduced(self) -> bool | None:
        """Whether the mean is accepted; None where nothing was measured or nothing is claimed."""
        if not self.values or self.accepted is None:
            return None
        low, high = self.accepted
        slack = 1e-9 * max(1.0, abs(self.mean))
        return (low is None or self.mean >= low - slack) and (high is None or self.mean <= high + slack)


class Claim(NamedTuple):
    """An ordering that the paper claims: our left side, our right side with factor and offset, and whether it holds."""

    text: str
    column: str
    left: float | None
    right: float | None
    holds: bool | None


class PaperTable(NamedTuple):
    """A whole table; `notes` are what a reader must be warned of."""

    name: str
    title: str
    lines: tuple[Line, ...]
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()


def write_paper_table(paper: PaperTable, directory: Path) -> Path:
    """Writes table.md and table.html. Equal results give equal bytes. Returns the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / 'table.md', format_paper_table(paper))
    return write_text(directory / 'table.html', _page(paper))


def format_paper_table(paper: PaperTable) -> str:
    """Markdown that also reads well in a terminal."""
    parts = [f'# {_inert(paper.title)}', '']
    if _is_grid(paper):
        parts += [_markdown(*_grid(paper), texts=1), '']
    parts += [_markdown([head or ' ' for head in HEAD], [_cells(line) for line in paper.lines], texts=2), '']
    if paper.claims:
        rows = [_claim_cells(claim) for claim in paper.claims]
        parts += [_markdown(['claim', 'on', 'left', 'right', ' '], rows, texts=2), '']
    parts += [f'- {_inert(note)}' for note in [*summary(paper), *paper.notes, *sources(paper)]]
    return '\n'.join(parts) + '\n'


def summary(paper: PaperTable) -> list[str]:
    """What the table amounts to, and what must be known to read it."""
    said = []
    judged = [line for line in paper.lines if line.reproduced is not None]
    claimed = [line for line in paper.lines if line.accepted is not None]
    if claimed:
        said.append(f'Accepted: {sum(line.reproduced for line in judged)} of {len(claimed)} figures.')
    known = [claim for claim in paper.claims if claim.holds is not None]
    if paper.claims:
        said.append(f'Claims that hold: {sum(claim.holds for claim in known)} of {len(paper.claims)}.')
    said.append('Ours: mean ± sample standard deviation over seeds; difference: ours − paper.')
    if any('oracle' in rule for line in paper.lines for rule in line.selections):
        said.append('oracle: chosen on the test labels, so the figure is optimistic.')
    lost = [f'{line.name} seed {", ".join(map(str, line.missing))}' for line in paper.lines if line.missing]
    if lost:
        said.append(f'Missing: {"; ".join(lost)}.')
    commits = sorted({commit for line in paper.lines for commit in line.commits})
    if commits:
        said.append(f'Commits: {", ".join(commits)}.')
    return said


def sources(paper: PaperTable) -> list[str]:
    """Where the published figures stand, each source once with the lines that it gave."""
    given: dict[str, list[str]] = {}
    for line in paper.lines:
        if line.published is not None:
            given.setdefault(line.source or 'no source given', []).append(line.name)
    everything = len(given) == 1
    return [f'Published figures{"" if everything else " of " + ", ".join(names)}: {s}.' for s, names in given.items()]


def _decimals(line: Line) -> int:
    """Two of a percentage, as many as make four digits of anything else."""
    if line.unit.endswith('%') or line.mean == 0:
        return 2
    return min(max(3 - math.floor(math.log10(abs(line.mean))), 0), 6)


def _ours(line: Line) -> str:
    if not line.values:
        return 'missing'
    spread = '' if line.std is None else f' ± {line.std:.{_decimals(line)}f}'
    return f'{line.mean:.{_decimals(line)}f}{spread}'


def _mark(line: Line) -> str:
    return {True: IN, False: OUT, None: OPEN}[line.reproduced]


def _accepted(line: Line) -> str:
    """`± tolerance` where the range lies around the paper's figure, else the range."""
    if line.accepted is None:
        return OPEN
    low, high = line.accepted
    if low is None or high is None:
        return f'≥ {low:g}' if high is None else f'≤ {high:g}'
    if line.published is not None and math.isclose(high - line.published, line.published - low, rel_tol=1e-6):
        return f'± {(high - low) / 2:.4g}'
    return f'{low:g} … {high:g}'


def _cells(line: Line) -> list[str]:
    difference = OPEN
    if line.values and line.published is not None:
        difference = f'{line.mean - line.published:+.{_decimals(line)}f}'
    seeds = f'{len(line.values)}' + (f' of {len(line.values) + len(line.missing)}' if line.missing else '')
    unit = '' if line.unit == '%' else f' [{line.unit}]'
    return [
        line.row,
        line.column + unit,
        OPEN if line.published is None else f'{line.published:g}',
        _ours(line),
        difference,
        _accepted(line),
        _mark(line),
        seeds,
        '; '.join(line.selections) or OPEN,
        ', '.join(line.commits) or OPEN,
    ]


def _claim_cells(claim: Claim) -> list[str]:
    side = lambda value: OPEN if value is None else f'{value:.4g}'
    mark = {True: IN, False: OUT, None: 'missing'}[claim.holds]
    return [claim.text, claim.column, side(claim.left), side(claim.right), mark]


def _is_grid(paper: PaperTable) -> bool:
    """Whether a table of rows and columns says more than a list."""
    rows, columns = ({getattr(line, side) for line in paper.lines} for side in ('row', 'column'))
    return len(rows) > 1 and len(columns) > 1 and len({line.unit for line in paper.lines}) == 1


def _grid(paper: PaperTable) -> tuple[list[str], list[list[str]]]:
    """Rows and columns as in the paper: our mean, the paper's figure in brackets, and the mark."""
    rows = dict.fromkeys(line.row for line in paper.lines)
    columns = dict.fromkeys(line.column for line in paper.lines)
    at = {(line.row, line.column): line for line in paper.lines}

    def cell(line: Line | None) -> str:
        if line is None:
            return ''
        ours = f'{line.mean:.{_decimals(line)}f}' if line.values else 'missing'
        theirs = '' if line.published is None else f' ({line.published:g})'
        return ours + theirs + ('' if line.reproduced is None else f' {_mark(line)}')

    return [f'ours (paper), {paper.lines[0].unit}', *columns], [
        [r, *(cell(at.get((r, c))) for c in columns)] for r in rows
    ]


def _page(paper: PaperTable) -> str:
    said = summary(paper)
    claims = [[_marked(cell) for cell in _claim_cells(claim)] for claim in paper.claims]
    body = '\n'.join(
        (
            f'<h1>{escape(paper.title)}</h1>',
            _cards(paper),
            notes(paper.notes),
            section('As in the paper', _table(*_grid(paper), texts=1)) if _is_grid(paper) else '',
            section('Figures', _plots(paper), _table(HEAD, [_cells(line) for line in paper.lines], texts=2)),
            section('Claims', table(['claim', 'on', 'left', 'right', ''], claims, texts=2)) if claims else '',
            section('Reading it', ''.join(caption(line) for line in [*said, *sources(paper)])),
        )
    )
    footer = f'Made by tl_jax from the JSON files beside this page; `python -m experiments.run {paper.name} --print`.'
    return document(f'{paper.title} · tl_jax', body, footer)


def _cards(paper: PaperTable) -> str:
    claimed = [line for line in paper.lines if line.accepted is not None]
    accepted = sum(line.reproduced is True for line in claimed)
    done = sum(len(line.values) for line in paper.lines)
    lost = sum(len(line.missing) for line in paper.lines)
    figures = (
        [('figures accepted', f'{accepted} of {len(claimed)}', 'ours within the declared range')] if claimed else []
    )
    figures += [('results', f'{done} of {done + lost}', 'figures times seeds')]
    if paper.claims:
        holds = sum(claim.holds is True for claim in paper.claims)
        figures.append(
            (
                'claims that hold',
                f'{holds} of {len(paper.claims)}',
                'orderings of the paper, by our means over shared seeds',
            )
        )
    return cards(figures)


def _plots(paper: PaperTable) -> str:
    """Our seeds against the paper's figures, a picture for each unit."""
    drawn = ''
    for unit in dict.fromkeys(line.unit for line in paper.lines):
        lines = [line for line in paper.lines if line.unit == unit and (line.values or line.published is not None)]
        if any(line.values for line in lines):
            drawn += plots.against_published(
                [line.name for line in lines],
                [np.array(list(line.values.values()), float) for line in lines],
                [line.published for line in lines],
                [line.accepted for line in lines],
                unit,
            )
    said = 'Dots: our seeds, a tick at their mean. Diamond: the paper. Band: what is accepted.'
    return f'<div class="wide">{drawn}</div>{caption(said)}' if drawn else ''


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    return table(head, [[_marked(cell) for cell in row] for row in rows], texts)


def _marked(text: str) -> str:
    """A cell as HTML: its mark in colour; short ones on one line, long ones wrapped."""
    words = text.split(' ')
    colors = {IN: 'hit', OUT: 'miss', 'missing': 'miss'}
    paint = lambda word: f'<span style="color:var(--{colors[word]})">{word}</span>' if word in colors else escape(word)
    wrap = 'normal' if len(text) > 24 else 'nowrap'
    return f'<span style="white-space:{wrap}">{" ".join(map(paint, words))}</span>'


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    lines = [[_inert(cell) for cell in line] for line in (head, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]
    pad = lambda line: [
        c.ljust(w) if i < texts else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
    ]
    rule = ['-' * w if i < texts else '-' * (w - 1) + ':' for i, w in enumerate(widths)]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in (pad(lines[0]), rule, *map(pad, lines[1:])))


def _inert(text: str) -> str:
    """Text that markdown shows as it is."""
    return re.sub(r'([\\`*\[\]<>|])', r'\\\1', clean(text))
