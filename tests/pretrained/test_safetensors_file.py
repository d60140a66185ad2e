import json
import random
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tl_jax.errors import UserError
from tl_jax.pretrained import fill, read, safetensors_file, save_variables
from tl_jax.trees import flatten

VARIABLES = {
    'params': {'backbone': {'conv': {'kernel': jnp.arange(6.0).reshape(2, 3)}}, 'head': {'bias': jnp.ones(2)}},
    'batch_stats': {'backbone': {'norm': {'mean': jnp.zeros(3)}}},
}


def test_round_trip(tmp_path):
    path = tmp_path / 'w.safetensors'
    save_variables(path, VARIABLES, {'model': 'tiny', 'num_classes': 2})
    contents = read(path)
    assert contents.metadata == {'format': 'tl_jax', 'model': 'tiny', 'num_classes': '2'}
    blank = {'params': {'backbone': {'conv': {'kernel': jnp.zeros((2, 3))}}, 'head': {'bias': jnp.zeros(2)}}}
    blank['batch_stats'] = {'backbone': {'norm': {'mean': jnp.ones(3)}}}
    filled, account = fill(blank, contents)
    for name, leaf in flatten(VARIABLES).items():
        np.testing.assert_array_equal(flatten(filled)[name], leaf)
    assert account.origin == 'tl_jax' and not account.ignored and not account.fresh
    assert [file.name for file in tmp_path.iterdir()] == ['w.safetensors']


def test_a_transposed_leaf_is_saved_in_its_own_order(tmp_path):
    save_variables(tmp_path / 'w.safetensors', {'params': {'head': {'kernel': np.arange(6.0).reshape(2, 3).T}}}, {})
    saved = read(tmp_path / 'w.safetensors').tensors['params/head/kernel'].array()
    np.testing.assert_array_equal(saved, np.arange(6.0).reshape(2, 3).T)


def test_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(arrays, path, metadata):
        path.write_bytes(b'half')
        raise OSError('no space left')

    monkeypatch.setattr(safetensors.numpy, 'save_file', fail)
    with pytest.raises(OSError):
        save_variables(tmp_path / 'w.safetensors', VARIABLES, {})
    assert not list(tmp_path.iterdir())


def test_refuses_another_suffix(tmp_path):
    with pytest.raises(UserError, match='suffix'):
        save_variables(tmp_path / 'w.npz', VARIABLES, {})


DTYPES = [*map(np.dtype, '?bBhHiIlLefdF'), ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def test_reads_every_dtype_as_the_library_does(tmp_path):
    rng = np.random.default_rng(0)
    saved = {f'{np.dtype(t).name}.{n}': rng.normal(size=(3, n)).astype(t) for t in DTYPES for n in (0, 1, 5)}
    saved['scalar'] = np.float32(2)[...]
    safetensors.numpy.save_file(saved, tmp_path / 'w.safetensors', metadata={'format': 'np'})
    contents = read(tmp_path / 'w.safetensors')
    assert contents.metadata == {'format': 'np'} and set(contents.tensors) == set(saved)
    for name, tensor in contents.tensors.items():
        array = tensor.array()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype) == (saved[name].shape, saved[name].dtype)
        assert array.tobytes() == saved[name].tobytes(), name


def test_arrays_are_views_of_the_file(tmp_path):
    safetensors.numpy.save_file({'w': np.zeros((2, 3), np.float32)}, tmp_path / 'w.safetensors')
    array = read(tmp_path / 'w.safetensors').tensors['w'].array()
    assert not array.flags.owndata and not array.flags.writeable


def test_a_load_does_not_hold_the_file_twice(tmp_path):
    """The pages of an array are handed back once nothing looks at it."""
    saved = {f'w{i}': np.full((1 << 20, 2), i, np.float32) for i in range(8)}
    safetensors.numpy.save_file(saved, tmp_path / 'w.safetensors')
    tensors, before, most, copies = read(tmp_path / 'w.safetensors').tensors, mapped_kilobytes(), 0, []
    for tensor in tensors.values():
        copies.append(tensor.array().T.copy())
        most = max(most, mapped_kilobytes() - before)
    assert most < 1.5 * 8192, 'of 8 × 8192'
    assert [copy.min() for copy in copies] == [copy.max() for copy in copies] == list(range(8))
    held = tensors['w7'].array().T
    assert held.sum() == 14 * 2**20 and mapped_kilobytes() - before > 8000, 'the measure sees pages that are held'


def mapped_kilobytes() -> int:
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith('RssFile'))


def entry(**changes) -> dict:
    return {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]} | changes


