"""TFLite: graphs built by hand with struct, the real files against their Keras and npz twins, and hostile files."""

import struct
from typing import NamedTuple

import h5py
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.pretrained import npz_file
from tl_jax.pretrained.tflite_file import read, read_graph

FLOAT, HALF, INT32, UINT8, INT8, INT4 = 0, 1, 2, 3, 9, 17
ADD, CONV, DW, DEQUANTIZE, FC, MUL, MEAN = 0, 3, 4, 6, 9, 18, 40


class Table(NamedTuple):
    """A flatbuffer table to write: `{field: value}`, where a value is a table, a list of them, an array or a number."""

    fields: dict


class Number(NamedTuple):
    form: str
    value: int


def flatbuffer(root: Table) -> bytes:
    """Writes tables front to back: vtable, table, then what the table refers to."""
    out = bytearray(b'\0\0\0\0TFL3')

    def write(value) -> int:
        if isinstance(value, Table):
            count = max(value.fields, default=-1) + 1
            start = len(out)
            out.extend(struct.pack('<HH', 4 + 2 * count, 4 + 8 * count) + bytes(2 * count))
            at = len(out)
            out.extend(struct.pack('<i', at - start) + bytes(8 * count))
            for field, each in value.fields.items():
                slot = 4 + 8 * field
                struct.pack_into('<H', out, start + 4 + 2 * field, slot)
                if isinstance(each, Number):
                    struct.pack_into(f'<{each.form}', out, at + slot, each.value)
                else:
                    struct.pack_into('<I', out, at + slot, write(each) - at - slot)
            return at
        at = len(out)
        out.extend(struct.pack('<I', len(value)))
        if isinstance(value, list):
            out.extend(bytes(4 * len(value)))
            for i, each in enumerate(value):
                slot = at + 4 + 4 * i
                struct.pack_into('<I', out, slot, write(each) - slot)
        else:
            out.extend(value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes())
        return at

    struct.pack_into('<I', out, 0, write(root))
    return bytes(out)


def tensor(shape, kind, buffer, name=b't', scale=None, zero=None, axis=0, **fields) -> Table:
    quantization = {}
    if scale is not None:
        quantization = {2: np.array(scale, '<f4'), 6: Number('i', axis)}
        if zero is not None:
            quantization[3] = np.array(zero, '<i8')
    table = {0: np.array(shape, '<i4'), 1: Number('b', kind), 2: Number('I', buffer), 3: name, **fields.get('more', {})}
    return Table({**table, 4: Table(quantization)})


def operator(code, inputs, outputs, options=None) -> Table:
    fields = {0: Number('I', code), 1: np.array(inputs, '<i4'), 2: np.array(outputs, '<i4')}
    return Table({**fields, **({4: Table(options)} if options else {})})


def model(tensors, operators, codes, buffers) -> bytes:
    codes = [Table({0: Number('b', min(code, 127)), 3: Number('i', code)}) for code in codes]
    graph = Table({0: tensors, 1: np.array([0], '<i4'), 2: np.array([0], '<i4'), 3: operators})
    tables = [Table({}), *(Table({0: data.tobytes()}) for data in buffers)]
    return flatbuffer(Table({0: Number('I', 3), 1: codes, 2: [graph], 4: tables}))


def conv_options(stride=(1, 1), activation=0, padding=0) -> dict:
    """Fields of Conv2DOptions; stride is (height, width), padding 0 SAME, 1 VALID."""
    return {
        0: Number('b', padding),
        1: Number('i', stride[1]),
        2: Number('i', stride[0]),
        3: Number('b', activation),
    }


INPUT = tensor([1, 4, 6, 2], FLOAT, 0, b'input')
WEIGHT = np.arange(24, dtype='<f4').reshape(3, 2, 2, 2)
BIAS = np.array([1, -2, 3], '<f4')


def write(path, data: bytes):
    path.write_bytes(data)
    return path


def conv_model(weight_table, bias_table, weight, bias, source=INPUT, inputs=(0, 1, 2)) -> bytes:
    options = conv_options((2, 1), 3, 1)
    return model([source, weight_table, bias_table], [operator(0, inputs, [0], options)], [CONV], [weight, bias])


