"""Safetensors: the format of Hugging Face, and our own (`save_variables`), whose names are our paths."""

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

from tl_jax.errors import UserError
from tl_jax.pretrained import strict_json
from tl_jax.pretrained.mapped import array_bytes, map_file, view
from tl_jax.pretrained.tensors import Contents, Tensor
from tl_jax.trees import flatten

DTYPES = {
    'F64': np.float64,
    'F32': np.float32,
    'F16': np.float16,
    'BF16': ml_dtypes.bfloat16,
    'F8_E4M3': ml_dtypes.float8_e4m3fn,
    'F8_E5M2': ml_dtypes.float8_e5m2,
    'F8_E8M0': ml_dtypes.float8_e8m0fnu,
    'I64': np.int64,
    'I32': np.int32,
    'I16': np.int16,
    'I8': np.int8,
    'U64': np.uint64,
    'U32': np.uint32,
    'U16': np.uint16,
    'U8': np.uint8,
    'BOOL': np.bool_,
    'C64': np.complex64,
}
FORMAT = 'tl_jax'
MAX_HEADER = 100_000_000  # Bytes; the format's own limit.


def read(path: Path) -> Contents:
    """Reads the header; `array()` is a view of the mapped file, without a copy.

    The header must fit the file, and its tensors cover the rest of it without gap or overlap.

    Raises:
      UserError: the file is damaged, or a tensor has a dtype we do not know.
    """
    data = map_file(path)
    try:
        start, header = _header(data)
        metadata = _metadata(header.pop('__metadata__', {}))
        entries = {name: _entry(name, fields, path) for name, fields in header.items()}
        _check_cover(entries, len(data) - start)
    except ValueError as error:
        raise UserError(f'{path}: a damaged safetensors file ({error!s:.200}); fetch the file again') from None
    return Contents({name: _tensor(entry, start, data) for name, entry in entries.items()}, metadata)


class _Entry(NamedTuple):
    """A tensor of the header: the bytes from `begin` up to `end` of what follows it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _header(data: mmap.mmap) -> tuple[int, dict[str, Any]]:
    """Returns where the header ends, and the header: eight bytes of its length, little-endian, and JSON."""
    size = int.from_bytes(data[:8], 'little')
    if len(data) < 8 or size > min(MAX_HEADER, len(data) - 8):
        raise ValueError(f'its header of {size} bytes does not fit the file of {len(data)}')
    header = strict_json.parse(data[8 : 8 + size])
    if type(header) is not dict:
        raise ValueError('its header is no table')
    return 8 + size, header


def _metadata(fields: Any) -> dict[str, str]:
    if type(fields) is not dict or not all(type(value) is str for value in fields.values()):
        raise ValueError('its metadata are not text')
    return fields


def _entry(name: str, fields: Any, path: Path) -> _Entry:
    match fields:
        case {'dtype': str() as kind, 'shape': [*shape], 'data_offsets': [int() as begin, int() as end]}:
            pass
        case _:
            raise ValueError(f'the tensor {name!r:.80} has no dtype, shape and offsets')
    if kind not in DTYPES:
        raise UserError(
            f'{path}: the tensor {name!r:.80} has dtype {kind!r:.40}, which we cannot read; save it in another'
        )
    dtype = np.dtype(DTYPES[kind])
    try:
        size = array_bytes(shape, dtype)
    except ValueError as error:
        raise ValueError(f'the tensor {name!r:.80} has {error}') from None
    if not 0 <= begin <= end or end - begin != size:
        raise ValueError(f'the tensor {name!r:.80} of {size} bytes has the range {begin} to {end}'[:200])
    return _Entry(dtype, tuple(shape), begin, end)


def _check_cover(entries: Mapping[str, _Entry], size: int) -> None:
    """Raises ValueError unless the tensors, in the order of their ranges, follow one another up to `size`."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            wrong = 'overlaps the one before it' if entry.begin < at else 'leaves a gap before it'
            raise ValueError(f'the tensor {name!r:.80} {wrong}')
        at = entry.end
    if at != size:
        raise ValueError(f'its tensors end at byte {at} of {size}')


def _tensor(entry: _Entry, start: int, data: mmap.mmap) -> Tensor:
    return Tensor(entry.shape, entry.dtype, lambda: view(data, entry.dtype, entry.shape, start + entry.begin))


def save_variables(path: str | os.PathLike, variables: Mapping, metadata: Mapping[str, Any]) -> None:
    """Writes variables in our own format, at once or not at all.

    Args:
      path: ends in `.safetensors`; its folder exists.
      variables: `{'params': {role: …}, 'batch_stats': {role: …}, …}`, arrays of any kind.
      metadata: what a reader needs to know (`model`, `num_classes`, `class_names`, `image_shape`, licence, figures, …);
        written by `str`.

    Raises:
      UserError: the path has another suffix.
    """
    save_tensors(path, flatten(variables), {'format': FORMAT} | dict(metadata))


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes named tensors at once or not at all; path, metadata and errors as `save_variables`."""
    path = Path(path)
    if path.suffix != '.safetensors':
        raise UserError(f"{path}: the format is safetensors; give the file the suffix '.safetensors'")
    if not path.parent.is_dir():
        raise UserError(f'{path}: there is no folder {path.parent}; make it first')
    arrays = {name: np.asarray(tensor, order='C') for name, tensor in tensors.items()}
    text = {name: str(value) for name, value in metadata.items()}
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        safetensors.numpy.save_file(arrays, partial, metadata=text)
        partial.chmod(0o644)  # the library writes files that only their owner may read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
