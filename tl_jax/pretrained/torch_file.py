"""Torch checkpoints (`.pth`, `.pt`, `.bin`, `.th`) without torch: the zip format, and the legacy one before torch 1.6.

zip:    NAME/data.pkl, the pickle; NAME/data/KEY, the bytes of each storage, uncompressed; NAME/byteorder.
legacy: five pickles (magic number, protocol, system, the object, storage keys), then for each key an int64 count of
        elements and the elements, little-endian.

Every size is checked against the file before memory is taken. Tensors are views of the memory-mapped file.
"""

import io
import mmap
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tl_jax.errors import UserError
from tl_jax.pretrained import mapped, torch_pickle
from tl_jax.pretrained.tensors import Contents, Tensor, listed
from tl_jax.pretrained.torch_pickle import Storage, View

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
# Where training scripts put the state dict of the network, most explicit first.
NESTS = ('state_dict', 'model_state_dict', 'model', 'module', 'net', 'network', 'weights', 'params')

# What else comes with a suffix of torch: where it has which bytes, and what it is.
OTHERS = (
    (257, b'ustar', 'a tar archive, or a checkpoint before torch 0.1.10; unpack it, or save it again'),
    (0, b'\x1f\x8b', 'gzip; decompress it'),
    (0, b'BZh', 'bzip2; decompress it'),
    (0, b'\xfd7zXZ', 'xz; decompress it'),
    (0, b'7z\xbc\xaf', 'a 7z archive; unpack it'),
    (0, b'\x89HDF', "HDF5; give it the suffix '.h5'"),
    (0, b'<', 'a web page; fetch the file itself'),
    (8, b'{', "safetensors; give it the suffix '.safetensors'"),
    (0, b'\x80', 'a pickle of another protocol; save the state dict by torch.save'),
)


class Saved(NamedTuple):
    """A checkpoint's object, the byte at which each of its storages starts, and its byte order, '<' or '>'."""

    value: Any
    starts: Mapping[str, int]
    order: str


def read(path: Path) -> Contents:
    """Returns the tensors of a torch checkpoint. Errors are `UserError`s of one line that name the file."""
    file, data = str(path), mapped.map_file(path)
    if data[:2] == b'PK':
        saved = _read_zip(path, data)
    elif data[:2] == b'\x80\x02':
        saved = _read_legacy(data, file)
    else:
        kind = next((kind for start, magic, kind in OTHERS if data[start : start + len(magic)] == magic), None)
        looks = f'it looks like {kind}' if kind else f'its first bytes are {data[:8].hex()}; is it truncated?'
        raise UserError(f'{file}: in no format of torch.save: {looks}')
    state, notes = _state_dict(saved.value, file)
    return Contents({name: _tensor(view, saved, data, file) for name, view in state.items()}, notes=notes)


def _tensor(view: View, saved: Saved, data: mmap.mmap, file: str) -> Tensor:
    """A strided view of the mapped file: checked against its storage by `torch_pickle`, and that against the file."""
    storage, dtype = view.storage, view.dtype
    if saved.order == '>':
        if dtype.kind not in 'fiub' or dtype.isbuiltin != 1:
            raise UserError(f'{file}: {dtype} saved on a big-endian machine; save it again on a little-endian one')
        dtype = dtype.newbyteorder('>')
    start = saved.starts[storage.key] + storage.start * storage.dtype.itemsize + view.offset * dtype.itemsize
    strides = tuple(stride * dtype.itemsize for stride in view.strides)
    return Tensor(view.shape, view.dtype, lambda: mapped.view(data, dtype, view.shape, start, strides))


def _read_zip(path: Path, data: mmap.mmap) -> Saved:
    file = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, struct.error, NotImplementedError) as error:
        why = ' '.join(str(error).split())
        raise UserError(f'{file}: a damaged or truncated zip archive ({why:.100}); fetch the file again') from None
    named = {entry.filename: entry for entry in entries}
    roots = [name.removesuffix('/data.pkl') for name in named if name.count('/') == 1 and name.endswith('/data.pkl')]
    if len(roots) != 1 or len(named) != len(entries):
        raise UserError(f'{file}: a zip archive, but not one of torch.save (it has no data.pkl, or two)')
    root = roots[0]

    def extent(name: str) -> tuple[int, int]:
        if f'{root}/{name}' not in named:
            raise UserError(
                f'{file}: its pickle needs the entry {name!r:.60}, which the archive lacks; fetch the file again'
            )
        return _extent(named[f'{root}/{name}'], data, file)

    start, size = extent('data.pkl')
    if size > torch_pickle.MAX_BYTES:
        raise UserError(f'{file}: its pickle has {size} bytes, more than any table of tensors needs; it is refused')
    value, storages = torch_pickle.read(io.BytesIO(data[start : start + size]), file)
    starts = {}
    for key, storage in storages.items():
        starts[key], size = extent(f'data/{key}')
        if size != storage.size * storage.dtype.itemsize:
            raise UserError(
                f'{file}: storage {key!r:.40} has {size} bytes, not {storage.size} × {storage.dtype}; fetch it again'
            )
    _check_apart({key: (start, storages[key]) for key, start in starts.items()}, file)
    big = f'{root}/byteorder' in named and _bytes(extent('byteorder'), data) == b'big'
    return Saved(value, starts, '>' if big else '<')


