"""A file mapped into memory, and arrays that are views of it: described before they are read, never copied."""

import math
import mmap
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tl_jax.errors import UserError

MAX_RANK = 32  # Of numpy 1.
LFS = b'version https://git-lfs'


def map_file(path: Path) -> mmap.mmap:
    """Maps a file read-only. Raises UserError if it is empty or a git-lfs pointer, OSError if it cannot be opened."""
    with open(path, 'rb') as handle:
        try:
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise UserError(f'{path}: the file is empty; fetch it again') from None
    if data[: len(LFS)] == LFS:
        raise UserError(f"{path}: a git-lfs pointer in the file's place; run 'git lfs pull' where you cloned it")
    return data


def array_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    """Returns the bytes of an array, in exact integers. Raises ValueError if numpy can have none of this shape."""
    if len(shape) > MAX_RANK or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError('an impossible shape')
    if math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
        raise ValueError('a shape larger than any memory')
    return math.prod(shape) * dtype.itemsize


def view(
    data: mmap.mmap, dtype: np.dtype, shape: Sequence[int], start: int, strides: Sequence[int] | None = None
) -> np.ndarray:
    """A read-only view of the file from byte `start` on; strides in bytes. The caller has checked that it lies inside.

    Pages once read count as memory of this process, so a load would cost the file twice: mapped and copied. They are
    handed back when the array and every view of it are gone.
    """
    if 0 in shape:
        return np.zeros(shape, dtype)
    array = np.ndarray(shape, dtype, data, start, strides)
    extent = sum((n - 1) * stride for n, stride in zip(shape, array.strides, strict=True)) + dtype.itemsize
    page = start - start % mmap.PAGESIZE
    if hasattr(data, 'madvise'):
        weakref.finalize(array, data.madvise, mmap.MADV_DONTNEED, page, start - page + extent).atexit = False
    return array
