"""Keras weights through h5py, without Keras: `.h5` (weights alone, or a whole model) and `.keras` (a zip with an h5).

.h5, Keras 1 to 3: attribute `layer_names`, at the root or in the group `model_weights`; for each layer a group whose
    attribute `weight_names` names its datasets, `conv2d_3/kernel:0`. We call that tensor `conv2d_3/kernel`.
.keras and .weights.h5, Keras 3: `layers/CLASS_N/vars/0, 1, …`; config.json has the layers' names, order and classes.

The config is read as data; nothing in it is ever made or called. Links, external storage and virtual datasets, which
reach other files, are refused, and sizes are checked against the file before memory is taken.
"""

import io
import json
import math
import mmap
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import h5py
import ml_dtypes
import numpy as np

from tl_jax.errors import UserError
from tl_jax.pretrained.tensors import Contents, Tensor, listed

SIGNATURE = b'\x89HDF\r\n\x1a\n'
MAX_DEFLATE = 1032  # The most bytes that one byte of deflate can stand for.
MAX_DEPTH = 32  # Of groups within groups.
MAX_CONFIG = 1 << 26  # Bytes of config.json; that of the largest Keras application has 2 ** 20.
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}

# What `vars/0, 1, …` of Keras 3 are, by the class in snake case, or by the attribute that holds a layer's part.
_LINEAR, _NORM, _RECURRENT = ('kernel', 'bias'), ('gamma', 'beta'), ('kernel', 'recurrent_kernel', 'bias')
VARIABLES = {
    **{f'conv{n}d{suffix}': _LINEAR for n in (1, 2, 3) for suffix in ('', '_transpose')},
    **{f'depthwise_conv{n}d': _LINEAR for n in (1, 2)},
    **{f'separable_conv{n}d': ('depthwise_kernel', 'pointwise_kernel', 'bias') for n in (1, 2)},
    **{name: _LINEAR for name in ('dense', 'einsum_dense', 'query_dense', 'key_dense', 'value_dense', 'output_dense')},
    'batch_normalization': (*_NORM, 'moving_mean', 'moving_variance'),
    'layer_normalization': _NORM,
    'group_normalization': _NORM,
    'embedding': ('embeddings',),
    'p_re_lu': ('alpha',),
    'cell': _RECURRENT,
}
# The fields of a layer's config that leave one of these out.
SWITCHES = {'bias': 'use_bias', 'gamma': 'scale', 'beta': 'center'}


class Source(NamedTuple):
    """The HDF5 part of a file: the whole of a `.h5`, a stretch of a `.keras`. `start` and `size` are in bytes."""

    path: Path
    data: mmap.mmap
    start: int
    size: int


class Layer(NamedTuple):
    """A layer of a Keras config: the group of a `.keras` file that holds it, its name, and its own config."""

    group: str
    name: str
    config: Mapping[str, Any]


class Found(NamedTuple):
    """A group with variables: its layer and that layer's place in the model, the group, and the variables' keys."""

    place: int
    layer: Layer
    group: str
    keys: Sequence[str]


def read(path: Path) -> Contents:
    """Describes the tensors of a Keras file in the order of the model's layers; `array()` gives their values.

    Raises:
      UserError: the file is damaged, or asks for anything but plain tensors of its own.
    """
    with open(path, 'rb') as file:
        head = file.read(len(SIGNATURE))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if head else b''
    with _damage_named(path):
        if head == SIGNATURE:
            return _read_h5(Source(path, data, 0, len(data)))
        if head.startswith(b'PK'):
            return _read_zip(path, data)
    raise UserError(f'{path}: no HDF5 or .keras file (its first bytes are {head.hex()!r}); is it truncated?')


def _read_h5(source: Source) -> Contents:
    with _open(source) as file:
        whole = _has(file, 'model_weights')
        group = _child(file, 'model_weights', source) if whole else file
        config = _text(file, 'model_config', source)
        if not _has_names(group, 'layer_names'):
            if not _has(file, 'layers'):
                raise UserError(f'{source.path}: without layer_names it holds no Keras weights; model.save writes them')
            return _by_groups(file, (), source)
        places = _by_attributes(group, 'model_weights/' if whole else '', source)
        notes = ('left aside the state of its optimizer',) if _has(file, 'optimizer_weights') else ()
        tensors = {name: _tensor(file, name, place, source) for name, place in places.items()}
    return Contents(tensors, _metadata(json.loads(config)) if config else {}, notes)


