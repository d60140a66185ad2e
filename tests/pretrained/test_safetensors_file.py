import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tl_jax.errors import UserError
from tl_jax.pretrained import fill, read, save_variables
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


def test_reads_bfloat16(tmp_path):
    safetensors.numpy.save_file({'w': np.ones(3, ml_dtypes.bfloat16)}, tmp_path / 'w.safetensors')
    tensor = read(tmp_path / 'w.safetensors').tensors['w']
    assert tensor.dtype == tensor.array().dtype == ml_dtypes.bfloat16


def entry(**changes) -> dict:
    return {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]} | changes


@pytest.mark.parametrize(
    'header',
    [
        {'w': entry(data_offsets=[8, 16])},
        {'w': entry(data_offsets=[0, 2**62])},
        {'w': entry(data_offsets=[-8, 0])},
        {'w': entry(shape=[2**40])},
        {'w': entry(shape=[-2])},
        {'w': entry(shape=[2**33, 2**33])},
        {'w': entry(dtype='pickle')},
        {'v': entry(), 'w': entry()},
        {'v': entry(), 'w': entry(data_offsets=[4, 12])},
        {'w': 3},
        [],
    ],
)
def test_refuses_corrupt_headers(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / 'w.safetensors').write_bytes(len(text).to_bytes(8, 'little') + text + bytes(8))
    with pytest.raises(UserError, match=r'w\.safetensors: a damaged safetensors file') as caught:
        read(tmp_path / 'w.safetensors')
    assert '\n' not in str(caught.value)


def test_refuses_truncated_files_and_absurd_headers(tmp_path):
    path = tmp_path / 'w.safetensors'
    save_variables(path, VARIABLES, {})
    whole = path.read_bytes()
    for version in [whole[:cut] for cut in range(len(whole))] + [b'\xff' * 8 + whole[8:]]:
        path.write_bytes(version)
        with pytest.raises(UserError, match='damaged'):
            read(path)
