"""What a paper table declares, and the configs that follow from it.

A table is a file `experiments/<name>.py` of plain data:

    TITLE = 'DANN on Amazon reviews (Ganin et al. 2016, arXiv:1505.07818, table 1)'
    SEEDS = 3                            # or a list
    SELECTION = 'reverse validation'     # or 'last', '<evaluation split>/<metric>', 'oracle'; '' for the configs' own
    METRIC = 'target/accuracy'
    UNIT = '%'                           # of published and tolerance; see UNITS
    CELLS = [
        Cell('DANN', 'B>D', 'configs/dann.py:books,dvd', published=78.4, tolerance=2.0, source='table 1 (a)',
             candidates=[{'objective.weight': w} for w in (0.01, 0.1, 1.0)]),
    ]
    MEANS = [Mean('DANN', of='DANN/*', published=76.3, tolerance=0.7, source='mean of table 1 (a)')]
    RELATIONS = ['DANN > source', 'KD/test < 0.65 * plain/test', 'DANN/moons > NN/moons + 10']
    QUICK = {'stages[*].steps': 2}       # `--quick`: shows that everything runs, nothing else
"""

import copy
import fnmatch
import functools
import hashlib
import itertools
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from tl_jax import config as config_lib
from tl_jax.errors import UserError, nearest

HERE = Path(__file__).resolve().parent
# A measured figure in a table's unit; in any unit that is not named here, as it is.
UNITS: Mapping[str, Callable[[float], float]] = {
    '%': lambda x: 100 * x,
    'error %': lambda x: 100 * (1 - x),
    'mistakes of 10,000': lambda x: 10_000 * (1 - x),
}
DURATIONS = ('steps', 'epochs', 'examples')
REVERSE = 'reverse validation'
# Fields that change what is said of a run, and no number of it.
UNCOUNTED = ('name', 'log_every', 'keep', 'report_before')
COMPARISONS = {'>': operator.gt, '>=': operator.ge, '<': operator.lt, '<=': operator.le}


class Cell(NamedTuple):
    """One figure of a table.

    Attributes:
      row: the method, as a rule.
      column: the data set or transfer pair.
      config: `configs/x.py:arg`.
      overrides: {field of the config: value}, or a function of the seed that gives them; `stages[*].f` means every stage.
      published: the paper's figure, in the table's unit; None where there is none.
      tolerance: how far from it ours may lie, in the same unit.
      accept: (low, high) that count as reproduced, in place of `tolerance`; None for an open end.
      source: where the figure stands.
      metric: of the run's summary; `name@step` reads a record instead; the table's METRIC unless given.
      unit: the table's UNIT unless given.
      after: name of the cell whose model this one starts from, or learns from.
      into: the field of the config that names that model.
      after_seed: of that cell, where all seeds share one; the cell's own unless given.
      candidates: overrides among which the table's SELECTION chooses, for every seed anew.
      refit: a config that the chosen candidate's overrides are put into and that gives the figure, without selection: the
        same network on training and validation images together, say.
    """

    row: str
    column: str
    config: str
    overrides: Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None = None
    published: float | None = None
    tolerance: float | None = None
    accept: tuple[float | None, float | None] | None = None
    source: str = ''
    metric: str = ''
    unit: str = ''
    after: str = ''
    into: str = 'model.source'
    after_seed: int | None = None
    candidates: Sequence[Mapping[str, Any]] = ()
    refit: str = ''

    @property
    def name(self) -> str:
        return f'{self.row}/{self.column}'

    @property
    def folder(self) -> str:
        """The name as a directory."""
        return '.'.join(re.sub(r'[^\w+-]+', '-', part).strip('-') for part in (self.row, self.column))


class Mean(NamedTuple):
    """The mean over the cells whose names match `of`, seed by seed, as a line of its own."""

    row: str
    of: str
    column: str = 'mean'
    published: float | None = None
    tolerance: float | None = None
    accept: tuple[float | None, float | None] | None = None
    source: str = ''

    @property
    def name(self) -> str:
        return f'{self.row}/{self.column}'


