"""Pickles written opcode by opcode, and the two containers of torch.save around them: files torch would not write."""

import struct
import zipfile
from pathlib import Path

MAGIC = 0x1950A86A20F9469CFC6C
STOP = b'.'


def function(module: str, name: str) -> bytes:
    return f'c{module}\n{name}\n'.encode()


def text(value: str) -> bytes:
    return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b'\x8a' + bytes([size]) + value.to_bytes(size, 'little', signed=True)


def row(*items: bytes) -> bytes:
    return b'(' + b''.join(items) + b't'


def call(what: bytes, *args: bytes) -> bytes:
    return what + row(*args) + b'R'


def table(**items: bytes) -> bytes:
    return b'}(' + b''.join(text(name) + value for name, value in items.items()) + b'u'


def storage(kind: str = 'FloatStorage', key: str = '0', size: int = 4, *, window: bytes = b'') -> bytes:
    return row(text('storage'), function('torch', kind), text(key), text('cpu'), number(size), window) + b'Q'


def tensor(held: bytes | None = None, offset=0, shape=(4,), strides=(1,)) -> bytes:
    sizes = [row(*map(number, sizes)) for sizes in (shape, strides)]
    hooks = call(function('collections', 'OrderedDict'))
    rebuild = function('torch._utils', '_rebuild_tensor_v2')
    return call(rebuild, storage() if held is None else held, number(offset), *sizes, b'\x89', hooks)


def pickled(value: bytes) -> bytes:
    return b'\x80\x02' + value + STOP


def write_zip(path: Path, pickle: bytes, storages: dict[str, bytes], **options) -> Path:
    with zipfile.ZipFile(path, 'w', **options) as archive:
        archive.writestr('archive/data.pkl', pickle)
        for key, data in storages.items():
            archive.writestr(f'archive/data/{key}', data)
    return path


def write_legacy(path: Path, pickle: bytes, storages: dict[str, tuple[int, bytes]], *, system: bytes = b'') -> Path:
    """`storages` are `{key: (stated number of elements, bytes)}`."""
    keys = b'](' + b''.join(map(text, storages)) + b'e'
    system = system or pickled(table(little_endian=b'\x88'))
    heads = pickled(number(MAGIC)) + pickled(number(1001)) + system + pickle + pickled(keys)
    path.write_bytes(heads + b''.join(struct.pack('<q', size) + data for size, data in storages.values()))
    return path


def write(path: Path, pickle: bytes, container: str) -> Path:
    """A file of one storage '0' of four float32 zeros, in either container."""
    if container == 'zip':
        return write_zip(path, pickle, {'0': bytes(16)})
    return write_legacy(path, pickle, {'0': (4, bytes(16))})
