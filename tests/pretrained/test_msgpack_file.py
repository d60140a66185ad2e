"""What flax.serialization wrote, against what it restores; and files it would not write."""

import random
import struct
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization

from tl_jax.errors import UserError
from tl_jax.pretrained import msgpack_file
from tl_jax.pretrained.msgpack_file import read
from tl_jax.trees import flatten

RNG = np.random.default_rng(0)
DTYPES = [*map(np.dtype, '?bBhHiIlLefdFD'), ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
TREE = {
    'params': {
        'dtypes': {np.dtype(t).name: RNG.normal(size=(2, 3)).astype(t) for t in DTYPES},
        'sizes': {str(n): RNG.normal(size=n).astype(np.float32) for n in (0, 1, 7, 60, 300, 70_000)},
        'jax/array': jnp.arange(12.0).reshape(1, 3, 4, 1),
        'rank 0': np.float32(3)[...],
    },
    'complex': 2 - 3j,
    'scalar': {'float16': np.float16(2.5), 'int64': np.int64(-(2**40))},
}


def save(path, tree):
    path.write_bytes(serialization.msgpack_serialize(tree))
    return path


def test_reads_what_flax_restores(tmp_path):
    path = save(tmp_path / 'w.msgpack', TREE)
    restored = flatten(serialization.msgpack_restore(path.read_bytes()))
    tensors = read(path).tensors
    assert list(tensors) == list(restored)
    for name, tensor in tensors.items():
        array, expected = tensor.array(), np.asarray(restored[name])
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
        assert array.tobytes() == expected.tobytes(), name


def test_arrays_are_views_of_the_file(tmp_path):
    array = read(save(tmp_path / 'w.msgpack', TREE)).tensors['params/sizes/300'].array()
    assert not array.flags.owndata and not array.flags.writeable


def test_joins_chunked_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 40)
    array = np.arange(77, dtype=np.float32).reshape(7, 11)
    path = save(tmp_path / 'w.msgpack', {'params': {'big': array, 'small': array[0, :3]}})
    assert b'__msgpack_chunked_array__' in path.read_bytes()
    tensors = read(path).tensors
    assert [(name, tensor.shape) for name, tensor in tensors.items()] == [
        ('params/big', (7, 11)),
        ('params/small', (3,)),
    ]
    np.testing.assert_array_equal(tensors['params/big'].array(), array)


def test_leaves_aside_what_is_no_tensor(tmp_path):
    tree = {
        'step': 3,
        'name': 'x' * 300,
        'none': None,
        'rate': 0.5,
        'w': np.ones(2),
        'rows': [np.zeros(1), True],
        'numbered': {5: np.zeros(1)},
    }
    contents = read(save(tmp_path / 'w.msgpack', tree))
    assert list(contents.tensors) == ['numbered/5', 'rows/0', 'w']
    assert contents.notes == ("left aside what is no tensor: 'name', 'none', 'rate', 'rows/1' and 1 more",)


def test_walks_every_form_of_msgpack(tmp_path):
    """Each number, text, map and array form, with an array after them that is found only if all were walked right."""
    numbers = [sign * 2**k + d for k in (0, 5, 7, 8, 15, 16, 31, 32, 62) for sign in (1, -1) for d in (-1, 0, 1)]
    values = [*numbers, 2**64 - 1, 0.1, None, True, False, *('x' * n for n in (0, 31, 32, 255, 256, 65535, 65536))]
    values += [b'y' * n for n in (0, 255, 256, 65535, 65536)] + [{'a': [1] * n} for n in (0, 15, 16, 65536)]
    values += [{str(i): i for i in range(n)} for n in (0, 15, 16, 65536)] + [struct.pack('>f', 0.1)]
    packed = msgpack.packb({'values': values, 'single': 0.5}, use_single_float=True)
    end = msgpack.packb('w') + msgpack.packb(array_of(np.arange(3.0)))
    (tmp_path / 'w.msgpack').write_bytes(b'\x83' + packed[1:] + end)
    assert read(tmp_path / 'w.msgpack').tensors['w'].array().tolist() == [0, 1, 2]


def array_of(value, *, shape=None, dtype=None, data=None, code=1) -> msgpack.ExtType:
    """The extension that flax writes, with any of its parts replaced."""
    parts = (
        value.shape if shape is None else shape,
        dtype or value.dtype.name,
        value.tobytes() if data is None else data,
    )
    return msgpack.ExtType(code, msgpack.packb(parts))


def packed(value) -> bytes:
    return msgpack.packb({'params': {'w': value}})


