"""Tables: csv, tsv and jsonl files of features, of texts or of paths of images, with a label column."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_jax.data.base import MAX_BYTES, Source, check_size, existing, parse_labels
from tl_jax.data.images import CACHE_BYTES, MAX_PIXELS, image_source
from tl_jax.data.text import make_tokenizer
from tl_jax.errors import UserError, nearest


def open_table(
    path: str,
    *,
    label: str = 'label',
    inputs: Sequence[str] | None = None,
    image: str | None = None,
    text: str | None = None,
    tokenizer: str | Mapping[str, Any] = 'hashed',
    length: int = 128,
    class_names: Sequence[str] | None = None,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    unreadable: str = 'error',
    cache_bytes: int = CACHE_BYTES,
    max_bytes: int = MAX_BYTES,
) -> Source:
    """`csv:PATH` or `tsv:PATH` (first line: the column names) or `jsonl:PATH` (one object a line).

    With `image`, that column holds paths relative to the table. With `text`, an example's `tokens` int32 [length] are
    those that `tokenizer` (`tl_jax.data.text.make_tokenizer`) gives for that column. Otherwise its `inputs` float32 [F] are
    the columns `inputs`, by default all but `label`, in the file's order; in jsonl a column may hold a list of numbers.
    """
    ends = {'.jsonl': 'jsonl', '.ndjson': 'jsonl', '.tsv': 'tsv'}
    kind = next((kind for end, kind in ends.items() if path.endswith(end)), 'csv')
    name = f'{kind}:{path}'
    file = existing(path, name)
    check_size(file.stat().st_size, name, max_bytes)
    columns, rows, lines = _read_jsonl(file) if kind == 'jsonl' else _read_csv(file, tabs=kind == 'tsv')
    if not rows:
        raise UserError(f'{file}: has no rows')
    for column in [label, *([image or text] if image or text else inputs or ())]:
        if column not in columns:
            raise UserError(f'{file}: no column {column!r}; {nearest(column, columns)}')

    def where(i: int) -> str:
        return f'{file}, line {lines[i]}'

    labels, names = parse_labels([row[columns.index(label)] for row in rows], where, class_names)
    if image:
        images = _existing_images([row[columns.index(image)] for row in rows], file.parent, where)
        return image_source(
            name,
            images,
            labels,
            names,
            channels=channels,
            max_pixels=max_pixels,
            unreadable=unreadable,
            cache_bytes=cache_bytes,
        )
    if text:
        encode = make_tokenizer(tokenizer).encode
        tokens = np.stack([encode(str(row[columns.index(text)]), length) for row in rows])
        return Source(name, len(rows), lambda i: {'tokens': tokens[i], 'label': int(labels[i])}, labels, names)
    wanted = list(inputs) if inputs else [c for c in columns if c != label]
    features = _numbers(columns, rows, wanted, where)
    return Source(name, len(rows), lambda i: {'inputs': features[i], 'label': int(labels[i])}, labels, names)


def _read_csv(file: Path, tabs: bool) -> tuple[list[str], list[list], list[int]]:
    """Column names, rows, and the line in the file where each row ends."""
    rows, lines = [], []
    try:
        with file.open(newline='', encoding='utf-8-sig') as stream:
            # Quotes in a table of tabs are part of the text.
            reader = csv.reader(stream, 'excel-tab', quoting=csv.QUOTE_NONE) if tabs else csv.reader(stream)
            columns = [column.strip() for column in next(reader, [])]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(columns):
                    raise UserError(f'{file}, line {reader.line_num}: {len(row)} fields for {len(columns)} columns')
                rows.append(row)
                lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f'{file}: not a csv file in UTF-8 ({error})') from error
    doubled = next((c for i, c in enumerate(columns) if c in columns[:i]), None)
    if doubled is not None:
        raise UserError(f'{file}: column {doubled!r} occurs twice')
    return columns, rows, lines


def _read_jsonl(file: Path) -> tuple[list[str], list[list], list[int]]:
    columns, rows, lines, number = [], [], [], 0
    try:
        with file.open(encoding='utf-8-sig') as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f'{file}, line {number}: not an object')
                columns = columns or list(row)
                if set(row) != set(columns):
                    odd = sorted(set(row) ^ set(columns))[0]
                    raise UserError(f'{file}, line {number}: column {odd!r} is not in every line')
                rows.append([row[column] for column in columns])
                lines.append(number)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f'{file}, line {number or 1}: not JSON in UTF-8 ({error})') from error
    return columns, rows, lines


def _numbers(columns: list[str], rows: list[list], wanted: list[str], where) -> np.ndarray:
    """The wanted columns as float32 [rows, features]; every value must be a finite number."""
    if not wanted:
        raise UserError(f'{where(0)}: no column is left for inputs')
    places = [columns.index(column) for column in wanted]
    width = None
    features = []
    for i, row in enumerate(rows):
        values = []
        for column, place in zip(wanted, places, strict=True):
            try:
                values += [float(v) for v in (row[place] if isinstance(row[place], list) else [row[place]])]
            except (TypeError, ValueError) as error:
                raise UserError(
                    f'{where(i)}: {column}={row[place]!r} is not a number; list numeric columns in inputs'
                ) from error
            if not np.all(np.isfinite(values)):
                raise UserError(f'{where(i)}: {column}={row[place]!r} is not finite; fill or remove the row')
        width = width or len(values)
        if len(values) != width:
            raise UserError(f'{where(i)}: {len(values)} numbers, {width} in the rows before')
        features.append(np.array(values, np.float32))
    return np.stack(features)


def _existing_images(values: list, folder: Path, where) -> list[Path]:
    files = [folder / str(value).strip() for value in values]
    for i, file in enumerate(files):
        if not file.is_file():
            existing(file, where(i))
            raise UserError(f'{where(i)}: {file} is not a file')
    return files