def _read_zip(path: Path, data: mmap.mmap) -> Contents:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise UserError(f'{path}: its archive has two entries of one name; save the model again')
        for entry in entries.values():
            _check_entry(entry, path)
        for name in ('config.json', 'model.weights.h5'):
            if name not in entries:
                raise UserError(f'{path}: a zip archive without {name}, so no .keras file; model.save writes those')
        if entries['config.json'].file_size > MAX_CONFIG:
            raise UserError(f'{path}: its config.json claims {entries["config.json"].file_size} bytes; it is refused')
        config = json.loads(archive.read('config.json'))
    entry = entries['model.weights.h5']
    source = Source(path, data, _start(entry, data, path), entry.file_size)
    with _open(source) as file:
        contents = _by_groups(file, tuple(_layers(config['config'])), source)
    return contents._replace(metadata=_metadata(config))


def _check_entry(entry: zipfile.ZipInfo, path: Path) -> None:
    """Keras stores its entries as they are, so a compressed one is no saving of Keras, and may be a bomb."""
    parts = PurePosixPath(entry.filename.replace('\\', '/'))
    if parts.is_absolute() or '..' in parts.parts:
        raise UserError(f'{path}: its entry {entry.filename!r:.80} leaves the archive; it is refused')
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
        raise UserError(
            f'{path}: its entry {entry.filename!r:.80} is compressed or encrypted, which Keras never does; '
            'save the model again'
        )


def _start(entry: zipfile.ZipInfo, data: mmap.mmap, path: Path) -> int:
    """The byte at which a stored entry's data begin; its local header may be longer than the directory's."""
    at = entry.header_offset
    header = data[at : at + 30] if at >= 0 else b''
    if len(header) < 30 or header[:4] != b'PK\x03\x04':
        raise UserError(f'{path}: its entry {entry.filename!r:.80} is damaged; fetch the file again')
    start = at + 30 + sum(struct.unpack('<HH', header[26:]))
    if start + entry.file_size > len(data):
        raise UserError(f'{path}: its entry {entry.filename!r:.80} reaches past the end of the file; fetch it again')
    return start


# The layers of a config, and the names of their variables.


def _layers(config: Mapping[str, Any], group: str = '', name: str = '') -> Iterator[Layer]:
    """Layers in the model's order, those of nested models after the model. Keras counts classes to name the groups."""
    used = Counter()
    for layer in config.get('layers', ()):
        snake = _snake(layer['class_name'])
        unique = f'{snake}_{used[snake]}' if used[snake] else snake
        used[snake] += 1
        here = Layer(f'{group}layers/{unique}', name + layer['config']['name'], layer['config'])
        yield here
        yield from _layers(here.config, f'{here.group}/', f'{here.name}/')


def _snake(name: str) -> str:
    """Keras' own rule: Conv2D is conv2d, BatchNormalization batch_normalization, PReLU p_re_lu."""
    name = re.sub(r'(.)([A-Z][a-z]+)', r'\1_\2', re.sub(r'\W+', '', name))
    return re.sub(r'([a-z])([A-Z])', r'\1_\2', name).lower()


def _variable_names(part: str, config: Mapping[str, Any], keys: Sequence[str]) -> Sequence[str]:
    """Names of a group's `vars`, by its class; the numbers they have where the class is unknown or has others."""
    names = VARIABLES.get(re.sub(r'_\d+$', '', part), ())
    names = tuple(name for name in names if config.get(SWITCHES.get(name), True))
    if names[-1:] == ('bias',) and len(keys) == len(names) - 1:  # A part, or a file without its config.
        names = names[:-1]
    return names if list(keys) == [str(i) for i in range(len(names))] else keys


def _metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """The shape of one image, (height, width, channels), if the config's first layer states it."""
    try:
        inner = config['config']
        first = (inner if isinstance(inner, list) else inner['layers'])[0]['config']
        shape = (first.get('batch_shape') or first.get('batch_input_shape'))[1:]
    except (KeyError, IndexError, TypeError, AttributeError):  # It states none, or is no config that we know.
        return {}
    return {'image_shape': str(tuple(shape))} if len(shape) == 3 and all(type(n) is int for n in shape) else {}


# Where the tensors lie.


def _by_attributes(group: h5py.Group, prefix: str, source: Source) -> dict[str, str]:
    """`{name: place in the file}` by the attributes `layer_names` and `weight_names`."""
    places = {}
    layers = _names(group, 'layer_names', source)
    if _has(group, 'top_level_model_weights'):
        layers.append('top_level_model_weights')
    for layer in layers:
        for weight in _names(_descend(group, layer, source), 'weight_names', source):
            name = _weight_name(layer, weight)
            if name in places:
                raise UserError(f'{source.path}: two tensors are called {name!r:.80}; save the model again')
            places[name] = f'{prefix}{layer}/{weight}'
    return places


def _weight_name(layer: str, weight: str) -> str:
    """`conv2d/kernel` for `conv2d/kernel:0`, `model/conv2d/kernel:0` or `kernel` of the layer `conv2d`."""
    parts = re.sub(r':\d+$', '', weight).split('/')
    return '/'.join(parts[parts.index(layer) :] if layer in parts else [layer, *parts])


