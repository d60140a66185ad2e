"""Read run directories: whatever is there, with a note for whatever is not.

A report is most wanted when a run went wrong, so nothing here raises for a missing, cut-off or damaged file;
each such file becomes one line in `notes`, which the page prints.
"""

import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from tl_jax.errors import UserError

MAX_TEXT_BYTES = 256 * 2**20
MAX_ARRAY_BYTES = 2**30


class Run(NamedTuple):
    """One run directory. `records` are the lines of metrics.jsonl in file order."""

    path: Path
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    splits: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return bool(self.summary)


class Predictions(NamedTuple):
    """What a model said about one split. Labels are 0 … C-1; `features`, `worst_*` may be absent."""

    index: Int[np.ndarray, 'example']
    label: Int[np.ndarray, 'example']
    probabilities: Float[np.ndarray, 'example class']
    class_names: tuple[str, ...]
    features: Float[np.ndarray, 'example feature'] | None
    worst_index: Int[np.ndarray, 'worst'] | None
    worst_images: UInt8[np.ndarray, 'worst height width channel'] | None

    @property
    def predicted(self) -> Int[np.ndarray, 'example']:
        return self.probabilities.argmax(1)

    @property
    def confidence(self) -> Float[np.ndarray, 'example']:
        return self.probabilities.max(1)


def is_run(path: Path) -> bool:
    """Whether a directory holds any file that a run writes."""
    return any((path / name).is_file() for name in ('config.json', 'metrics.jsonl', 'summary.json'))


def read_run(path: str | Path) -> Run:
    """Read everything small in a run directory. Raises UserError only if it is no run directory at all."""
    path = Path(path).resolve()
    if not is_run(path):
        raise UserError(f'{path}: no config.json, metrics.jsonl or summary.json here: not a run directory')
    notes: list[str] = []
    config = _read_object(path / 'config.json', notes)
    records = _read_records(path / 'metrics.jsonl', notes)
    summary = _read_object(path / 'summary.json', notes)
    if not summary:
        notes.append(f'The run has not finished: its last record is of step {last_step(records)}.')
    splits = tuple(sorted(file.stem for file in (path / 'predictions').glob('[!.]*.npz')))
    if not splits:
        notes.append('predictions/ holds no predictions: no confusion matrix, calibration or mistakes.')
    return Run(path, config, records, summary, splits, tuple(notes))


def find_runs(sweep: str | Path) -> dict[tuple[str, int], Path]:
    """(strategy, seed) -> directory for every `<strategy>/seed<N>/` of a sweep, finished or not."""
    sweep = Path(sweep).resolve()
    found = {}
    for path in sorted(sweep.glob('*/seed*')):
        seed = path.name.removeprefix('seed')
        if path.is_dir() and seed.isdecimal():
            found[path.parent.name, int(seed)] = path
    if not found:
        raise UserError(f'{sweep}: no <strategy>/seed<N>/ directories here: not a sweep directory')
    return found


def number(tree: Any, *keys: str) -> float | None:
    """The finite number at tree[keys[0]][keys[1]]…, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    usable = isinstance(tree, int | float) and not isinstance(tree, bool) and math.isfinite(tree)
    return tree if usable else None


def integers(tree: Any, *keys: str) -> tuple[int, ...]:
    """The integers in the list at tree[keys[0]][keys[1]]…; a lone integer counts as a list of one."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    values = tree if isinstance(tree, list | tuple) else [tree]
    return tuple(int(v) for v in values if isinstance(v, int | float) and math.isfinite(v))