class Relation(NamedTuple):
    """`left OP factor · right + offset` between two rows, or two lines by name, in the table's unit."""

    text: str
    left: str
    compare: str
    right: str
    factor: float
    offset: float


class Table(NamedTuple):
    """A checked table file; `cells` by their names."""

    name: str
    title: str
    cells: Mapping[str, Cell]
    means: Sequence[Mean]
    relations: Sequence[Relation]
    seeds: tuple[int, ...]
    selection: str
    quick: Mapping[str, Any]


def load_table(name: str) -> Table:
    """Reads and checks `experiments/<name>.py`, or a file given by its path."""
    path = Path(name) if name.endswith('.py') else HERE / f'{name}.py'
    if not path.is_file() or not declares_cells(path):
        known = [p.stem for p in HERE.glob('*.py') if declares_cells(p)]
        raise UserError(f"there is no table '{name}' in {HERE.name}/; {nearest(name, known)}")
    declared = {key: value for key, value in vars(config_lib.run_file(path)).items() if key.isupper()}
    return checked(path.stem, declared)


def declares_cells(path: Path) -> bool:
    """Whether a Python file is a table."""
    return re.search(r'^CELLS\b', path.read_text(), re.MULTILINE) is not None


def checked(name: str, declared: Mapping[str, Any]) -> Table:
    """Makes a table of a file's capitals; raises UserError where they contradict each other."""
    metric, unit = declared.get('METRIC', ''), declared.get('UNIT', '%')
    cells: dict[str, Cell] = {}
    folders: dict[str, str] = {}
    for cell in declared['CELLS']:
        cell = cell._replace(metric=cell.metric or metric, unit=cell.unit or unit)
        if not cell.metric:
            raise UserError(f"table {name}, cell '{cell.name}': names no metric; set METRIC or Cell(metric=…)")
        same = folders.setdefault(cell.folder.lower(), cell.name)
        if cell.name in cells or same != cell.name:
            raise UserError(f"table {name}: '{cell.name}' and '{same}' share a name or directory; rename one")
        cells[cell.name] = cell
    for cell in cells.values():
        _check_base(name, cell, cells)
        if cell.refit and not cell.candidates:
            raise UserError(f"table {name}, cell '{cell.name}': refit is of a chosen candidate; give candidates")
    means = tuple(declared.get('MEANS', ()))
    for mean in means:
        if not matching(cells, [mean.of]):
            raise UserError(f"table {name}, mean '{mean.name}': no cell matches '{mean.of}'; {nearest(mean.of, cells)}")
    selection = declared.get('SELECTION', '')
    if selection == 'last' and any(cell.candidates for cell in cells.values()):
        raise UserError(f"table {name}: SELECTION 'last' cannot choose among candidates; use '{REVERSE}' or a split's")
    lines = [*cells, *(mean.name for mean in means)]
    relations = tuple(_relation(name, text, lines) for text in declared.get('RELATIONS', ()))
    seeds = seeds_from(declared.get('SEEDS', 1))
    quick = declared.get('QUICK', {'stages[*].steps': 2})
    return Table(name, declared.get('TITLE', name), cells, means, relations, seeds, selection, quick)


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that some pattern matches, as a shell does; case counts."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def seeds_from(given: int | str | Sequence[int]) -> tuple[int, ...]:
    """Reads `3` as seeds 0, 1, 2, and a list, or `0,4`, as those seeds."""
    try:
        if isinstance(given, str):
            given = [int(part) for part in given.split(',') if part] if ',' in given else int(given)
        seeds = tuple(range(given)) if isinstance(given, int) else tuple(given)
    except ValueError:
        raise UserError(f"--seeds: '{given}' is neither a count nor a list such as 0,1,4") from None
    if not seeds:
        raise UserError('--seeds: names no seed; give a count such as 3, or a list such as 0,1,4')
    return seeds


def candidates_of(cell: Cell) -> dict[str, Mapping[str, Any]]:
    """{label: overrides}; one without a label where the cell has no candidates."""
    if not cell.candidates:
        return {'': {}}
    return {','.join(f'{k}={v}' for k, v in candidate.items()): candidate for candidate in cell.candidates}


