"""The `Source` of examples, and what every kind of source shares: labels, selection, checks of paths and
sizes."""

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tl_jax.errors import UserError, nearest

ANSWER = re.compile(r'(\w+_)?(label|target)(_\w+)?')  # a field that says what an example is: `token_label`, `target`
MAX_BYTES = 4 * 2**30  # of one array or table; a file that declares more is refused before memory is taken


class Source(NamedTuple):
    """Random access to examples; nothing is read or decoded until `get` asks for it.

    `get(i)` for 0 <= i < length gives one example as a new dict: `image` uint8 [H, W, C] or, for tables,
    `inputs` float32 [F]; and `label`, an int, where the source has labels. Arrays in it must not be written
    to.
    """

    name: str  # the spec string it came from
    length: int
    get: Callable[[int], dict]
    labels: np.ndarray | None = None  # int32 [length]; None: no labels, or known only by reading every example
    class_names: tuple[str, ...] | None = None
    lengths: np.ndarray | None = None  # int32 [length]: tokens of each text, without padding
    buckets: tuple[int, ...] = ()  # lengths that batches of texts are padded to, ascending; see `tl_jax.data.buckets`


def num_classes(source: Source) -> int:
    """How many classes the labels tell apart: the named ones, else the largest label + 1."""
    if source.class_names is not None:
        return len(source.class_names)
    return int(need_labels(source, 'the number of classes').max()) + 1


def need_labels(source: Source, purpose: str) -> np.ndarray:
    if source.labels is None:
        raise UserError(f'{source.name}: {purpose} needs labels that are known without reading every example')
    return source.labels


def class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Weights float32 [num_classes] by inverse frequency, N / (classes present * count): their mean over the
    N examples is 1 and every class present weighs the same in total. A class without examples gets 0."""
    counts = np.bincount(labels, minlength=num_classes)
    present = counts > 0
    weights = np.zeros(len(counts), np.float32)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return weights


def select(source: Source, indices: np.ndarray) -> Source:
    """The examples of `source` at `indices`, in that order."""
    get = source.get
    labels = None if source.labels is None else source.labels[indices]
    lengths = None if source.lengths is None else source.lengths[indices]
    return source._replace(length=len(indices), get=lambda i: get(int(indices[i])), labels=labels, lengths=lengths)


def without_labels(source: Source) -> Source:
    """The same examples, their labels, tags and numbers to predict gone for good."""
    get = source.get
    return source._replace(get=lambda i: {k: v for k, v in get(i).items() if not ANSWER.fullmatch(k)}, labels=None)


def without_classes(source: Source, omit: Sequence[int]) -> Source:
    """The examples of the other classes; the number of classes stays."""
    labels, classes = need_labels(source, f'omit={list(omit)}'), num_classes(source)
    unknown = next((label for label in omit if label not in range(classes)), None)
    if unknown is not None:
        raise UserError(f'{source.name}: omit names {unknown!r}; the classes are 0 … {classes - 1}')
    names = source.class_names or tuple(map(str, range(classes)))
    return select(source, np.flatnonzero(~np.isin(labels, omit)))._replace(class_names=names)


def fixed_permutation(length: int, seed: int = 0) -> np.ndarray:
    """A permutation that is the same on every machine and numpy: RandomState's streams are frozen (NEP
    19)."""
    return np.random.RandomState(seed).permutation(length)


def stratified_order(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """A fixed order of all examples in which every prefix holds the classes in proportion, to ±1 example."""
    order = fixed_permutation(len(labels), seed)
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(rank[order], kind='stable')]


def few_shots(source: Source, shots: int, seed: int = 0) -> Source:
    """`shots` labelled examples of every class, drawn by `seed`; a class that has fewer is an error."""
    if shots < 1:
        raise UserError(f'{source.name}: shots={shots} must be at least 1')
    labels = need_labels(source, f'shots={shots}')
    order = fixed_permutation(source.length, seed)
    chosen = []
    for label in range(num_classes(source)):
        members = order[labels[order] == label][:shots]
        if len(members) < shots:
            name = source.class_names[label] if source.class_names else label
            raise UserError(f'{source.name}: class {name!r} has {len(members)} examples, fewer than shots={shots}')
        chosen.append(members)
    return select(source, np.sort(np.concatenate(chosen)))


def parse_labels(
    values: Sequence, where: Callable[[int], str], class_names: Sequence[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels int32 [N] from what a table holds: whole numbers as they are, names by their place among the
    sorted names (or in `class_names`, as are numbers where one of them is such a name). `where(i)` says in an
    error message where value i stands."""
    text = [str(value).strip() for value in values]
    numbers = [_as_number(value) for value in text]
    for i, value in enumerate(text):
        if value in ('', 'None') or (numbers[i] is not None and not np.isfinite(numbers[i])):
            raise UserError(f'{where(i)}: label {value!r} is missing')
    in_order = class_names and all(name == str(i) for i, name in enumerate(class_names))
    named = class_names and not in_order and not set(text).isdisjoint(class_names)
    if all(number is not None for number in numbers) and not named:
        for i, number in enumerate(numbers):
            if number != int(number):
                raise UserError(f'{where(i)}: label {text[i]} is not a whole number')
            if abs(number) >= 2**31:
                raise UserError(f'{where(i)}: label {text[i]} is out of range')
        return np.array(numbers).astype(np.int32), tuple(class_names) if class_names else None
    names = tuple(class_names) if class_names else tuple(sorted(set(text)))
    ids = {name: i for i, name in enumerate(names)}
    for i, value in enumerate(text):
        if value not in ids:
            raise UserError(f'{where(i)}: label {value!r} is not in class_names; {nearest(value, names)}')
        if not class_names and numbers[i] is not None:
            first = next(j for j, number in enumerate(numbers) if number is None)
            raise UserError(f'labels mix numbers ({where(i)}: {value!r}) and names ({where(first)}: {text[first]!r})')
    return np.array([ids[value] for value in text], np.int32), names


