"""TensorFlow.js: manifests written here, the real DoodleNet, and hostile manifests."""

import json

import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.pretrained.tfjs_file import read


def write(folder, weights, shards, **fields):
    """A `model.json` of one group of weights, and its shards, `{name: bytes}`."""
    for name, data in shards.items():
        (folder / name).write_bytes(data)
    model = {'format': 'layers-model', 'weightsManifest': [{'paths': list(shards), 'weights': weights}], **fields}
    (folder / 'model.json').write_text(json.dumps(model))
    return folder / 'model.json'


def spec(name='w', shape=(2,), dtype='float32', quantization=None):
    plain = {'name': name, 'shape': list(shape), 'dtype': dtype}
    return plain if quantization is None else {**plain, 'quantization': quantization}


def test_reads_every_dtype_across_shards(tmp_path):
    arrays = {
        'conv/kernel': np.arange(12, dtype='<f4').reshape(2, 6),
        'half': np.array([0.5, -2], '<f2'),
        'steps': np.array([[-7], [2**30]], '<i4'),
        'bytes': np.array([0, 255, 7], 'u1'),
        'mask': np.array([True, False]),
        'scalar': np.array(3.5, '<f4'),
        'none': np.zeros((0, 4), '<f4'),
    }
    data = b''.join(array.tobytes() for array in arrays.values())
    weights = [spec(name, array.shape, array.dtype.name) for name, array in arrays.items()]
    shards = {f'group1-shard{i}of4.bin': piece for i, piece in enumerate((data[:5], data[5:6], b'', data[6:]))}
    tensors = read(write(tmp_path, weights, shards)).tensors
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        each = tensors[name]
        assert (each.shape, each.dtype) == (array.shape, array.dtype) and each.array().dtype == array.dtype
        np.testing.assert_array_equal(each.array(), array)


def test_groups_have_shards_of_their_own(tmp_path):
    groups = []
    for i in range(2):
        (tmp_path / f'g{i}.bin').write_bytes(np.full(2, i, '<f4').tobytes())
        groups.append({'paths': [f'g{i}.bin'], 'weights': [spec(f'w{i}')]})
    (tmp_path / 'model.json').write_text(json.dumps({'format': 'graph-model', 'weightsManifest': groups}))
    contents = read(tmp_path / 'model.json')
    assert [each.array().tolist() for each in contents.tensors.values()] == [[0, 0], [1, 1]]
    assert contents.metadata == {'format': 'graph-model'} and contents.notes == ()


@pytest.mark.parametrize(
    'dtype, quantization, stored, expected',
    [
        ('float32', {'dtype': 'uint8', 'scale': 0.1, 'min': -1.5}, np.array([0, 255], 'u1'), [-1.5, 24.0]),
        ('float32', {'dtype': 'uint16', 'scale': 1e-4, 'min': 2}, np.array([0, 65535], '<u2'), [2, 8.5535]),
        ('int32', {'dtype': 'uint8', 'scale': 0.4, 'min': -3}, np.array([1, 4], 'u1'), [-3, -1]),
        ('float32', {'dtype': 'float16'}, np.array([0.5, -3], '<f2'), [0.5, -3]),
    ],
)
def test_dequantises(dtype, quantization, stored, expected, tmp_path):
    contents = read(write(tmp_path, [spec(dtype=dtype, quantization=quantization)], {'a.bin': stored.tobytes()}))
    weight = contents.tensors['w']
    assert weight.dtype == weight.array().dtype == np.dtype(dtype) and 'dequantised 1' in contents.notes[0]
    np.testing.assert_array_equal(weight.array(), np.array(expected).astype(dtype))


def test_says_the_shape_of_one_image(tmp_path):
    layers = [{'class_name': 'Conv2D', 'config': {'batch_input_shape': [None, 28, 28, 1]}}]
    for config in (layers, {'layers': layers}):
        topology = {'modelTopology': {'model_config': {'config': config}}}
        assert read(write(tmp_path, [], {}, **topology)).metadata['image_shape'] == '(28, 28, 1)'
    assert 'image_shape' not in read(write(tmp_path, [], {}, modelTopology={'node': []})).metadata


BYTES = {'a.bin': bytes(8)}
QUANTISED = {'dtype': 'uint8', 'scale': 1.0, 'min': 0.0}


