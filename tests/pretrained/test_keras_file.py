"""Keras: files that Keras 3 wrote, files that h5py writes here as Keras does, real ones, and hostile ones."""

import io
import json
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.pretrained.keras_file import read

FILES = Path(__file__).parent / 'files'
# What make_keras_files.py printed: Keras' own path of each weight, and its shape.
KERAS3 = {
    'stem/kernel': (3, 3, 3, 2),
    'stem/bias': (2,),
    'depth/kernel': (3, 3, 2, 1),
    'norm/beta': (2,),
    'norm/moving_mean': (2,),
    'norm/moving_variance': (2,),
    'inner/b/kernel': (1, 1, 2, 2),
    'inner/b/bias': (2,),
    'inner/a/kernel': (1, 1, 2, 2),
    'inner/a/bias': (2,),
    'rnn/lstm_cell/kernel': (2, 4),
    'rnn/lstm_cell/recurrent_kernel': (1, 4),
    'rnn/lstm_cell/bias': (4,),
    'head/kernel': (1, 2),
    'head/bias': (2,),
}


@pytest.mark.parametrize('suffix, cell', [('keras', 'cell'), ('h5', 'lstm_cell')])
def test_reads_what_keras_3_wrote(suffix, cell):
    contents = read(FILES / f'keras3.{suffix}')
    assert list(contents.tensors) == [path.replace('lstm_cell', cell) for path in KERAS3]
    for each, (path, shape) in zip(contents.tensors.values(), KERAS3.items(), strict=True):
        expected = np.arange(np.prod(shape)).reshape(shape) + zlib.crc32(path.encode()) % 97
        np.testing.assert_array_equal(each.array(), expected, err_msg=path)
        assert (each.shape, each.dtype) == (shape, np.float32)
    assert contents.metadata == {'image_shape': '(8, 8, 3)'}


# Keras' .h5, written as Keras writes it.


def write_layers(group, layers, weights, bytes_of=np.bytes_):
    """`{layer: {weight name: array}}` below a group, with its attributes; weights are laid by `weights(group, name, a)`."""
    group.attrs['layer_names'] = [bytes_of(layer) for layer in layers]
    for layer, arrays in layers.items():
        below = group.create_group(layer)
        below.attrs['weight_names'] = [bytes_of(name) for name in arrays]
        for name, array in arrays.items():
            weights(below, name, array)


def plainly(group, name, array):
    group.create_dataset(name, data=array)


def write_h5(path, layers, weights=plainly, nest='model_weights', **attributes):
    with h5py.File(path, 'w') as file:
        write_layers(file.create_group(nest) if nest else file, layers, weights)
        file.attrs.update(attributes)
    return path


KERNEL, BIAS = np.arange(24, dtype='f4').reshape(2, 2, 3, 2), np.array([1, 2], 'f4')
LAYERS = {
    'z': {'z/kernel:0': KERNEL, 'z/bias:0': BIAS},
    'flatten': {},
    'a': {'a/kernel:0': KERNEL + 1},
}


@pytest.mark.parametrize('nest', ['', 'model_weights'])
def test_reads_layers_in_the_model_order(nest, tmp_path):
    contents = read(write_h5(tmp_path / 'w.h5', LAYERS, nest=nest))
    assert list(contents.tensors) == ['z/kernel', 'z/bias', 'a/kernel'] and contents.metadata == {}
    for name, expected in (('z/kernel', KERNEL), ('z/bias', BIAS), ('a/kernel', KERNEL + 1)):
        np.testing.assert_array_equal(contents.tensors[name].array(), expected)


def test_names_by_layer_whatever_the_scope(tmp_path):
    layers = {
        'fc': {'kernel': BIAS, 'model/fc/bias:0': BIAS},
        'block1_conv1': {'block1_conv1_W_1:0': BIAS},
        'resnet': {'conv1/kernel:0': BIAS, 'conv2/kernel:0': BIAS},
    }
    names = ['fc/kernel', 'fc/bias', 'block1_conv1/block1_conv1_W_1', 'resnet/conv1/kernel', 'resnet/conv2/kernel']
    assert list(read(write_h5(tmp_path / 'w.h5', layers)).tensors) == names


def test_reads_split_attributes_and_text_of_either_kind(tmp_path):
    with h5py.File(tmp_path / 'w.h5', 'w') as file:
        write_layers(file, LAYERS, plainly, bytes_of=str)
        names = list(file.attrs.pop('layer_names'))
        file.attrs['layer_names0'], file.attrs['layer_names1'] = names[:1], names[1:]
    assert list(read(tmp_path / 'w.h5').tensors) == ['z/kernel', 'z/bias', 'a/kernel']