def _extent(entry: zipfile.ZipInfo, data: mmap.mmap, file: str) -> tuple[int, int]:
    """Where an entry's own bytes lie: start and size. Refuses compression, which is how archives outgrow their file."""
    at = entry.header_offset
    header = data[at : at + 30] if at >= 0 else b''
    if len(header) < 30 or header[:4] != b'PK\x03\x04':
        raise UserError(f'{file}: the zip entry {entry.filename!r:.80} is damaged; fetch the file again')
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
        raise UserError(
            f'{file}: the zip entry {entry.filename!r:.80} is compressed or encrypted, which torch.save never does'
        )
    name_size, extra_size = struct.unpack('<HH', header[26:30])
    start = at + 30 + name_size + extra_size
    if start + entry.file_size > len(data):
        raise UserError(
            f'{file}: the zip entry {entry.filename!r:.80} reaches past the end of the file; fetch it again'
        )
    return start, entry.file_size


def _check_apart(stored: Mapping[str, tuple[int, Storage]], file: str) -> None:
    """Refuses entries that share bytes of the file: a small archive could state any amount of them."""
    end = 0
    for key, (start, storage) in sorted(stored.items(), key=lambda item: item[1][0]):
        if start < end:
            raise UserError(f'{file}: storage {key!r:.40} overlaps another one; fetch the file again')
        end = start + storage.size * storage.dtype.itemsize


def _bytes(extent: tuple[int, int], data: mmap.mmap) -> bytes:
    start, size = extent
    return data[start : start + min(size, 16)]


def _read_legacy(data: mmap.mmap, file: str) -> Saved:
    stream = io.BytesIO(data[: torch_pickle.MAX_BYTES])
    if torch_pickle.read(stream, file).value != MAGIC:
        raise UserError(f'{file}: a pickle, but not one of torch.save; it is refused, save the weights as safetensors')
    if torch_pickle.read(stream, file).value != PROTOCOL:
        raise UserError(f'{file}: an unknown protocol of torch.save; save the weights as safetensors')
    system = torch_pickle.read(stream, file).value
    if not isinstance(system, dict) or system.get('little_endian') is not True:
        raise UserError(f'{file}: saved on a big-endian machine; save it again on a little-endian one')
    value, storages = torch_pickle.read(stream, file)
    keys = torch_pickle.read(stream, file).value
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise UserError(f'{file}: its list of storages is not the one its tensors name; fetch the file again')
    starts, at = {}, stream.tell()
    for key in keys:
        storage = storages[key]
        starts[key] = at + 8
        end = starts[key] + storage.size * storage.dtype.itemsize
        if end > len(data) or struct.unpack('<q', data[at : at + 8]) != (storage.size,):
            raise UserError(f'{file}: storage {key!r:.40} is truncated or damaged; fetch the file again')
        at = end
    return Saved(value, starts, '<')


def _state_dict(value: Any, file: str) -> tuple[dict[str, View], tuple[str, ...]]:
    """Finds the table of tensors: below the first name of `NESTS`, else here, else below the only name that has one."""
    if not isinstance(value, dict):
        raise UserError(f'{file}: it holds no state dict; save model.state_dict()')
    tables = [key for key, below in value.items() if isinstance(below, dict) and _has_tensors(below)]
    nest = next((key for key in NESTS if key in tables), None)
    if nest is None and not _has_tensors(value):
        if len(tables) != 1:
            many = f'several state dicts ({listed(tables)})' if tables else 'no tensors'
            raise UserError(f'{file}: it holds {many}; save the state dict you want alone')
        nest = tables[0]
    table = value if nest is None else value[nest]
    notes = []
    if nest is not None:
        rest = [key for key in value if key != nest]
        notes.append(f'took its {nest!r:.60}' + (f', left aside {listed(rest)}' if rest else ''))
    others = [name for name, view in table.items() if not isinstance(view, View)]
    if others:
        notes.append(f'left aside what is no tensor: {listed(others)}')
    state = {name: view for name, view in table.items() if isinstance(view, View)}
    if not all(type(name) is str for name in state):
        raise UserError(f'{file}: a tensor of its state dict has a number for a name; save model.state_dict()')
    return state, tuple(notes)


def _has_tensors(table: dict) -> bool:
    return any(isinstance(value, View) for value in table.values())
