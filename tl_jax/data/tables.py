"""Tables: csv, tsv and jsonl files of features, of texts or of paths of images, with a column of labels or numbers."""

import csv
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tl_jax.data.base import MAX_BYTES, Source, existing, parse_labels
from tl_jax.data.images import CACHE_BYTES, MAX_PIXELS, image_source
from tl_jax.data.text import encode_texts, in_braces, read_lines
from tl_jax.errors import UserError, nearest


class Table(NamedTuple):
    """Rows of a table, their columns' names, and for each row where it stands, `FILE, line N`."""

    columns: list[str]
    rows: list[list]
    places: list[str]

    def column(self, name: str) -> list:
        return [row[self.columns.index(name)] for row in self.rows]


def open_table(
    kind: str,
    path: str,
    *,
    label: str = 'label',
    target: str | None = None,
    inputs: Sequence[str] | None = None,
    image: str | None = None,
    text: str | Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    pattern: str | None = None,
    unique: bool = False,
    without: str | Sequence[str] = (),
    tokenizer: str | Mapping[str, Any] = 'hashed',
    length: int = 128,
    class_names: Sequence[str] | None = None,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    unreadable: str = 'error',
    cache_bytes: int = CACHE_BYTES,
    max_bytes: int = MAX_BYTES,
) -> Source:
    """`csv:PATH` or `tsv:PATH`, whose first line names the columns, or `jsonl:PATH`, one object a line.

    PATH may be gzipped, a member of an archive (`DATA.tar.xz/MEMBER`), and several files: `{train,dev}.tsv`. Quotes are part
    of the text in a tsv. With `image`, that column holds paths relative to the table. With `text`, an example's `tokens` int32
    [length] are that column's; of two columns, a pair, also `segments`. Otherwise its `inputs` float32 [F] are the columns
    `inputs`, by default all but `label`, in the file's order; in jsonl a column may hold a list of numbers.

    Args:
      kind: 'csv', 'tsv' or 'jsonl'.
      path: of the file or files.
      label: column of the classes.
      target: column of a number to predict, in place of a class: `target` float32.
      inputs: columns of features.
      image: column of paths.
      text: column of texts, or two columns of pairs.
      columns: names of the columns of a csv or tsv without such a first line.
      pattern: regex that every line matches whole, whose named groups are the columns, in place of separators:
        `'(?P<label>[A-Z]+):(?P<sub>[a-z]+) (?P<text>.*)'`.
      unique: whether of rows with the same text only the first counts.
      without: further files of the same form; rows whose text they have are left out.
      tokenizer: see `tl_jax.data.text.make_tokenizer`.
      length: tokens of a text, beyond which it is cut at its end.
      class_names: of the labels, in their order; labels that are numbers, and none of these names, are places in it.
      unreadable: 'skip' leaves out rows whose text is empty or whose image cannot be read; an 'error' unless given.
      channels, max_pixels, cache_bytes: of images, as in `open_folder`.
      max_bytes: of a file, and of memory that the tokens may take.
    """
    name = f'{kind}:{path}'
    layout = dict(kind=kind, columns=columns, pattern=pattern, max_bytes=max_bytes)
    table = read_table(path, **layout)
    texts = [text] if isinstance(text, str) else list(text or ())
    if len(texts) > 2:
        raise UserError(f'{name}: text is one column, or two of a pair, not {len(texts)}')
    answer = target or label
    for column in [answer, *([image] if image else texts or inputs or ())]:
        if column not in table.columns:
            raise UserError(f'{table.places[0]}: no column {column!r}; {nearest(column, table.columns)}')
    if texts:
        table = _with_text(table, texts, skip=unreadable == 'skip')
    if unique or without:
        others = [read_table(each, **layout) for each in ([without] if isinstance(without, str) else without)]
        table = _distinct(table, texts, others, unique, name)
    labels, names, answers = _answers(table, answer, class_names, number=bool(target))
    if image:
        folder = Path(path).parent
        files = _existing_images(table.column(image), folder, table.places)
        options = dict(channels=channels, max_pixels=max_pixels, unreadable=unreadable, cache_bytes=cache_bytes)
        return image_source(name, files, labels, names, **options)
    if text:
        one, *other = ([str(value).strip() for value in table.column(column)] for column in texts)
        fields, lengths = encode_texts(tokenizer, one, length, *other, name=name, max_bytes=max_bytes)
    else:
        fields, lengths = {'inputs': _numbers(table, list(inputs or [c for c in table.columns if c != answer]))}, None

    def get(i: int) -> dict:
        return {**{field: values[i] for field, values in fields.items()}, **answers(i)}

    return Source(name, len(table.rows), get, labels, names, lengths)