def test_reads_float_layers_in_order(tmp_path):
    depth = np.arange(12, dtype='<f4').reshape(1, 2, 2, 3)
    dense, factor = np.arange(6, dtype='<f4').reshape(2, 3), np.array([7, 8], '<f4')
    tensors = [
        INPUT,
        tensor([3, 2, 2, 2], FLOAT, 1, b'conv/w'),
        tensor([3], FLOAT, 2, b'conv/b'),
        tensor([1, 2, 2, 3], FLOAT, 3),
        tensor([2, 3], FLOAT, 4),
        tensor([2], FLOAT, 5),
        tensor([2], INT32, 6),
        tensor([1, 4, 6, 3], FLOAT, 0),
    ]
    operators = [
        operator(0, [0, 1, 2], [7], conv_options((2, 1), 3, 1)),
        operator(1, [7, 3, -1], [7], {**conv_options((2, 2)), 3: Number('i', 2), 4: Number('b', 1)}),
        operator(3, [7, 6], [7]),
        operator(2, [7, 4, -1], [7], {0: Number('b', 1)}),
        operator(4, [7, 5], [7]),
    ]
    buffers = [WEIGHT, BIAS, depth, dense, factor, np.array([1, 2], '<i4')]
    path = write(tmp_path / 'm.tflite', model(tensors, operators, [CONV, DW, FC, MEAN, MUL], buffers))
    contents = read(path)
    expected = {
        '00_conv_s2x1_act3/weight': WEIGHT,
        '00_conv_s2x1_act3/bias': BIAS,
        '01_dw_s2_act1/weight': depth,
        '02_fc_s1_act1/weight': dense,
        'op4_mul/input1': factor,
    }
    assert list(contents.tensors) == list(expected)
    for name, value in expected.items():
        each = contents.tensors[name]
        assert (each.shape, each.dtype, each.array().dtype) == (value.shape, np.float32, np.float32)
        np.testing.assert_array_equal(each.array(), value)
    assert contents.notes == () and contents.metadata == {'image_shape': '(4, 6, 2)'}
    graph = read_graph(path)
    assert graph.operators[0][:6] == ('conv', (0, 1, 2), (7,), (2, 1), 'VALID', 3)
    assert graph.operators[1].padding == 'SAME' and graph.tensors[1].name == 'conv/w'


@pytest.mark.parametrize('kind, dtype', [(UINT8, 'u1'), (INT8, 'i1')])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('states_its_scale', [True, False])
def test_dequantises(kind, dtype, channels, states_its_scale, tmp_path):
    q, bias = WEIGHT.astype(dtype), np.array([100, -200, 7], '<i4')
    scale, zero = np.array([0.5, 0.25, 2][:channels], 'f4'), np.array([3, 0, 9][:channels])
    source = tensor([1, 4, 6, 2], UINT8, 0, scale=[0.125], zero=[128])
    tables = (
        tensor([3, 2, 2, 2], kind, 1, scale=scale, zero=zero),
        tensor([3], INT32, 2, scale=scale * 0.125 if states_its_scale else None),
    )
    contents = read(write(tmp_path / 'm.tflite', conv_model(*tables, q, bias, source)))
    weight, shift = (each.array() for each in contents.tensors.values())
    expected = np.stack([(q[i].astype(float) - zero[i % channels]) * scale[i % channels] for i in range(3)])
    np.testing.assert_array_equal(weight, expected)
    np.testing.assert_array_equal(shift, bias * 0.125 * np.broadcast_to(scale, 3))
    assert weight.dtype == shift.dtype == np.float32 and 'dequantised 1 weights' in contents.notes[0]


