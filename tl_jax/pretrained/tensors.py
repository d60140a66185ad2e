"""What every reader of weights returns: tensors by name, described before they are read."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """One tensor of a file. Its shape and dtype are known, and checked against the file, before `array()` reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    array: Callable[[], np.ndarray]


class Contents(NamedTuple):
    """A weights file: its tensors in the file's order, its own metadata, and what the reader chose and left aside."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()


def listed(names, count: int = 4) -> str:
    """A clause for messages: the first few names, escaped because files state them, and how many more there are."""
    names = list(names)
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(f'{name!r:.80}' for name in names[:count]) + more
