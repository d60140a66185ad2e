"""Safetensors: the format of Hugging Face, and our own (`save_variables`), whose names are our paths."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from tl_jax.errors import UserError
from tl_jax.pretrained.tensors import Contents, Tensor
from tl_jax.trees import flatten

DTYPES = {
    'F64': np.float64,
    'F32': np.float32,
    'F16': np.float16,
    'BF16': ml_dtypes.bfloat16,
    'F8_E4M3': ml_dtypes.float8_e4m3fn,
    'F8_E5M2': ml_dtypes.float8_e5m2,
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


def read(path: Path) -> Contents:
    """Reads the header; `array()` reads its tensor through the library's memory map.

    The library checks that the header fits the file and that the tensors cover it without gap or overlap.
    """
    try:
        opened = safetensors.safe_open(path, 'np')
        tensors = {name: _tensor(name, opened, path) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        return Contents(tensors, metadata=opened.metadata() or {})
    except (safetensors.SafetensorError, ValueError, UnicodeError) as error:
        why = ' '.join(str(error).split())
        raise UserError(f'{path}: a damaged safetensors file ({why:.200}); fetch the file again') from None


def _tensor(name: str, opened: Any, path: Path) -> Tensor:
    view = opened.get_slice(name)
    if view.get_dtype() not in DTYPES:
        raise UserError(f'{path}: the tensor {name!r:.80} has dtype {view.get_dtype()}, which numpy cannot hold')
    return Tensor(tuple(view.get_shape()), np.dtype(DTYPES[view.get_dtype()]), lambda: opened.get_tensor(name))


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
    path = Path(path)
    if path.suffix != '.safetensors':
        raise UserError(f"{path}: our own format is safetensors; give the file the suffix '.safetensors'")
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in flatten(variables).items()}
    text = {'format': FORMAT} | {name: str(value) for name, value in metadata.items()}
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        safetensors.numpy.save_file(arrays, partial, metadata=text)
        partial.chmod(0o644)  # the library writes files that only their owner may read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