@pytest.mark.parametrize('config', [lambda layers: layers, lambda layers: {'layers': layers}])
def test_the_config_is_data(config, tmp_path):
    """A Lambda layer's code, which Keras runs when it makes the model, stays text; a broken config is told."""
    layers = [
        {'class_name': 'InputLayer', 'config': {'batch_input_shape': [None, 32, 16, 3]}},
        {'class_name': 'Lambda', 'config': {'function': ['4wEAAAAAAAAA', None, None], 'module': 'os'}},
    ]
    path = write_h5(tmp_path / 'w.h5', LAYERS, model_config=json.dumps({'class_name': 'M', 'config': config(layers)}))
    assert read(path).metadata == {'image_shape': '(32, 16, 3)'}
    with pytest.raises(UserError, match='damaged or truncated Keras file'):
        read(write_h5(path, LAYERS, model_config='{"class'))


@pytest.mark.parametrize('dtype', ['f2', 'f4', 'f8', '>f4', 'i8', 'u1', 'i4', '?'])
@pytest.mark.parametrize(
    'settings', [{}, {'compression': 'gzip', 'shuffle': True, 'fletcher32': True, 'chunks': (2, 1)}]
)
def test_reads_dtypes_and_compression(dtype, settings, tmp_path):
    value = np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype)
    path = write_h5(tmp_path / 'w.h5', {'a': {'w': value}}, lambda g, n, a: g.create_dataset(n, data=a, **settings))
    (each,) = read(path).tensors.values()
    assert (each.dtype, each.shape, each.array().dtype) == (value.dtype, (3, 2), value.dtype)
    np.testing.assert_array_equal(each.array(), value)


def test_reads_scalars_and_empty_arrays(tmp_path):
    tensors = read(write_h5(tmp_path / 'w.h5', {'a': {'n': np.float32(3), 'e': np.zeros((0, 4), 'f4')}})).tensors
    assert tensors['a/n'].array() == 3 and tensors['a/n'].shape == ()
    assert tensors['a/e'].array().shape == tensors['a/e'].shape == (0, 4)


def test_values_are_views_of_the_file(tmp_path):
    path = write_h5(tmp_path / 'w.h5', {'a': {'w': np.ones(1 << 22, 'f4')}})
    tracemalloc.start()
    values = read(path).tensors['a/w'].array()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert values.sum() == 1 << 22


# Hostile .h5.


def external_link(group, name, array):
    with h5py.File(Path(group.file.filename).with_name('other.h5'), 'w') as other:
        other['w'] = array
    group[name] = h5py.ExternalLink('other.h5', 'w')


def soft_link(group, name, array):
    group.file['elsewhere'] = array
    group[name] = h5py.SoftLink('/elsewhere')


def external_storage(group, name, array):
    other = Path(group.file.filename).with_name('other.bin')
    other.write_bytes(array.tobytes())
    group.create_dataset(name, array.shape, array.dtype, external=[(str(other), 0, array.nbytes)])


def virtual(group, name, array):
    with h5py.File(Path(group.file.filename).with_name('other.h5'), 'w') as other:
        other['w'] = array
    layout = h5py.VirtualLayout(array.shape, array.dtype)
    layout[...] = h5py.VirtualSource('other.h5', 'w', array.shape)
    group.create_virtual_dataset(name, layout)


def of_dtype(dtype, value):
    def write(group, name, array):
        dataset = group.create_dataset(name, (1,), dtype)
        if value is not None:
            dataset[0] = value

    return write


def laid(**settings):
    """A dataset of some shape and storage to which nothing is written."""
    return lambda group, name, array: group.create_dataset(name, dtype='f4', **settings)


def gzip_bomb(group, name, array):
    """One chunk of a gigabyte is stored, in a few bytes that are no gzip."""
    dataset = group.create_dataset(name, (1 << 28,), 'f4', chunks=(1 << 28,), compression='gzip')
    dataset.id.write_direct_chunk((0,), zlib.compress(bytes(1000)))


def large_chunk(group, name, array):
    """One number in a chunk of a gigabyte, all of which HDF5 would unpack."""
    dataset = group.create_dataset(name, (1,), 'f4', maxshape=(None,), chunks=(1 << 28,), compression='gzip')
    dataset.id.write_direct_chunk((0,), zlib.compress(bytes(1000)))