ONES = np.ones(4, np.float32)
CHUNKS = {'__msgpack_chunked_array__': True, 'shape': {'0': 8}, 'chunks': {'0': array_of(ONES), '1': array_of(ONES)}}
DAMAGED = {
    'a huge shape': packed(array_of(ONES, shape=(2**62,))),
    'a shape whose product wraps': packed(array_of(ONES, shape=(2**62, 4))),
    'a huge shape of nothing': packed(array_of(ONES, shape=(2**62, 0), data=b'')),
    'a negative shape': packed(array_of(ONES, shape=(-4,))),
    'two negative sizes': packed(array_of(ONES, shape=(-2, -2))),
    'a truth as a size': packed(array_of(ONES, shape=(4, True))),
    'a fraction as a size': packed(array_of(ONES, shape=(4.0,))),
    'a hundred dimensions': packed(array_of(ONES, shape=(4, *[1] * 99))),
    'too few bytes': packed(array_of(ONES, data=bytes(15))),
    'too many bytes': packed(array_of(ONES, data=bytes(17))),
    'text for bytes': packed(array_of(ONES, data='x' * 16)),
    'a number for a shape': packed(msgpack.ExtType(1, msgpack.packb((4, 'float32', bytes(16))))),
    'a number for a dtype': packed(msgpack.ExtType(1, msgpack.packb(((4,), 4, bytes(16))))),
    'parts missing': packed(msgpack.ExtType(1, msgpack.packb(((4,), 'float32')))),
    'an extension within': packed(msgpack.ExtType(1, msgpack.packb(array_of(ONES)))),
    'an extension without bytes': packed(msgpack.ExtType(1, b'')),
    'an extension that goes on': packed(msgpack.ExtType(1, array_of(ONES).data + b'\x00')),
    'an inner length past its extension': packed(msgpack.ExtType(1, array_of(ONES).data[:-1])) + bytes(99),
    'a complex of one part': packed(msgpack.ExtType(2, msgpack.packb((1.0,)))),
    'a complex of text': packed(msgpack.ExtType(2, msgpack.packb(('1', '2')))),
    'an unknown extension': packed(msgpack.ExtType(4, b'x')),
    'a time stamp': packed(msgpack.Timestamp(4)),
    'chunks of another size': packed(CHUNKS | {'shape': {'0': 7}}),
    'chunks with a hole': packed(CHUNKS | {'chunks': {'0': array_of(ONES), '2': array_of(ONES)}}),
    'chunks of two dtypes': packed(CHUNKS | {'chunks': {'0': array_of(ONES), '1': array_of(ONES.astype('i4'))}}),
    'chunks that are numbers': packed(CHUNKS | {'chunks': {'0': 1}}),
    'chunks without a shape': packed({'__msgpack_chunked_array__': True, 'chunks': {}}),
    'no chunks': packed(CHUNKS | {'shape': {'0': 0}, 'chunks': {}}),
    'chunks of text': packed(CHUNKS | {'shape': 'x', 'chunks': 'x'}),
    'a name twice': b'\x82' + 2 * (b'\xa1w' + msgpack.packb(array_of(ONES))),
    'a path twice': msgpack.packb({'a/b': array_of(ONES), 'a': {'b': array_of(ONES)}}),
    'a list for a name': b'\x81\x90\x00',
    'a name that is not text': b'\x81\xa1\xff\x00',
    'more after its end': packed(array_of(ONES)) + b'\x00',
    'a reserved byte': b'\x81\xa1w\xc1',
    'a map larger than the file': b'\xdf\xff\xff\xff\xff',
    'an array larger than the file': b'\x81\xa1w\xdd\xff\xff\xff\xff',
    'a text larger than the file': b'\x81\xdb\xff\xff\xff\xff',
    'bytes larger than the file': b'\x81\xa1w\xc6\xff\xff\xff\xff',
    'an extension larger than the file': b'\x81\xa1w\xc9\xff\xff\xff\xff\x01',
    'nesting': b'\x81\xa1w' * 100_000,
    'nested arrays': b'\x91' * 100_000,
}


def refused(path) -> str:
    tracemalloc.start()
    with pytest.raises(UserError) as caught:
        for tensor in read(path).tensors.values():
            tensor.array()
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert path.name in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


def test_reads_what_the_damage_below_is_made_of(tmp_path):
    path = tmp_path / 'w.msgpack'
    path.write_bytes(packed(array_of(ONES)))
    assert read(path).tensors['params/w'].array().tolist() == [1, 1, 1, 1]
    path.write_bytes(packed(CHUNKS))
    assert read(path).tensors['params/w'].array().tolist() == [1] * 8


@pytest.mark.parametrize('name', DAMAGED)
def test_refuses(name, tmp_path):
    (tmp_path / 'w.msgpack').write_bytes(DAMAGED[name])
    assert 'a damaged msgpack file' in refused(tmp_path / 'w.msgpack')


@pytest.mark.parametrize('dtype', ['object', 'V4', 'str32', 'float8_unknown', 'datetime64[s]', ',4f'])
def test_names_the_array_whose_dtype_is_unknown(dtype, tmp_path):
    (tmp_path / 'w.msgpack').write_bytes(packed(array_of(ONES, dtype=dtype)))
    assert f"the array 'params/w' has dtype '{dtype}'" in refused(tmp_path / 'w.msgpack')


@pytest.mark.parametrize('content', [b'\x80', b'\x03', packed(3), b'\x90'])
def test_refuses_files_without_arrays(content, tmp_path):
    (tmp_path / 'w.msgpack').write_bytes(content)
    assert 'it holds no arrays' in refused(tmp_path / 'w.msgpack')


def test_bounds_the_number_of_values(tmp_path, monkeypatch):
    monkeypatch.setattr(msgpack_file, 'MAX_TOKENS', 1000)
    (tmp_path / 'w.msgpack').write_bytes(b'\xdd\x00\x01\x00\x00' + b'\x90' * 65536)
    assert 'more than 1,000 values' in refused(tmp_path / 'w.msgpack')


def test_damage_never_surprises(tmp_path):
    path, generator = tmp_path / 'w.msgpack', random.Random(0)
    whole = serialization.msgpack_serialize(
        {'a': {'w': ONES, 'b': ONES.astype('f2')}, 'c': 1j, 'step': 3, 'x': [np.float32(2)]}
    )
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        refused(path)
    for _ in range(200):
        changed = bytearray(whole)
        for _ in range(generator.choice([1, 1, 4, 16])):
            changed[generator.randrange(len(whole))] = generator.randrange(256)
        path.write_bytes(changed)
        try:
            for tensor in read(path).tensors.values():
                tensor.array()
        except UserError as error:
            assert str(error).isprintable()
