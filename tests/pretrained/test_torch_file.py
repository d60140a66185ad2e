"""Real files of torch 2.13 (`files/make_files.py`) against the arrays that torch itself saw in them."""

import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from pickle_assembler import call, function, number, pickled, table, tensor, write, write_zip

from tl_jax.pretrained import read

FILES = Path(__file__).parent / 'files'
EXPECTED = np.load(FILES / 'expected.npz')


@pytest.mark.parametrize('name', ['zip.pth', 'zip_protocol4.pt', 'legacy.th'])
def test_reads_as_torch_does(name):
    tensors = read(FILES / name).tensors
    assert list(tensors) == EXPECTED.files
    for key, each in tensors.items():
        array = each.array()
        assert (array.shape, array.dtype) == (each.shape, each.dtype)
        assert each.dtype == (ml_dtypes.bfloat16 if key == 'bfloat16' else EXPECTED[key].dtype)
        np.testing.assert_array_equal(array.astype(EXPECTED[key].dtype), EXPECTED[key], err_msg=key)


def test_arrays_are_views_of_the_file():
    array = read(FILES / 'zip.pth').tensors['transposed'].array()
    assert not array.flags.writeable and not array.flags.owndata and array.strides == (4, 24)


def test_reads_dtypes_without_a_storage_type():
    tensors = read(FILES / 'v3.pth').tensors
    assert tensors['f8'].dtype == ml_dtypes.float8_e4m3fn and tensors['u16'].dtype == np.uint16
    np.testing.assert_array_equal(tensors['f8'].array().astype(np.float32), [0, 1, 2, 3])
    np.testing.assert_array_equal(tensors['u16'].array(), [0, 1, 2])


def test_reads_windows_of_legacy_storages():
    np.testing.assert_array_equal(read(FILES / 'legacy_window.th').tensors['window'].array(), [5, 6])


def test_reads_big_endian_storages(tmp_path):
    path = write_zip(tmp_path / 'model.pth', pickled(table(w=tensor())), {'0': np.arange(4, dtype='>f4').tobytes()})
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('archive/byteorder', b'big')
    np.testing.assert_array_equal(read(path).tensors['w'].array(), [0, 1, 2, 3])


@pytest.mark.parametrize(
    ('saved', 'note'),
    [
        (table(w=tensor()), ()),
        (table(w=tensor(), epoch=number(3)), ("left aside what is no tensor: 'epoch'",)),
        (table(net=table(w=tensor())), ("took its 'net'",)),
        (table(anything=table(w=tensor()), epoch=number(3)), ("took its 'anything', left aside 'epoch'",)),
        (table(ema=table(v=tensor()), model=table(w=tensor())), ("took its 'model', left aside 'ema'",)),
        (table(loss=tensor(), state_dict=table(w=tensor())), ("took its 'state_dict', left aside 'loss'",)),
    ],
)
def test_says_which_state_dict_it_took(saved, note, tmp_path):
    contents = read(write(tmp_path / 'model.pth', pickled(saved), 'zip'))
    assert (list(contents.tensors), contents.notes) == (['w'], note)


def test_leaves_the_metadata_of_modules_aside(tmp_path):
    """An OrderedDict with an attribute, as `module.state_dict()` is, comes as BUILD."""
    empty = call(function('collections', 'OrderedDict'))
    value = empty + table(w=tensor())[1:] + table(_metadata=empty) + b'b'
    assert list(read(write(tmp_path / 'model.pth', pickled(value), 'legacy')).tensors) == ['w']