def test_dequantises_along_the_axis_of_depthwise_kernels(tmp_path):
    q = np.arange(12, dtype='i1').reshape(1, 2, 2, 3)
    tensors = [INPUT, tensor([1, 2, 2, 3], INT8, 1, scale=[1, 2, 4], zero=[0, 0, 0], axis=3)]
    data = model(tensors, [operator(0, [0, 1], [0], conv_options())], [DW], [q])
    (weight,) = read(write(tmp_path / 'm.tflite', data)).tensors.values()
    np.testing.assert_array_equal(weight.array(), q * np.array([1.0, 2, 4]))


def test_reads_half_precision_through_dequantize(tmp_path):
    tensors = [INPUT, tensor([3, 2, 2, 2], HALF, 1), tensor([3, 2, 2, 2], FLOAT, 0)]
    operators = [operator(0, [1], [2]), operator(1, [0, 2, -1], [0], conv_options())]
    path = write(tmp_path / 'm.tflite', model(tensors, operators, [DEQUANTIZE, CONV], [WEIGHT.astype('<f2')]))
    (weight,) = read(path).tensors.values()
    np.testing.assert_array_equal(weight.array(), WEIGHT)
    assert weight.array().dtype == np.float32


PLAIN_WEIGHT, PLAIN_BIAS = tensor([3, 2, 2, 2], FLOAT, 1, b'conv/w'), tensor([3], FLOAT, 2)


@pytest.mark.parametrize(
    'weight, change, message',
    [
        (tensor([3, 2, 2, 3], FLOAT, 1), {}, r"'00_conv_s2x1_act3/weight'.* its buffer has 96 bytes"),
        (tensor([2**31 - 1] * 4, FLOAT, 1), {}, 'its buffer has 96 bytes'),
        (tensor([-1, 2, 2, 2], FLOAT, 1), {}, 'its buffer has 96 bytes'),
        (tensor([-7, 2, 2, 2], FLOAT, 1), {}, 'impossible shape'),
        (tensor([1] * 9, FLOAT, 1), {}, 'impossible shape'),
        (tensor([3, 2, 2, 2], FLOAT, 9), {}, 'impossible shape or buffer'),
        (tensor([3, 2, 2, 16], INT4, 1, scale=[1]), {}, 'of a type other than'),
        (tensor([3, 2, 2, 2], FLOAT, 1, more={6: Table({})}), {}, 'of a type other than'),
        (tensor([3, 2, 2, 8], INT8, 1), {}, 'without the scales'),
        (tensor([3, 2, 2, 8], INT8, 1, scale=[1, 2]), {}, '2 scales along axis 0'),
        (tensor([3, 2, 2, 8], INT8, 1, scale=[1], zero=[1, 2]), {}, 'scales along axis 0'),
        (tensor([3, 2, 2, 8], INT8, 1, scale=[1, 2, 3], axis=4), {}, '3 scales along axis 4'),
        (PLAIN_WEIGHT, {'inputs': (0, 1, 3)}, 'a tensor that the graph lacks'),
        (PLAIN_WEIGHT, {'inputs': (0, 1, -2)}, 'a tensor that the graph lacks'),
        (PLAIN_WEIGHT, {'inputs': [0] * 2000}, 'an operator has 2000 tensors'),
    ],
)
def test_refuses_tensors_that_cannot_be(weight, change, message, tmp_path):
    path = write(tmp_path / 'm.tflite', conv_model(weight, PLAIN_BIAS, WEIGHT, BIAS, **change))
    with pytest.raises(UserError, match=rf'm\.tflite: .*{message}') as error:
        read(path)
    assert '\n' not in str(error.value)


def test_operator_codes_are_in_either_field(tmp_path):
    """Old files have a byte; newer ones an int, and 127 in the byte where it is too small."""
    old, new = Table({0: Number('b', CONV)}), Table({0: Number('b', 127), 3: Number('i', 150)})
    graph = Table({0: [INPUT], 1: np.array([0], '<i4'), 3: [operator(i, [0], [0]) for i in range(2)]})
    path = write(tmp_path / 'm.tflite', flatbuffer(Table({1: [old, new], 2: [graph], 4: [Table({})]})))
    assert [each.kind for each in read_graph(path).operators] == ['conv', 'gelu']