HOSTILE = {
    'external link': (external_link, "'w' is a link to another place or file"),
    'soft link': (soft_link, "'w' is a link to another place or file"),
    'external storage': (external_storage, "'a/w' lies in another file"),
    'virtual': (virtual, "'a/w' lies in another file"),
    'compound': (of_dtype([('x', 'f4')], (1.0,)), "'a/w' is of dtype"),
    'vlen numbers': (of_dtype(h5py.vlen_dtype('f4'), np.ones(2, 'f4')), "'a/w' is of dtype object"),
    'vlen text': (of_dtype(h5py.string_dtype(), 'x'), "'a/w' is of dtype object"),
    'references': (of_dtype(h5py.ref_dtype, None), "'a/w' is of dtype object"),
    'text': (of_dtype('S4', b'x'), r"'a/w' is of dtype \|S4"),
    'opaque': (of_dtype('V2', b'xx'), r"'a/w' is of dtype \|V2"),
    'complex': (of_dtype('c8', 1j), "'a/w' is of dtype"),
    'long double': (of_dtype('g', 1), "'a/w' is of dtype"),
    'null': (lambda group, name, array: group.create_dataset(name, data=h5py.Empty('f4')), "'a/w' has no values"),
    'a group': (lambda group, name, array: group.create_group(name), "'a/w' is a group"),
    'nothing': (lambda group, name, array: None, "names 'w', which it does not hold"),
    'never written': (laid(shape=(3,)), "'a/w' claims 12 bytes, and the file has 0"),
    'all fill value': (laid(shape=(1 << 40,), chunks=(1 << 10,), compression='gzip'), "'a/w' claims 4398046511104"),
    'gzip bomb': (gzip_bomb, "'a/w' claims 1073741824 bytes"),
    'large chunk': (large_chunk, "'a/w' claims 1073741824 bytes"),
    'lzf': (lambda group, name, array: group.create_dataset(name, data=array, compression='lzf'), 'HDF5 filters'),
    'scaleoffset': (lambda group, name, array: group.create_dataset(name, data=array, scaleoffset=2), 'HDF5 filters'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_refuses(case, tmp_path):
    weights, message = HOSTILE[case]
    with pytest.raises(UserError, match=rf'w\.h5: .*{message}') as error:
        read(write_h5(tmp_path / 'w.h5', {'a': {'w': np.ones(3, 'f4')}}, weights))
    assert '\n' not in str(error.value)


def test_refuses_a_layer_that_is_a_link_and_absolute_names(tmp_path):
    with h5py.File(write_h5(tmp_path / 'w.h5', {'a': {'w': BIAS}}, nest=''), 'a') as file:
        file.move('a', 'b')
        file['a'] = h5py.SoftLink('/b')
    with pytest.raises(UserError, match="'a' is a link"):
        read(tmp_path / 'w.h5')
    for name in ('/a/w', 'b//w', '../a/w', '.'):
        write_h5(tmp_path / 'w.h5', {'a': {}}, nest='')
        with h5py.File(tmp_path / 'w.h5', 'a') as file:
            file['a'].attrs['weight_names'] = [np.bytes_(name)]
        with pytest.raises(UserError, match='which it does not hold'):
            read(tmp_path / 'w.h5')


def test_refuses_two_tensors_of_one_name(tmp_path):
    with pytest.raises(UserError, match="two tensors are called 'a/w'"):
        read(write_h5(tmp_path / 'w.h5', {'a': {'a/w:0': BIAS, 'w': BIAS}}))


@pytest.mark.parametrize('value', [np.ones(3), np.array([(1,)], [('x', 'i4')]), h5py.Empty('f4')])
def test_refuses_names_that_are_no_text(value, tmp_path):
    with h5py.File(write_h5(tmp_path / 'w.h5', LAYERS), 'a') as file:
        file['model_weights'].attrs['layer_names'] = value
    if isinstance(value, h5py.Empty):
        assert not read(tmp_path / 'w.h5').tensors
        return
    with pytest.raises(UserError, match="attribute 'layer_names' is no text"):
        read(tmp_path / 'w.h5')


def test_refuses_other_hdf5(tmp_path):
    with h5py.File(tmp_path / 'w.h5', 'w') as file:
        file['x'] = BIAS
    with pytest.raises(UserError, match='without layer_names it holds no Keras weights'):
        read(tmp_path / 'w.h5')
    write_h5(tmp_path / 'w.h5', LAYERS)
    with h5py.File(tmp_path / 'w.h5', 'a') as file:
        del file['model_weights/a'].attrs['weight_names']
    with pytest.raises(UserError, match='has no weight_names'):
        read(tmp_path / 'w.h5')


@pytest.mark.parametrize('data', [b'', b'\x89HDF', b'\x80\x02}', b'x' * 600])
def test_refuses_other_files(data, tmp_path):
    (tmp_path / 'w.h5').write_bytes(data)
    with pytest.raises(UserError, match=r'w\.h5: no HDF5 or \.keras file'):
        read(tmp_path / 'w.h5')


# .keras archives.


def conv(name, **config):
    return {'class_name': 'Conv2D', 'config': {'name': name, **config}}


def write_keras(path, groups, layers, entries=(), **settings):
    """`{group: {key: array}}` and the config's layers as Keras 3 writes them."""
    weights = io.BytesIO()
    with h5py.File(weights, 'w') as file:
        for group, arrays in groups.items():
            for key, array in arrays.items():
                file[f'{group}/vars/{key}'] = array
    with zipfile.ZipFile(path, 'w', **settings) as archive:
        archive.writestr('config.json', json.dumps({'class_name': 'Functional', 'config': {'layers': layers}}))
        archive.writestr('model.weights.h5', weights.getvalue())
        for name, data in entries:
            archive.writestr(name, data)
    return path


def test_groups_are_counted_by_class_and_ordered_by_config(tmp_path):
    layers = [conv('last_by_name'), conv('b', use_bias=False), {'class_name': 'Custom>Own', 'config': {'name': 'own'}}]
    groups = {
        'layers/conv2d_1': {'0': KERNEL + 1},
        'layers/custom_own': {'0': BIAS, '1': BIAS, '10': BIAS, '2': BIAS},
        'layers/conv2d': {'0': KERNEL, '1': BIAS},
        'layers/drop/seed_generator': {'0': np.zeros(2, 'u4')},
        'optimizer': {'0': BIAS},
    }
    layers[2]['class_name'] = 'CustomOwn'
    contents = read(write_keras(tmp_path / 'm.keras', groups, layers))
    names = ['last_by_name/kernel', 'last_by_name/bias', 'b/kernel', 'own/0', 'own/1', 'own/2', 'own/10']
    assert list(contents.tensors) == names
    np.testing.assert_array_equal(contents.tensors['b/kernel'].array(), KERNEL + 1)
    assert [note.split(':')[0] for note in contents.notes] == [
        'left aside the state of its optimizer',
        'left aside the seeds of random layers',
    ]


def test_weights_without_a_config_are_named_by_class(tmp_path):
    with h5py.File(tmp_path / 'm.weights.h5', 'w') as file:
        for i in (10, 2, 1):
            file[f'layers/conv2d_{i}/vars/0'] = KERNEL
    contents = read(tmp_path / 'm.weights.h5')
    assert list(contents.tensors) == [f'conv2d_{i}/kernel' for i in (1, 2, 10)]
    assert 'no certain order' in contents.notes[0]


def test_reads_bfloat16(tmp_path):
    value = np.array([[0.5, -3]], ml_dtypes.bfloat16)
    write_keras(tmp_path / 'm.keras', {}, [conv('c')])
    weights = io.BytesIO()
    with h5py.File(weights, 'w') as file:
        file['layers/conv2d/vars/0'] = value.view('V2')
        file['layers/conv2d/vars/0'].attrs['dtype'] = 'bfloat16'
    with zipfile.ZipFile(tmp_path / 'm.keras', 'w') as archive:
        archive.writestr('config.json', json.dumps({'config': {'layers': [conv('c')]}}))
        archive.writestr('model.weights.h5', weights.getvalue())
    (each,) = read(tmp_path / 'm.keras').tensors.values()
    assert each.dtype == each.array().dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(each.array(), value)


GROUPS = {'layers/conv2d': {'0': KERNEL, '1': BIAS}}


@pytest.mark.parametrize(
    'entries, settings, message',
    [
        ([('../x', b'')], {}, r"its entry '\.\./x' leaves the archive"),
        ([('/x', b'')], {}, 'leaves the archive'),
        ([('a\\..\\..\\x', b'')], {}, 'leaves the archive'),
        ([('model.weights.h5', b'')], {}, 'two entries of one name'),
        ([], {'compression': zipfile.ZIP_DEFLATED}, "'config.json' is compressed"),
    ],
)
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_refuses_archives_that_keras_never_writes(entries, settings, message, tmp_path):
    with pytest.raises(UserError, match=rf'm\.keras: .*{message}'):
        read(write_keras(tmp_path / 'm.keras', GROUPS, [conv('c')], entries, **settings))


def test_refuses_a_zip_bomb(tmp_path):
    with zipfile.ZipFile(tmp_path / 'm.keras', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('config.json', b'{}', zipfile.ZIP_STORED)
        archive.writestr('model.weights.h5', bytes(1 << 26))
    tracemalloc.start()
    with pytest.raises(UserError, match="'model.weights.h5' is compressed"):
        read(tmp_path / 'm.keras')
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize('missing', ['config.json', 'model.weights.h5'])
def test_refuses_other_archives(missing, tmp_path):
    with zipfile.ZipFile(tmp_path / 'm.keras', 'w') as archive:
        for name in {'config.json', 'model.weights.h5'} - {missing}:
            archive.writestr(name, '{}')
    with pytest.raises(UserError, match=f'without {missing}, so no .keras file'):
        read(tmp_path / 'm.keras')


def with_weights(path, change):
    """A .keras archive whose HDF5 part is changed by `change(file)`."""
    weights = io.BytesIO()
    with h5py.File(weights, 'w') as file:
        file['layers/conv2d/vars/0'] = KERNEL
        change(file)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('config.json', json.dumps({'config': {'layers': [conv('c')]}}))
        archive.writestr('model.weights.h5', weights.getvalue())
    return path


def cycle(file):
    file['layers/conv2d/again'] = file['layers']


def twice(file):
    file['layers/conv2d/more'] = file['layers/dense'] = file.create_group('layers/shared')


def deep(file):
    file.create_group('layers/' + 'x/' * 40)


def renamed(file):
    file['layers/conv2d/vars'].attrs['name'] = 'other'


def linked(file):
    file['layers/conv2d/more'] = h5py.ExternalLink('/etc/x.h5', '/')


def stray(file):
    file['layers/conv2d/kernel'] = KERNEL


@pytest.mark.parametrize(
    'change, message',
    [
        (cycle, 'linked twice'),
        (twice, 'linked twice'),
        (deep, 'too deep'),
        (renamed, r"its weights call 'layers/conv2d' 'other', its config\.json 'c'"),
        (linked, "'more' is a link"),
        (stray, 'layers/conv2d/kernel is a dataset outside of vars'),
    ],
)
def test_refuses_groups_that_keras_never_writes(change, message, tmp_path):
    assert list(read(with_weights(tmp_path / 'm.keras', lambda file: None)).tensors) == ['c/kernel']
    with pytest.raises(UserError, match=rf'm\.keras: .*{message}'):
        read(with_weights(tmp_path / 'm.keras', change))


@pytest.mark.parametrize('suffix', ['keras', 'h5'])
def test_truncated_files_are_refused(suffix, tmp_path):
    whole, path = (FILES / f'keras3.{suffix}').read_bytes(), tmp_path / f'm.{suffix}'
    for cut in [*range(0, len(whole), len(whole) // 60), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=rf'm\.{suffix}: ') as error:
            for each in read(path).tensors.values():
                each.array()
        assert '\n' not in str(error.value)


@pytest.mark.shared
@pytest.mark.parametrize('name, count, size', [('pretrainedResnet.h5', 48, 32), ('vww_96.h5', 164, 96)])
def test_real_files(name, count, size, shared):
    """Each tensor against h5py's own reading of `LAYER/LAYER/WEIGHT:0`, in the order of the config's layers."""
    path = shared(f'weights/mlperf_tiny/{name}')
    contents = read(path)
    with h5py.File(path) as file:
        for key, each in contents.tensors.items():
            expected = file[f'model_weights/{key.split("/")[0]}/{key}:0'][()]
            np.testing.assert_array_equal(each.array(), expected, err_msg=key)
        layers = [layer['config']['name'] for layer in json.loads(file.attrs['model_config'])['config']['layers']]
    order = [layers.index(key.split('/')[0]) for key in contents.tensors]
    assert order == sorted(order) and len(order) == count
    assert contents.metadata == {'image_shape': f'({size}, {size}, 3)'}
    assert contents.notes == ('left aside the state of its optimizer',)