def config_of(
    table: Table,
    cell: Cell,
    seed: int,
    *,
    candidate: str = '',
    source: str | None = None,
    quick: bool = False,
    refit: bool = False,
) -> dict[str, Any]:
    """The resolved config of one run; `source` is the model of the cell that it comes after, `refit` asks for that config."""
    config = ml_collections.ConfigDict(copy.deepcopy(_loaded(cell.refit if refit else cell.config)))
    overrides = cell.overrides(seed) if callable(cell.overrides) else cell.overrides or {}
    select_by = {'select_by': table.selection} if table.selection not in ('', REVERSE) and not refit else {}
    begin = {cell.into: source} if source else {}
    extra = table.quick if quick else {}
    for change in (select_by, overrides, candidates_of(cell)[candidate], begin, extra, {'seed': seed}):
        for field, value in change.items():
            _set(config, field, value)
    return config_lib.resolve(config)


def fingerprint(table: Table, cell: Cell, seed: int, *, quick: bool = False) -> str:
    """What a result was computed from, in 16 digits: every field that decides its numbers, also those of `after`.

    Fields at their default are left out, so that a new field of tl_jax leaves the results valid.
    """
    base = table.cells.get(cell.after)
    first = seed if cell.after_seed is None else cell.after_seed
    source = f'after {fingerprint(table, base, first, quick=quick)}' if base else None
    configs = {}
    for label, refit in itertools.product(candidates_of(cell), (False, True) if cell.refit else (False,)):
        config = config_of(table, cell, seed, candidate=label, source=source, quick=quick, refit=refit)
        configs[f'{label}, refit' if refit else label] = {
            k: v for k, v in config.items() if k not in UNCOUNTED and v != config_lib.DEFAULTS.get(k)
        }
    rule = table.selection if cell.candidates else ''
    text = json.dumps([rule, configs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_base(table: str, cell: Cell, cells: Mapping[str, Cell]) -> None:
    seen, base = [cell.name], cell.after
    while base:
        if base not in cells:
            raise UserError(f"table {table}, cell '{seen[-1]}': comes after unknown '{base}'; {nearest(base, cells)}")
        if base in seen:
            raise UserError(f'table {table}: {" after ".join([*seen, base])}: no cell comes first')
        seen, base = [*seen, base], cells[base].after


def _relation(table: str, text: str, lines: Sequence[str]) -> Relation:
    """Reads `left > right`, `left <= 0.65 * right`, `left > right + 10`; spaces stand around each operator."""
    parts = re.fullmatch(r'(.+?) (>=|<=|>|<) (?:([\d.]+) \* )?(.+?)(?: ([+-]) ([\d.]+))?', text)
    if parts is None:
        raise UserError(f"table {table}, relation '{text}': write 'left > right', with spaces around the operator")
    left, compare, factor, right, sign, offset = parts.groups()
    known = {*lines, *(name.partition('/')[0] for name in lines)}
    for side in (left, right):
        if side not in known:
            raise UserError(f"table {table}, relation '{text}': there is no '{side}'; {nearest(side, known)}")
    if (left in lines) != (right in lines):
        raise UserError(f"table {table}, relation '{text}': compares a row with a single cell; name two of a kind")
    return Relation(text, left, compare, right, float(factor or 1), float(f'{sign or "+"}{offset or 0}'))


def _loaded(spec: str) -> dict[str, Any]:
    file = Path(spec.partition(':')[0])
    return _load(spec, file.stat().st_mtime_ns if file.is_file() else 0)


@functools.lru_cache(maxsize=256)
def _load(spec: str, modified: int) -> dict[str, Any]:
    return config_lib.plain(config_lib.load(spec))


def _set(config: ml_collections.ConfigDict, field: str, value: Any) -> None:
    stages = config['stages'] if field.startswith('stages[*]') else [None]
    for number in range(len(stages)):
        target = field.replace('stages[*]', f'stages[{number}]')
        config_lib.override(config, f'{target}={value!r}')
        duration = re.fullmatch(rf'stages\[(\d+)\]\.({"|".join(DURATIONS)})', target)
        if duration:  # a stage has exactly one
            for other in set(DURATIONS) - {duration[2]}:
                config['stages'][int(duration[1])].pop(other, None)
