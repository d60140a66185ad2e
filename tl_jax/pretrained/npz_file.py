"""Numpy archives (`.npz`): plain arrays, and the quantised MobileNets of DATA.md, dequantised."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tl_jax.errors import UserError
from tl_jax.pretrained.tensors import Contents, Tensor

MAX_DEFLATE = 1032  # The most bytes that one byte of deflate can stand for.


def read(path: Path) -> Contents:
    """Reads the header of every array; `array()` reads its data. Object arrays, which are pickles, are refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = {
                entry.filename.removesuffix('.npy'): _tensor(archive, entry, path)
                for entry in archive.infolist()
                if not entry.is_dir()
            }
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy's header parser raise a dozen types on damaged files.
        raise _damaged(path, error) from None
    return _dequantised(tensors)


def _tensor(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> Tensor:
    """Describes one entry from its header, and checks the size that this implies against the archive's directory."""
    name = entry.filename
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if reader is None:
            raise UserError(f'{path}: the array {name!r:.80} is of npy version {version}; save it again with numpy')
        shape, _, dtype = reader(stream)
        size = entry.file_size - stream.tell()
    if dtype.hasobject:
        raise UserError(f'{path}: the array {name!r:.80} holds Python objects, a pickle; it is refused')
    if any(n < 0 for n in shape) or int(np.prod([*shape, dtype.itemsize], dtype=object)) != size:
        raise UserError(
            f'{path}: the array {name!r:.80} is not of the size that its header states; fetch the file again'
        )
    if entry.file_size > MAX_DEFLATE * (entry.compress_size + 64):
        raise UserError(
            f'{path}: the array {name!r:.80} claims more bytes than its data can hold; fetch the file again'
        )

    def array() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(name) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)
        except Exception as error:  # As above.
            raise _damaged(path, error) from None

    return Tensor(tuple(shape), dtype, array)


def _damaged(path: Path, error: Exception) -> UserError:
    why = ' '.join(str(error).split())
    return UserError(f'{path}: a damaged or truncated npz archive ({why:.200}); fetch the file again')


def _dequantised(tensors: Mapping[str, Tensor]) -> Contents:
    """Replaces each `LAYER/{q, scale, zero}` by `LAYER/weight` = (q − zero) · scale, float32."""
    layers = [name.removesuffix('/q') for name in tensors if name.endswith('/q')]
    parts = ('q', 'scale', 'zero')
    layers = [layer for layer in layers if all(f'{layer}/{part}' in tensors for part in parts)]
    if not layers:
        return Contents(tensors)
    taken = {f'{layer}/{part}' for layer in layers for part in parts}
    kept = {name: tensor for name, tensor in tensors.items() if name not in taken}
    weights = {f'{layer}/weight': _weight(*(tensors[f'{layer}/{part}'] for part in parts)) for layer in layers}
    return Contents(weights | kept, notes=(f'dequantised {len(layers)} weights, (q − zero) · scale, to float32',))


def _weight(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """TFLite's affine quantisation: one scale and zero for the tensor, or one for each output channel (axis 0)."""

    def array() -> np.ndarray:
        along = (-1, *[1] * (len(q.shape) - 1))
        step, origin = scale.array().astype(np.float32).reshape(along), zero.array().astype(np.float32).reshape(along)
        return (q.array().astype(np.float32) - origin) * step

    return Tensor(q.shape, np.dtype(np.float32), array)