def _by_groups(file: h5py.File, layers: Sequence[Layer], source: Source) -> Contents:
    """Tensors of Keras 3, which keeps each layer's variables in its group `vars`, in the order of the config."""
    owners = {layer.group: (place, layer) for place, layer in enumerate(layers)}
    found = [_found(group, keys, owners) for group, keys in _variables(file, source)]
    seeds = [each.group for each in found if each.group.endswith('/seed_generator')]
    tensors = {}
    for each in sorted(found, key=lambda each: (each.place, _natural(each.group))):
        if each.group in seeds:
            continue
        if each.group in owners:
            _check_owner(file, each.layer, source)
        for name, place in _places(each).items():
            if name in tensors:
                raise UserError(f'{source.path}: two tensors are called {name!r:.80}; save the model again')
            tensors[name] = _tensor(file, name, place, source)
    notes = [] if layers else ['the file has no config: layers are named by class, in no certain order']
    notes += ['left aside the state of its optimizer'] if _has(file, 'optimizer') else []
    notes += [f'left aside the seeds of random layers: {listed(seeds)}'] if seeds else []
    return Contents(tensors, notes=tuple(notes))


def _found(group: str, keys: Sequence[str], owners: Mapping[str, tuple[int, Layer]]) -> Found:
    """The layer of a group is the nearest above it; a group without one is a layer itself, named by its path."""
    above = (str(path) for path in (PurePosixPath(group), *PurePosixPath(group).parents))
    owner = next((path for path in above if path in owners), None)
    if owner is None:
        plain = '/'.join(part for part in group.split('/') if part != 'layers')
        return Found(len(owners), Layer(group, plain, {}), group, keys)
    return Found(*owners[owner], group, keys)


def _places(found: Found) -> dict[str, str]:
    """`{name: place in the file}` of a group's variables."""
    stem = found.layer.name + found.group.removeprefix(found.layer.group)
    config = found.layer.config if found.group == found.layer.group else {}
    names = _variable_names(found.group.split('/')[-1], config, found.keys)
    return {
        f'{stem}/{name}'.removeprefix('/'): f'{found.group}/vars/{key}'.removeprefix('/')
        for name, key in zip(names, found.keys, strict=True)
    }


def _natural(group: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', group)]


def _check_owner(file: h5py.File, layer: Layer, source: Source) -> None:
    """Keras 3.4 and later note the layer's name with its variables; it must be the config's."""
    stated = _text(_descend(file, f'{layer.group}/vars', source), 'name', source)
    if stated is not None and stated != layer.name.split('/')[-1]:
        raise UserError(
            f'{source.path}: its weights call {layer.group!r:.80} {stated!r:.80}, its config.json {layer.name!r:.80}; '
            'save the model again'
        )


def _variables(file: h5py.File, source: Source) -> Iterator[tuple[str, list[str]]]:
    """Each group that has variables, and their keys in order. A group met twice is refused: it may be a cycle."""
    pending, seen = [('', file)], set()
    while pending:
        where, group = pending.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen or where.count('/') > MAX_DEPTH:
            raise UserError(f'{source.path}: its group {where!r:.80} is linked twice or too deep; save the model again')
        seen.add(address)
        for name in group:
            if where == '' and name == 'optimizer':
                continue
            below = _child(group, name, source)
            if name == 'vars' and isinstance(below, h5py.Group):
                if len(below):
                    yield where, sorted(below, key=_natural)
            elif isinstance(below, h5py.Group):
                pending.append((f'{where}/{name}'.removeprefix('/'), below))
            else:
                raise UserError(f'{source.path}: {where}/{name} is a dataset outside of vars; no file of Keras')


# HDF5, with care.


def _open(source: Source) -> h5py.File:
    return h5py.File(_Slice(source), 'r')


class _Slice(io.RawIOBase):
    """A stretch of a mapped file as a file of its own, so that HDF5 reads it inside a zip archive, and uncopied."""

    def __init__(self, source: Source):
        self.source, self.at = source, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.source.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer) -> int:
        count = max(min(len(buffer), self.source.size - self.at), 0)
        first = self.source.start + self.at
        buffer[:count] = self.source.data[first : first + count]
        self.at += count
        return count


def _has(group: h5py.Group, name: str) -> bool:
    """Whether there is a link of this name; it is not followed."""
    return group.id.links.exists(name.encode())


def _child(group: h5py.Group, name: str, source: Source) -> h5py.Group | h5py.Dataset:
    """One step down. Only hard links are followed, for others may lead into other files."""
    if not isinstance(group, h5py.Group) or not name or not _has(group, name):
        raise UserError(f'{source.path}: it names {name!r:.80}, which it does not hold; fetch the file again')
    if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise UserError(f'{source.path}: {name!r:.80} is a link to another place or file; save the model again')
    return group[name]