@pytest.mark.parametrize(
    'weights, shards, message',
    [
        ([spec(), spec('v')], BYTES, "the tensor 'v' ends at byte 16, its shards have 8; fetch 'a.bin'"),
        ([spec(shape=(2**62,))], BYTES, "the tensor 'w' ends at byte 18446744073709551616"),
        ([spec(shape=(1,))], BYTES, 'its tensors take 4 bytes, their shards have 8'),
        ([], BYTES, 'its tensors take 0 bytes'),
        ([spec()], {}, "the tensor 'w' ends at byte 8, its shards have 0"),
        ([spec(), spec()], {'a.bin': bytes(16)}, "two tensors are called 'w'"),
        ([spec(shape=(-2, -1))], BYTES, r"the tensor 'w' has the shape \[-2, -1\]"),
        ([spec(shape=(True, 2))], BYTES, 'has the shape'),
        ([spec(shape=(1.0, 2))], BYTES, 'has the shape'),
        ([{**spec(), 'shape': None}], BYTES, 'has the shape None'),
        ([{**spec(), 'name': 3}], BYTES, 'has no name'),
        ([None], BYTES, 'has no name'),
        ([spec(dtype='string')], BYTES, "the tensor 'w' is of dtype 'string'; known: float32"),
        ([spec(dtype=['float32'])], BYTES, 'is of dtype'),
        ([spec(quantization={**QUANTISED, 'dtype': 'int4'})], BYTES, "'w', float32, is quantised as 'int4'"),
        ([spec(dtype='bool', quantization=QUANTISED)], BYTES, "'w', bool, is quantised"),
        ([spec(quantization={**QUANTISED, 'scale': float('nan')})], BYTES, 'without a finite scale'),
        ([spec(quantization={**QUANTISED, 'min': '0'})], BYTES, 'without a finite scale'),
        ([spec(quantization='uint8')], BYTES, 'is quantised as None'),
    ],
)
def test_refuses_manifests_that_lie(weights, shards, message, tmp_path):
    with pytest.raises(UserError, match=rf'model\.json: .*{message}') as error:
        read(write(tmp_path, weights, shards))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'name', ['../a.bin', '/etc/passwd', 'x/../../a.bin', '..\\a.bin', 'C:a.bin', '', 'a\0b', 7, None]
)
def test_refuses_shards_outside_of_the_folder(name, tmp_path):
    (tmp_path / 'a.bin').write_bytes(bytes(8))
    (tmp_path / 'model').mkdir()
    path = write(tmp_path / 'model', [], {})
    path.write_text(json.dumps({'weightsManifest': [{'paths': [name], 'weights': [spec()]}]}))
    with pytest.raises(UserError, match='outside of the folder'):
        read(path)


def test_names_the_missing_shard(tmp_path):
    path = write(tmp_path, [spec()], BYTES)
    (tmp_path / 'a.bin').unlink()
    with pytest.raises(UserError, match=r"its shard 'a\.bin' is missing; put it into"):
        read(path)
    (tmp_path / 'a.bin').mkdir()
    with pytest.raises(UserError, match='is missing'):
        read(path)


def test_follows_links_as_the_hub_cache_has(tmp_path):
    (tmp_path / 'snapshot').mkdir()
    (tmp_path / 'blob').write_bytes(np.ones(2, '<f4').tobytes())
    path = write(tmp_path / 'snapshot', [spec()], {'a.bin': b''})
    (tmp_path / 'snapshot/a.bin').unlink()
    (tmp_path / 'snapshot/a.bin').symlink_to('../blob')
    assert read(path).tensors['w'].array().tolist() == [1, 1]


def test_a_shard_that_shrinks_after_opening_is_named(tmp_path):
    contents = read(write(tmp_path, [spec()], BYTES))
    (tmp_path / 'a.bin').write_bytes(bytes(3))
    with pytest.raises(UserError, match=r'a\.bin: it has become shorter'):
        contents.tensors['w'].array()


@pytest.mark.parametrize(
    'text, message',
    [
        ('', 'damaged or truncated JSON'),
        ('{"weightsManifest": [', 'damaged or truncated JSON'),
        ('[' * 100_000, 'damaged or truncated JSON'),
        ('\xff', 'damaged or truncated JSON'),
        ('[]', r'not the model\.json'),
        ('{}', 'no weightsManifest'),
        ('{"weightsManifest": {}}', 'no weightsManifest'),
        ('{"weightsManifest": [3]}', 'no list of weights'),
        ('{"weightsManifest": [{"weights": []}]}', 'no list of paths'),
    ],
)
def test_refuses_other_json(text, message, tmp_path):
    (tmp_path / 'model.json').write_bytes(text.encode('latin-1'))
    with pytest.raises(UserError, match=rf'model\.json: .*{message}'):
        read(tmp_path / 'model.json')


@pytest.mark.shared
def test_doodlenet(shared):
    """Its shard read as one row of float32, and cut by the shapes of the network."""
    path = shared('weights/doodlenet_tfjs/model.json')
    row = np.fromfile(path.parent / 'group1-shard1of1.bin', '<f4')
    shapes = []
    for count, width, depth in ((0, 1, 16), (1, 16, 16), (2, 16, 32), (3, 32, 32), (4, 32, 64), (5, 64, 64)):
        name = f'conv2d_{count}' if count else 'conv2d'
        shapes += [(f'{name}/kernel', (3, 3, width, depth)), (f'{name}/bias', (depth,))]
    for name, width, depth in (('dense', 576, 512), ('dense_1', 512, 345)):
        shapes += [(f'{name}/kernel', (width, depth)), (f'{name}/bias', (depth,))]
    contents = read(path)
    assert [(name, each.shape) for name, each in contents.tensors.items()] == shapes
    assert contents.metadata['image_shape'] == '(28, 28, 1)' and contents.metadata['format'] == 'layers-model'
    at = 0
    for name, shape in shapes:
        size = np.prod(shape)
        np.testing.assert_array_equal(contents.tensors[name].array(), row[at : at + size].reshape(shape))
        at += size
    assert at == len(row)