def curve(records: Iterable[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric, by step.

    Where a resumed run repeats a step, the later record counts.
    """
    values = {}
    for record in records:
        step, value = number(record, 'step'), number(record, key)
        if step is not None and value is not None:
            values[step] = value
    steps = np.array(sorted(values), float)
    return steps, np.array([values[step] for step in steps], float)


def keys(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of all metrics in the records, sorted."""
    return sorted({key for record in records for key in record})


def stage_starts(records: Iterable[Mapping[str, Any]]) -> list[float]:
    """The last recorded step of every stage but the last: where the next one begins."""
    ends: dict[float, float] = {}
    for record in records:
        stage, step = number(record, 'stage'), number(record, 'step')
        if stage is not None and step is not None:
            ends[stage] = max(step, ends.get(stage, step))
    return [ends[stage] for stage in sorted(ends)][:-1]


def last_step(records: Iterable[Mapping[str, Any]]) -> int:
    """The greatest step recorded; 0 if there is none."""
    return int(max((number(record, 'step') or 0 for record in records), default=0))


def read_predictions(path: Path) -> tuple[Predictions | None, list[str]]:
    """Read and check predictions/<split>.npz. Returns what is usable, and a note for what is not."""
    where = f'{path.parent.name}/{path.name}'
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > MAX_ARRAY_BYTES:
            return None, [f'{where} unpacks to {size / 2**30:.1f} GiB, more than a report reads (1 GiB).']
        with np.load(path, allow_pickle=False) as arrays:
            return _check_predictions({name: arrays[name] for name in arrays.files}, where)
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        NotImplementedError,
        MemoryError,
    ) as error:
        return None, [f'{where} cannot be used: {error}']


def _check_predictions(arrays: Mapping[str, np.ndarray], where: str) -> tuple[Predictions, list[str]]:
    notes = []
    label, probabilities = arrays['label'], np.asarray(arrays['probabilities'], np.float64)
    if probabilities.ndim != 2 or label.ndim != 1 or len(label) != len(probabilities) or not len(label):
        raise ValueError(f'label {label.shape} and probabilities {probabilities.shape} should be [N] and [N, C]')
    count, classes = probabilities.shape
    if not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f'label has dtype {label.dtype}, not integer')
    names = tuple(str(name) for name in np.atleast_1d(arrays.get('class_names', np.arange(classes))))
    if len(names) != classes:
        notes.append(f'{where}: {len(names)} class names for {classes} classes; numbers are shown instead.')
        names = tuple(str(i) for i in range(classes))
    index = arrays.get('index', np.arange(count))
    features = arrays.get('features')
    if features is not None and (features.ndim != 2 or len(features) != count):
        notes.append(f'{where}: features {features.shape} do not belong to {count} examples; left out.')
        features = None
    keep = (label >= 0) & (label < classes) & np.isfinite(probabilities).all(1)
    if features is not None:
        features = np.asarray(features, np.float32)
        keep &= np.isfinite(features).all(1)
    if not keep.all():
        notes.append(
            f'{where}: {count - keep.sum()} of {count} rows left out (label outside 0…{classes - 1}, or not finite).'
        )
    if not keep.any():
        raise ValueError('no row has a label in range and finite values')
    images, worst = arrays.get('worst_images'), arrays.get('worst_index')
    if images is not None and not _are_images(images, worst):
        notes.append(f'{where}: worst_images left out: not uint8 [K, height, width, 1 or 3] with one worst_index each.')
        images = worst = None
    rows = [
        index[keep],
        label[keep],
        probabilities[keep],
        names,
        None if features is None else features[keep],
    ]
    return Predictions(*rows, worst, images), notes


def _are_images(images: np.ndarray, worst: np.ndarray | None) -> bool:
    shaped = images.ndim == 4 and images.shape[-1] in (1, 3) and images.dtype == np.uint8
    return shaped and worst is not None and worst.shape == images.shape[:1]


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise OSError(f'larger than {MAX_TEXT_BYTES >> 20} MiB')
    return path.read_text(encoding='utf-8', errors='replace')


def _read_object(path: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        value = json.loads(_read_text(path))
        if isinstance(value, dict):
            return value
        notes.append(f'{path.name} does not hold a JSON object.')
    except FileNotFoundError:
        notes.append(f'{path.name} is missing.')
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f'{path.name} cannot be read: {error}')
    return {}


def _read_records(path: Path, notes: list[str]) -> list[Mapping[str, Any]]:
    try:
        lines = _read_text(path).splitlines()
    except FileNotFoundError:
        notes.append(f'{path.name} is missing: no learning curves.')
        return []
    except OSError as error:
        notes.append(f'{path.name} cannot be read: {error}')
        return []
    records, bad, unfinite = [], 0, 0
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
            unfinite += any(isinstance(v, float) and not math.isfinite(v) for v in record.values())
        else:
            bad += 1
    if bad:
        notes.append(f'{path.name}: {bad} line(s) are not JSON objects (a run that was killed leaves one); left out.')
    if unfinite:
        notes.append(f'{path.name}: {unfinite} record(s) hold values that are not finite; curves have gaps there.')
    return records