def _descend(group: h5py.Group, place: str, source: Source) -> h5py.Group | h5py.Dataset:
    for name in place.split('/'):
        group = _child(group, name, source)
    return group


def _attribute(group: h5py.Group, name: str, source: Source) -> Any:
    """An attribute that is text or a list of it. HDF5 may crash on other types in damaged files, so none is read."""
    stored = group.attrs.get_id(name)
    if stored.shape is None or 0 in stored.shape:
        return ()
    kind = stored.get_type()
    if kind.get_class() != h5py.h5t.STRING or math.prod((*stored.shape, kind.get_size())) > source.size:
        raise UserError(f'{source.path}: its attribute {name!r:.80} is no text, or longer than the file; it is damaged')
    return group.attrs[name]


def _text(group: h5py.Group, name: str, source: Source) -> str | None:
    """A text attribute; None if there is none."""
    value = _attribute(group, name, source) if name in group.attrs else None
    return value.decode() if isinstance(value, bytes) else value


def _has_names(group: h5py.Group, name: str) -> bool:
    return name in group.attrs or f'{name}0' in group.attrs


def _names(group: h5py.Group, name: str, source: Source) -> list[str]:
    """A list of names; Keras splits those over 64 kB into NAME0, NAME1, …"""
    if not _has_names(group, name):
        raise UserError(f'{source.path}: {group.name!r:.80} has no {name}; save the model again with Keras')
    keys = [name] if name in group.attrs else [f'{name}{i}' for i in range(len(group.attrs))]
    values = [value for key in keys if key in group.attrs for value in np.ravel(_attribute(group, key, source))]
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def _tensor(file: h5py.File, name: str, place: str, source: Source) -> Tensor:
    """Describes a dataset, its size checked against the file: a view of the mapped file unless HDF5 has to unpack it."""
    dataset = _descend(file, place, source)
    dtype, shape = _dtype(dataset, name, source), dataset.shape
    if shape is None:
        raise UserError(f'{source.path}: the tensor {name!r:.80} has no values; save the model again')
    _check_storage(dataset, dtype, name, source)
    if 0 in shape:
        return Tensor(shape, dtype, lambda: np.zeros(shape, dtype))
    offset = dataset.id.get_offset()
    if offset is not None and dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype, logical=True)):
        return Tensor(shape, dtype, lambda: np.ndarray(shape, dtype, source.data, source.start + offset))

    def array() -> np.ndarray:
        with _damage_named(source.path), _open(source) as again:
            return np.asarray(_descend(again, place, source)[()]).view(dtype)

    return Tensor(shape, dtype, array)


def _dtype(dataset: h5py.Dataset, name: str, source: Source) -> np.dtype:
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f'{source.path}: {name!r:.80} is a group, not a tensor; save the model again')
    dtype = dataset.dtype
    if dtype == np.dtype('V2') and _text(dataset, 'dtype', source) == 'bfloat16':
        return np.dtype(ml_dtypes.bfloat16)  # HDF5 has none: Keras stores its bits as opaque bytes.
    if dtype.kind not in 'fiub' or dtype.itemsize > 8:
        raise UserError(f'{source.path}: the tensor {name!r:.80} is of dtype {dtype!s:.40}, no number; it is refused')
    return dtype


def _check_storage(dataset: h5py.Dataset, dtype: np.dtype, name: str, source: Source) -> None:
    """Refuses data outside of the file, and shapes or chunks larger than the stored bytes can hold."""
    tensor = f'{source.path}: the tensor {name!r:.80}'
    settings = dataset.id.get_create_plist()
    if dataset.is_virtual or settings.get_external_count():
        raise UserError(f'{tensor} lies in another file; save the model again, in one file')
    filters = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
    if not FILTERS.issuperset(filters) or len(set(filters)) != len(filters):
        raise UserError(
            f'{tensor} has HDF5 filters {filters}; of these we read gzip, shuffle and fletcher32, once each'
        )
    stored, needed = dataset.id.get_storage_size(), math.prod((*dataset.shape, dtype.itemsize))
    chunk = math.prod((*(dataset.chunks or ()), dtype.itemsize))
    room = stored * (MAX_DEFLATE if h5py.h5z.FILTER_DEFLATE in filters else 1)
    if needed and (stored > source.size or max(needed, chunk) > room):
        raise UserError(
            f'{tensor} claims {max(needed, chunk)} bytes, and the file has {stored} of them; fetch it again'
        )
    offset = dataset.id.get_offset()
    if needed and offset is not None and offset + stored > source.size:
        raise UserError(f'{tensor} reaches past the end of the file; fetch it again')


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Whatever h5py, zipfile and json raise on damaged files, and there are a dozen types, as one `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise UserError(f'{path}: a damaged or truncated Keras file ({why:.200}); fetch the file again') from None