DAMAGED = {
    'a gap at the start': ({'w': entry(data_offsets=[8, 16])}, "'w' leaves a gap"),
    'a gap at the end': ({'w': entry(shape=[1], data_offsets=[0, 4])}, 'end at byte 4 of 8'),
    'no tensors but bytes': ({}, 'end at byte 0 of 8'),
    'a range past the file': ({'w': entry(data_offsets=[0, 2**62])}, "'w' of 8 bytes has the range"),
    'a tensor past the file': ({'w': entry(shape=[4], data_offsets=[0, 16])}, 'end at byte 16 of 8'),
    'a range before the file': ({'w': entry(data_offsets=[-8, 0])}, "'w' of 8 bytes has the range"),
    'a range backwards': ({'w': entry(shape=[0], data_offsets=[8, 0])}, "'w' of 0 bytes has the range"),
    'a huge shape': ({'w': entry(shape=[2**40])}, "'w' of 4398046511104 bytes"),
    'a shape whose product wraps to the range': ({'w': entry(shape=[2**62, 2])}, "'w' has a shape larger than"),
    'a huge shape of nothing': ({'w': entry(shape=[0, 2**62], data_offsets=[0, 0])}, "'w' has a shape larger than"),
    'a negative shape': ({'w': entry(shape=[-2])}, "'w' has an impossible shape"),
    'two negative sizes': ({'w': entry(shape=[-2, -1])}, "'w' has an impossible shape"),
    'a fraction as a shape': ({'w': entry(shape=[2.0])}, "'w' has an impossible shape"),
    'a truth as a shape': ({'w': entry(shape=[True, 2])}, "'w' has an impossible shape"),
    'a hundred dimensions': ({'w': entry(shape=[1] * 98 + [2])}, "'w' has an impossible shape"),
    'one range twice': ({'v': entry(), 'w': entry()}, "'w' overlaps"),
    'overlapping ranges': ({'v': entry(), 'w': entry(data_offsets=[4, 12])}, "'w' overlaps"),
    'one range within another': ({'v': entry(), 'w': entry(shape=[1], data_offsets=[4, 8])}, "'w' overlaps"),
    'a number for a tensor': ({'w': 3}, "'w' has no dtype"),
    'no offsets': ({'w': {'dtype': 'F32', 'shape': [2]}}, "'w' has no dtype"),
    'three offsets': ({'w': entry(data_offsets=[0, 4, 8])}, "'w' has no dtype"),
    'text as offsets': ({'w': entry(data_offsets='08')}, "'w' has no dtype"),
    'fractions as offsets': ({'w': entry(data_offsets=[0.0, 8.0])}, "'w' has no dtype"),
    'metadata that are no table': ({'__metadata__': [], 'w': entry()}, 'metadata'),
    'metadata that are not text': ({'__metadata__': {'a': 1}, 'w': entry()}, 'metadata'),
    'no table': ([], 'no table'),
    'an escape in a name': ({'w\x1b[2J\n': 3}, r"'w\\x1b[2J\\n' has no dtype"),
}


def write(path, header: bytes, data: bytes = bytes(8)):
    path.write_bytes(len(header).to_bytes(8, 'little') + header + data)
    return path


def refused(path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert path.name in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


def test_reads_what_the_headers_below_are_made_of(tmp_path):
    path = write(tmp_path / 'w.safetensors', json.dumps({'w': entry()}).encode())
    assert read(path).tensors['w'].array().tolist() == [0, 0]


@pytest.mark.parametrize('name', DAMAGED)
def test_refuses_corrupt_headers(name, tmp_path):
    header, why = DAMAGED[name]
    path = write(tmp_path / 'w.safetensors', json.dumps(header).encode())
    message = refused(path)
    assert 'a damaged safetensors file' in message and why.replace('\\\\', '\\') in message
    with pytest.raises((safetensors.SafetensorError, OverflowError)):  # The library agrees, but for …
        if 'dimensions' in name:  # … what numpy cannot hold
            raise OverflowError
        safetensors.numpy.load_file(path)


@pytest.mark.parametrize(
    ('header', 'why'),
    [
        (b'{"w":1,"w":2}', "'w' is there twice"),
        (b'{"w":{"dtype":"F32","dtype":"F16"}}', "'dtype' is there twice"),
        (b'[' * 200_000, 'nested too deeply'),
        (b'\xff\xfe{}', 'not UTF-8'),
        ('{}'.encode('utf-16'), 'not UTF-8'),
        (b'{"w":' + b'9' * 5000 + b'}', 'damaged'),
        (b'{} {}', 'Extra data'),
        (b'', 'damaged'),
    ],
)
def test_refuses_what_is_no_plain_json(header, why, tmp_path):
    assert why in refused(write(tmp_path / 'w.safetensors', header))


@pytest.mark.parametrize('dtype', ['pickle', 'f32', 'F4', '|O'])
def test_names_the_tensor_whose_dtype_is_unknown(dtype, tmp_path):
    path = write(tmp_path / 'w.safetensors', json.dumps({'layer.w': entry(dtype=dtype)}).encode())
    assert f"the tensor 'layer.w' has dtype '{dtype}'" in refused(path)


def test_an_absurd_header_takes_no_memory(tmp_path, monkeypatch):
    path = tmp_path / 'w.safetensors'
    tracemalloc.start()
    for size in (2**63, 2**40, 17):
        path.write_bytes(size.to_bytes(8, 'little') + bytes(16))
        assert f'its header of {size} bytes does not fit' in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    monkeypatch.setattr(safetensors_file, 'MAX_HEADER', 1)
    assert 'its header of 2 bytes' in refused(write(path, b'{}', b''))


def test_damage_never_surprises(tmp_path):
    """Truncated anywhere it is refused; with bytes changed too, or its tensors read, whatever the values."""
    path, generator = tmp_path / 'w.safetensors', random.Random(0)
    save_variables(path, VARIABLES, {'a': 'b'})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert ('empty' if cut == 0 else 'damaged') in refused(path)
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