def test_refuses_unknown_operator_codes_and_empty_models(tmp_path):
    unknown = model([INPUT], [operator(5, [0], [0])], [CONV], [])
    with pytest.raises(UserError, match='the code 5 of 1'):
        read(write(tmp_path / 'm.tflite', unknown))
    with pytest.raises(UserError, match='no graph'):
        read(write(tmp_path / 'm.tflite', flatbuffer(Table({}))))


@pytest.mark.parametrize('data', [b'', b'TFL3', b'\x08\0\0\0TFL2' + bytes(99), b'PK\x03\x04' + bytes(99)])
def test_refuses_other_files(data, tmp_path):
    with pytest.raises(UserError, match=r'm\.tflite: no TFLite model'):
        read(write(tmp_path / 'm.tflite', data))


def test_refuses_vectors_and_distances_beyond_the_file(tmp_path):
    whole = conv_model(PLAIN_WEIGHT, PLAIN_BIAS, WEIGHT, BIAS)
    at = whole.index(WEIGHT.tobytes()) - 4
    for place, number in ((at, 97), (at, 2**32 - 1), (0, 2**32 - 1), (0, len(whole) - 2)):
        changed = bytearray(whole)
        struct.pack_into('<I', changed, place, number)
        with pytest.raises(UserError, match=r'm\.tflite: (damaged|.*buffers overlap|.*its buffer has 97)'):
            read(write(tmp_path / 'm.tflite', bytes(changed)))


def test_refuses_overlapping_buffers_but_not_shared_ones(tmp_path):
    whole = bytearray(conv_model(PLAIN_WEIGHT, PLAIN_BIAS, WEIGHT, BIAS))
    start = whole.index(WEIGHT.tobytes())
    struct.pack_into('<I', whole, start - 4, whole.index(BIAS.tobytes()) + 4 - start)
    with pytest.raises(UserError, match='two of its buffers overlap'):
        read(write(tmp_path / 'm.tflite', bytes(whole)))
    twice = [operator(0, [0, 1, 2], [0], conv_options())] * 2
    path = write(tmp_path / 'm.tflite', model([INPUT, PLAIN_WEIGHT, PLAIN_BIAS], twice, [CONV], [WEIGHT, BIAS]))
    assert list(read(path).tensors)[2] == '01_conv_s1_act0/weight'


def test_refuses_endless_lists(tmp_path):
    """70,000 operators that are all the same table: a small file whose parsing would not end."""
    whole = bytearray(conv_model(PLAIN_WEIGHT, PLAIN_BIAS, WEIGHT, BIAS))
    root = struct.unpack_from('<I', whole, 0)[0]
    slot = root + 4 + 8 * 1
    end = len(whole)
    first = struct.unpack_from('<I', whole, slot)[0] + slot + 4
    table = first + struct.unpack_from('<I', whole, first)[0]
    whole += struct.pack('<I', 70_000) + b''.join(
        struct.pack('<I', (table - end - 4 - 4 * i) % 2**32) for i in range(70_000)
    )
    struct.pack_into('<I', whole, slot, end - slot)
    with pytest.raises(UserError, match='a list of 70000 items'):
        read(write(tmp_path / 'm.tflite', bytes(whole)))


def test_every_cut_and_flip_is_refused_or_read(tmp_path):
    whole = conv_model(PLAIN_WEIGHT, PLAIN_BIAS, WEIGHT, BIAS)
    generator = np.random.default_rng(0)
    versions = [whole[:cut] for cut in range(0, len(whole), 3)]
    for _ in range(300):
        changed = bytearray(whole)
        changed[generator.integers(len(whole))] = generator.integers(256)
        versions.append(bytes(changed))
    refused = 0
    for version in versions:
        try:
            for each in read(write(tmp_path / 'm.tflite', version)).tensors.values():
                assert each.array().shape == each.shape
        except UserError as error:
            refused += 1
            assert 'm.tflite' in str(error) and '\n' not in str(error)
    assert refused > len(whole) // 4