def read_table(
    path: str,
    *,
    kind: str,
    columns: Sequence[str] | None = None,
    pattern: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Table:
    """The rows of one file or, with braces in its name, of several; arguments as in `open_table`."""
    if (columns and pattern) or (kind == 'jsonl' and (columns or pattern)):
        raise UserError(f'{kind}:{path}: columns are named once: by the file, by `columns`, or by `pattern`')
    parts = []
    for file in in_braces(path):
        lines = read_lines(file, max_bytes)
        if pattern:
            parts.append(_match(file, lines, pattern))
        elif kind == 'jsonl':
            parts.append(_read_jsonl(file, lines))
        else:
            parts.append(_read_csv(file, lines, columns, tabs=kind == 'tsv'))
        if not parts[-1].rows:
            raise UserError(f'{file}: has no rows')
        if parts[-1].columns != parts[0].columns:
            raise UserError(f'{file}: its columns are {parts[-1].columns}, of the file before {parts[0].columns}')
    rows = [row for part in parts for row in part.rows]
    return Table(parts[0].columns, rows, [place for part in parts for place in part.places])


def _read_csv(file: str, lines: list[str], columns: Sequence[str] | None, tabs: bool) -> Table:
    rows, places = [], []
    try:
        # Quotes in a table of tabs are part of the text.
        dialect = dict(dialect='excel-tab', quoting=csv.QUOTE_NONE) if tabs else {}
        reader = csv.reader((line + '\n' for line in lines), **dialect)
        names = list(columns) if columns else [column.strip() for column in next(reader, [])]
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise UserError(f'{file}, line {reader.line_num}: {len(row)} fields for {len(names)} columns')
            rows.append(row)
            places.append(f'{file}, line {reader.line_num}')
    except csv.Error as error:
        raise UserError(f'{file}: not a csv file ({error})') from error
    doubled = next((c for i, c in enumerate(names) if c in names[:i]), None)
    if doubled is not None:
        raise UserError(f'{file}: column {doubled!r} occurs twice')
    return Table(names, rows, places)


def _read_jsonl(file: str, lines: list[str]) -> Table:
    columns, rows, places = [], [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
            raise UserError(f'{file}, line {number}: not JSON in UTF-8 ({error})') from error
        if not isinstance(row, dict):
            raise UserError(f'{file}, line {number}: not an object')
        columns = columns or list(row)
        if set(row) != set(columns):
            odd = sorted(set(row) ^ set(columns))[0]
            raise UserError(f'{file}, line {number}: column {odd!r} is not in every line')
        rows.append([row[column] for column in columns])
        places.append(f'{file}, line {number}')
    return Table(columns, rows, places)


def _match(file: str, lines: list[str], pattern: str) -> Table:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f'pattern: {pattern!r} is not a regular expression: {error}') from None
    if not compiled.groupindex:
        raise UserError(f'pattern: {pattern!r} names no column; write (?P<text>.*) for one')
    rows, places = [], []
    for number, line in enumerate(lines, 1):
        found = compiled.fullmatch(line)
        if found is None and line.strip():
            raise UserError(f'{file}, line {number}: {line[:60]!r} does not match pattern={pattern!r}')
        if found is not None:
            rows.append(list(found.groupdict().values()))
            places.append(f'{file}, line {number}')
    return Table(list(compiled.groupindex), rows, places)


def _with_text(table: Table, columns: list[str], skip: bool) -> Table:
    """The table, its rows without a text left out if `skip` says so, and otherwise refused."""
    text_of = lambda value: '' if value is None else str(value).strip()  # null, or a group that took no part
    full = [all(text_of(row[table.columns.index(column)]) for column in columns) for row in table.rows]
    if not all(full) and not skip:
        place = table.places[full.index(False)]
        raise UserError(f"{place}: its text is empty; fill or remove the row, or leave it out with unreadable='skip'")
    if not any(full):
        raise UserError(f'{table.places[0]}: this text is empty, and so is every other')
    return _rows(table, [i for i, there in enumerate(full) if there])


def _rows(table: Table, kept: list[int]) -> Table:
    return table._replace(rows=[table.rows[i] for i in kept], places=[table.places[i] for i in kept])


def _distinct(table: Table, texts: list[str], others: list[Table], unique: bool, name: str) -> Table:
    """The rows whose texts are in none of the others and, where `unique`, in no row before."""
    if not texts:
        raise UserError(f'{name}: `unique` and `without` go by a text; name its column with text')
    for other, column in itertools.product(others, texts):
        if column not in other.columns:
            raise UserError(f'{other.places[0]}: no column {column!r}; {nearest(column, other.columns)}')
    keys = lambda t: [tuple(str(row[t.columns.index(c)]).strip() for c in texts) for row in t.rows]
    seen = {key for other in others for key in keys(other)}
    kept = []
    for i, key in enumerate(keys(table)):
        if key not in seen:
            kept.append(i)
            seen |= {key} if unique else set()
    if not kept:
        raise UserError(f'{name}: no row is left: `without` has every text')
    return _rows(table, kept)


def _answers(table: Table, column: str, class_names: Sequence[str] | None, number: bool) -> tuple:
    """Labels and the names of their classes, none of either for numbers, and i -> the field that an example has of it."""
    if number:
        targets = _numbers(table, [column])[:, 0]
        return None, None, lambda i: {'target': targets[i]}
    labels, names = parse_labels(table.column(column), table.places.__getitem__, class_names)
    return labels, names, lambda i: {'label': int(labels[i])}


def _numbers(table: Table, wanted: list[str]) -> np.ndarray:
    """The wanted columns as float32 [rows, features]; every value must be a finite number."""
    if not wanted:
        raise UserError(f'{table.places[0]}: no column is left for inputs')
    indices = [table.columns.index(column) for column in wanted]
    width = None
    features = []
    for row, place in zip(table.rows, table.places, strict=True):
        values = []
        for column, index in zip(wanted, indices, strict=True):
            try:
                values += [float(v) for v in (row[index] if isinstance(row[index], list) else [row[index]])]
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(
                    f'{place}: {column}={row[index]!r:.80} is not a number; list numeric columns in inputs'
                ) from error
            if not np.all(np.abs(values) <= np.finfo(np.float32).max):
                raise UserError(f'{place}: {column}={row[index]!r} is not finite in float32; fill or remove the row')
        if not values:
            raise UserError(f'{place}: no number in {", ".join(wanted)}; fill or remove the row')
        width = width or len(values)
        if len(values) != width:
            raise UserError(f'{place}: {len(values)} numbers, {width} in the rows before')
        features.append(np.array(values, np.float32))
    return np.stack(features)


def _existing_images(values: list, folder: Path, places: list[str]) -> list[Path]:
    files = [folder.expanduser() / str(value).strip() for value in values]
    for file, place in zip(files, places, strict=True):
        if not file.is_file():
            existing(file, place)
            raise UserError(f'{place}: {file} is not a file')
    return files
