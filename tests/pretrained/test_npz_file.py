import io
import zipfile

import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.pretrained import read


class Touches:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


def test_reads_plain_and_compressed(tmp_path):
    arrays = {'a/kernel': np.arange(6.0).reshape(2, 3), 'b': np.asfortranarray(np.ones((2, 2), np.float16))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / 'w.npz', **arrays)
        tensors = read(tmp_path / 'w.npz').tensors
        assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
            name: (a.shape, a.dtype) for name, a in arrays.items()
        }
        for name, array in arrays.items():
            np.testing.assert_array_equal(tensors[name].array(), array)


@pytest.mark.parametrize('zero', [3, [3, 5]])
def test_dequantises(zero, tmp_path):
    q, scale = np.arange(8, dtype=np.uint8).reshape(2, 1, 1, 4), np.full(np.size(zero), 0.5, np.float32)
    layer = {'0_conv/q': q, '0_conv/scale': scale, '0_conv/zero': np.atleast_1d(zero), '0_conv/bias': np.ones(2, 'f4')}
    np.savez(tmp_path / 'w.npz', **layer)
    contents = read(tmp_path / 'w.npz')
    assert sorted(contents.tensors) == ['0_conv/bias', '0_conv/weight'] and 'dequantised 1' in contents.notes[0]
    weight = contents.tensors['0_conv/weight']
    expected = (q.astype(np.float32) - np.reshape(zero, (-1, 1, 1, 1))) * 0.5
    np.testing.assert_array_equal(weight.array(), expected.astype(np.float32))
    assert weight.dtype == weight.array().dtype == np.float32 and weight.shape == q.shape


def test_refuses_objects(tmp_path):
    canary = tmp_path / 'canary'
    np.savez(tmp_path / 'w.npz', w=np.array([Touches(canary)], dtype=object))
    np.load(tmp_path / 'w.npz', allow_pickle=True)['w']  # The control: the exploit is real.
    assert canary.exists()
    canary.unlink()
    with pytest.raises(UserError, match=r"w\.npz: the array 'w\.npy' holds Python objects"):
        read(tmp_path / 'w.npz')
    assert not canary.exists()


def npy(header: str) -> bytes:
    stream = io.BytesIO()
    stream.write(b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header.encode())
    return stream.getvalue()


@pytest.mark.parametrize(
    'header',
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': __import__('os').getcwd()}",
        '{' * 5000,
        '(' * 60000,
        '',
    ],
)
def test_refuses_other_headers(header, tmp_path):
    with zipfile.ZipFile(tmp_path / 'w.npz', 'w') as archive:
        archive.writestr('w.npy', npy(header) + bytes(8))
    with pytest.raises(UserError, match=r'w\.npz'):
        read(tmp_path / 'w.npz')


def test_damage_never_surprises(tmp_path):
    np.savez_compressed(tmp_path / 'good.npz', a=np.random.default_rng(0).normal(size=(9, 9)), b=np.zeros(1000))
    whole, path = (tmp_path / 'good.npz').read_bytes(), tmp_path / 'w.npz'
    generator = np.random.default_rng(0)
    versions = [whole[:cut] for cut in range(0, len(whole), 7)]
    for _ in range(300):
        changed = bytearray(whole)
        changed[generator.integers(len(whole))] = generator.integers(256)
        versions.append(bytes(changed))
    for version in versions:
        path.write_bytes(version)
        try:
            for each in read(path).tensors.values():
                each.array()
        except UserError as error:
            assert 'w.npz' in str(error) and '\n' not in str(error)