@pytest.mark.shared
def test_quantised_mobilenet_is_exactly_its_npz(shared):
    ours = read(shared('weights/mobilenet_tflite/mobilenet_v2_1.0_224_quant.tflite')).tensors
    expected = npz_file.read(shared('weights/mobilenet_tflite/mobilenet_v2_1.0_224_quant.npz')).tensors
    assert set(ours) == set(expected) and len(ours) == 106
    for name, each in ours.items():
        np.testing.assert_array_equal(each.array(), expected[name].array(), err_msg=name)


@pytest.mark.shared
@pytest.mark.parametrize(
    'file, layers, first, last',
    [
        ('mobilenet_tflite/tf2_mobilenet_v2_1.0_224_ptq.tflite', 53, '00_conv_s2_act3', '52_conv_s1_act0'),
        ('mobilenet_tflite/mobilenet_v1_0.25_128_quant.tflite', 28, '00_conv_s2_act3', '27_conv_s1_act0'),
        ('mlperf_tiny/kws_ref_model_float32.tflite', 10, '00_conv_s2_act1', '09_fc_s1_act0'),
        ('mlperf_tiny/vww_96_float.tflite', 28, '00_conv_s2_act1', '27_fc_s1_act0'),
    ],
)
def test_real_files(file, layers, first, last, shared):
    tensors = read(shared(f'weights/{file}')).tensors
    assert len(tensors) == 2 * layers
    names = list(tensors)
    assert (names[0], names[-1]) == (f'{first}/weight', f'{last}/bias')
    for each in tensors.values():
        values = each.array()
        assert values.dtype == np.float32 and np.isfinite(values).all() and 0 < values.std() < 30


@pytest.mark.shared
@pytest.mark.parametrize('name, kinds', [('pretrainedResnet.{}', ('conv', 'fc')), ('vww_96{}', ('conv', 'dw', 'fc'))])
def test_float_files_are_their_keras_twins_with_batch_norm_folded(name, kinds, shared):
    lite = name.format('tflite' if '.{}' in name else '_float.tflite')
    ours = {key: each.array() for key, each in read(shared(f'weights/mlperf_tiny/{lite}')).tensors.items()}
    assert {key.split('_')[1] for key in ours} == set(kinds)
    with h5py.File(shared(f'weights/mlperf_tiny/{name.format("h5" if ".{}" in name else ".h5")}')) as file:
        folded = fold(file['model_weights'])
    for number, (weight, bias) in enumerate(folded):
        stem = next(key for key in ours if key.startswith(f'{number:02}_')).split('/')[0]
        np.testing.assert_allclose(ours[f'{stem}/weight'], weight, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours[f'{stem}/bias'], bias, rtol=1e-4, atol=1e-4)
    assert 2 * len(folded) == len(ours)


def fold(group) -> list[tuple[np.ndarray, np.ndarray]]:
    """Kernels as TFLite lays them and biases, each batch norm folded into the layer whose output it takes."""
    names = [name.decode() for name in group.attrs['layer_names']]
    layers = [name for name in names if name.startswith(('conv2d', 'depthwise', 'dense'))]
    norms = iter(name for name in names if name.startswith('batch_normalization'))
    folded = []
    for layer in layers:
        values = {key.split(':')[0]: each[()] for key, each in group[layer][layer].items()}
        bias = values.pop('bias')
        (kernel,) = values.values()
        if layer in ('conv2d_5', 'conv2d_8') and kernel.shape[:2] == (1, 1) and 'depthwise_conv2d' not in names:
            folded.append((kernel.transpose(3, 0, 1, 2), bias))  # ResNet-8's shortcuts have no norm.
            continue
        if layer == 'dense':
            folded.append((kernel.T, bias))
            continue
        norm = next(norms)
        norm = {key.split(':')[0]: each[()] for key, each in group[norm][norm].items()}
        scale = norm['gamma'] / np.sqrt(norm['moving_variance'] + 1e-3)
        turned = kernel.transpose(3, 0, 1, 2)
        scaled = turned * scale if layer.startswith('depthwise') else turned * scale[:, None, None, None]
        folded.append((scaled, (bias - norm['moving_mean']) * scale + norm['beta']))
    return folded
