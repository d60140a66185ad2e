"""Flax's msgpack files (`.msgpack`, `flax.serialization.to_bytes`): nested maps whose leaves are arrays.

A leaf is an extension of msgpack, itself msgpack: 1 an array, (shape, dtype, bytes); 2 a complex number, (real, imaginary);
3 a scalar, as 1. Arrays above a gigabyte come as a map of chunks. The file is mapped and walked token by token, so that
arrays are views of it, and nothing in it can ask for more than the file holds.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tl_jax.errors import UserError
from tl_jax.pretrained.mapped import array_bytes, map_file, view
from tl_jax.pretrained.tensors import Contents, Tensor, listed

DTYPES = {
    np.dtype(t).name: np.dtype(t)
    for t in (
        *(np.float16, np.float32, np.float64, np.complex64, np.complex128, np.bool_),
        *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    )
}
NUMBERS = {0xCA: '>f', 0xCB: '>d', 0xCC: '>B', 0xCD: '>H', 0xCE: '>I', 0xCF: '>Q',
           0xD0: '>b', 0xD1: '>h', 0xD2: '>i', 0xD3: '>q'}  # fmt: skip
# The kind, and the number that states the length.
SIZED = {0xC4: ('bin', '>B'), 0xC5: ('bin', '>H'), 0xC6: ('bin', '>I'), 0xC7: ('ext', '>B'), 0xC8: ('ext', '>H'),
         0xC9: ('ext', '>I'), 0xD9: ('str', '>B'), 0xDA: ('str', '>H'), 0xDB: ('str', '>I'), 0xDC: ('array', '>H'),
         0xDD: ('array', '>I'), 0xDE: ('map', '>H'), 0xDF: ('map', '>I')}  # fmt: skip
CHUNKED = '__msgpack_chunked_array__'
MAX_TOKENS = 2_000_000  # Each takes up to some 100 bytes of memory; a leaf needs two.
MAX_DEPTH = 100


class Token(NamedTuple):
    """One value: for 'map' and 'array' the number of items that follow it, for 'bin' and 'ext' its `Extent`."""

    kind: str
    value: Any


class Extent(NamedTuple):
    """Bytes of the file, and the code of the extension they are."""

    start: int
    end: int
    code: int | None = None


def read(path: Path) -> Contents:
    """Reads what describes the arrays; `array()` is a view of the mapped file. Names are joined by '/'.

    Raises:
      UserError: the file is damaged, or a leaf has a dtype we do not know.
    """
    data = map_file(path)
    tokens = _tokens(data, 0, len(data))
    try:
        leaves = list(_leaves(_value(tokens, data, ())))
        if next(tokens, None) or len(dict(leaves)) < len(leaves):
            raise ValueError('two values of one name, or more after its end')
    except _Unknown as error:
        raise UserError(f'{path}: {error}, which we cannot read; save it in another') from None
    except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
        why = ' '.join(str(error).split())
        raise UserError(f'{path}: a damaged msgpack file ({why:.200}); fetch the file again') from None
    tensors = {name: leaf for name, leaf in leaves if isinstance(leaf, Tensor)}
    if not tensors:
        raise UserError(f'{path}: it holds no arrays; save the variables by flax.serialization.to_bytes')
    others = [name for name, leaf in leaves if not isinstance(leaf, Tensor)]
    return Contents(tensors, notes=(f'left aside what is no tensor: {listed(others)}',) if others else ())


class _Unknown(Exception):
    """A tensor has a dtype that is not in `DTYPES`."""


def _leaves(tree: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield name, tree
        return
    for key, below in tree.items():
        yield from _leaves(below, f'{name}/{key}' if name else key)


def _tokens(data: mmap.mmap, at: int, end: int) -> Iterator[Token]:
    for _ in range(MAX_TOKENS):
        if at >= end:
            return
        token, at = _token(data, at, end)
        yield token
    raise ValueError(f'more than {MAX_TOKENS:,} values')


def _token(data: mmap.mmap, at: int, end: int) -> tuple[Token, int]:
    """Returns the token at byte `at`, and where the next one starts."""
    first, at, code = data[at], at + 1, None
    match first:
        case 0xC0 | 0xC2 | 0xC3:
            return Token('constant', {0xC0: None, 0xC2: False, 0xC3: True}[first]), at
        case _ if first in NUMBERS:
            (value,) = struct.unpack_from(NUMBERS[first], data, at)
            return Token('number', value), at + struct.calcsize(NUMBERS[first])
        case _ if first < 0x80 or first >= 0xE0:
            return Token('number', first if first < 0x80 else first - 0x100), at
        case _ if first < 0x90:
            kind, size = 'map', first & 15
        case _ if first < 0xA0:
            kind, size = 'array', first & 15
        case _ if first < 0xC0:
            kind, size = 'str', first & 31
        case _ if 0xD4 <= first <= 0xD8:
            kind, size = 'ext', 1 << (first - 0xD4)
        case _ if first in SIZED:
            kind, form = SIZED[first]
            (size,) = struct.unpack_from(form, data, at)
            at += struct.calcsize(form)
        case _:
            raise ValueError(f'no value starts with {first:#x}')
    if kind in ('map', 'array'):
        return Token(kind, size), at
    if kind == 'ext':
        code, at = data[at], at + 1
    if at + size > end:
        raise ValueError(f'{size} bytes at byte {at}, where {end - at} are left')
    value = data[at : at + size].decode() if kind == 'str' else Extent(at, at + size, code)
    return Token(kind, value), at + size


def _value(tokens: Iterator[Token], data: mmap.mmap, path: tuple[str, ...]) -> Any:
    """Builds the next value: a dict for maps and arrays, a `Tensor` for extensions, else a plain value."""
    if len(path) > MAX_DEPTH:
        raise ValueError('nested too deeply')
    match token := next(tokens, None):
        case Token('map', count):
            return _map(tokens, data, path, count)
        case Token('array', count):
            return {str(i): _value(tokens, data, (*path, str(i))) for i in range(count)}
        case Token('ext', extent):
            return _leaf(data, extent, '/'.join(path))
        case Token():
            return token.value
    raise ValueError('truncated')


def _map(tokens: Iterator[Token], data: mmap.mmap, path: tuple[str, ...], count: int) -> Any:
    table = {}
    for _ in range(count):
        match next(tokens, None):
            case Token('str' | 'number', key) if str(key) not in table:
                table[str(key)] = _value(tokens, data, (*path, str(key)))
            case _:
                raise ValueError(f'no name, or one for the second time, in {"/".join(path)!r:.80}')
    return _joined(table, '/'.join(path)) if CHUNKED in table else table


def _leaf(data: mmap.mmap, extent: Extent, name: str) -> Tensor:
    match extent.code, list(_tokens(data, extent.start, extent.end)):
        case ((1 | 3), [Token('array', 3), Token('array', rank), *sizes, Token('str', kind), Token('bin', held)]):
            shape = tuple(size.value for size in sizes)
            if kind not in DTYPES:
                raise _Unknown(f'the array {name!r:.80} has dtype {kind!r:.40}')
            if rank != len(shape) or array_bytes(shape, DTYPES[kind]) != held.end - held.start:
                raise ValueError(f'the array {name!r:.80} is not of the size that it states')
            return Tensor(shape, DTYPES[kind], lambda: view(data, DTYPES[kind], shape, held.start))
        case 2, [Token('array', 2), Token('number', real), Token('number', imaginary)]:
            return Tensor((), np.dtype(complex), lambda: np.asarray(complex(real, imaginary)))
    raise ValueError(f'{name!r:.80} is no array of flax')


def _joined(table: dict[str, Any], name: str) -> Tensor:
    """The array that a map of chunks stands for; `array()` copies them together."""
    shape = tuple(table['shape'][str(i)] for i in range(len(table['shape'])))
    chunks = [table['chunks'][str(i)] for i in range(len(table['chunks']))]
    if not chunks or not all(type(chunk) is Tensor and chunk.dtype == chunks[0].dtype for chunk in chunks):
        raise ValueError(f'the chunks of {name!r:.80} do not fit together')
    dtype = chunks[0].dtype
    if array_bytes(shape, dtype) != sum(array_bytes(chunk.shape, dtype) for chunk in chunks):
        raise ValueError(f'the chunks of {name!r:.80} do not fill its shape')
    return Tensor(shape, dtype, lambda: np.concatenate([chunk.array().ravel() for chunk in chunks]).reshape(shape))