def _as_number(text: str) -> float | None:
    # float() would also take 'infinity' for a number; 'nan' is how tables write a missing value.
    if re.fullmatch(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan', text, re.IGNORECASE):
        return float(text)
    return None


def integer_labels(labels: np.ndarray, count: int, name: str) -> np.ndarray:
    """Labels of an array file as int32 [count]; [count, 1] (CIFAR as published) is flattened."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise UserError(f'{name}: labels have shape {labels.shape}; one whole number per example is expected')
    if len(labels) != count:
        raise UserError(f'{name}: {len(labels)} labels for {count} examples')
    if labels.dtype.kind not in 'iuf':
        raise UserError(f'{name}: labels are of type {labels.dtype}; whole numbers are expected')
    wrong = np.flatnonzero(~np.isfinite(labels) | (labels != np.floor(labels)))
    if len(wrong):
        raise UserError(f'{name}: label {labels[wrong[0]]} of example {wrong[0]} is not a whole number')
    wrong = np.flatnonzero(labels.astype(np.float64) >= 2**31)
    if len(wrong):
        raise UserError(f'{name}: label {labels[wrong[0]]} of example {wrong[0]} is out of range')
    return labels.astype(np.int32)


def check_labels(source: Source, classes: int | None) -> None:
    """Refuses negative labels, and labels that reach `classes` (or the number of class names) where that is
    known."""
    if source.labels is None:
        return
    limit = classes or (len(source.class_names) if source.class_names else 2**31)
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= limit))
    if len(wrong):
        expected = f'0 … {limit - 1}' if limit < 2**31 else '0, 1, …'
        raise UserError(
            f'{source.name}: label {source.labels[wrong[0]]} of example {wrong[0]} is out of range; '
            f'expected {expected} ({len(wrong)} such)'
        )


def existing(path: str | Path, name: str) -> Path:
    """`path` with `~` expanded, if it exists; else an error that names the nearest siblings."""
    path = Path(path).expanduser()
    if path.exists():
        return path
    parent = next((p for p in path.parents if p.exists()), Path('.'))
    missing = path.relative_to(parent).parts[0] if path != parent else str(path)
    siblings = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(missing, siblings, n=3, cutoff=0.5)
    hint = f'; {nearest(missing, close)}' if close else ''
    raise UserError(f'{name}: {missing!r} does not exist in {parent.absolute()}{hint}')


def check_size(nbytes: int, name: str, max_bytes: int = MAX_BYTES) -> None:
    if nbytes > max_bytes:
        raise UserError(f'{name}: would take {nbytes / 2**30:.1f} GiB of memory; the limit is max_bytes={max_bytes}')
