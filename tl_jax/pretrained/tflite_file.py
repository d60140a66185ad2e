"""TFLite models: the constants of the main graph's operators, through a small flatbuffer reader of our own.

A flatbuffer is tables of fields. A table starts with the signed distance back to its vtable, which has, for each field,
its place in the table, or 0 where the field has its default. Strings, vectors and tables are reached by unsigned
distances forward; a vector is a count and its elements. The numbers of the fields below are those of TFLite's schema.

Every distance and count is checked against the file. Float tensors are views of the memory-mapped file.
"""

import math
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tl_jax.errors import UserError
from tl_jax.pretrained.tensors import Contents, Tensor

IDENTIFIER = b'TFL3'
MAX_ITEMS = 1 << 16  # Operators, tensors or buffers; a network of a thousand layers has 2 ** 13.
MAX_RANK = 8
OPERATORS = {
    **{0: 'add', 1: 'average_pool', 2: 'concatenation', 3: 'conv', 4: 'dw', 6: 'dequantize', 9: 'fc', 14: 'logistic'},
    **{17: 'max_pool', 18: 'mul', 19: 'relu', 21: 'relu6', 22: 'reshape', 25: 'softmax', 34: 'pad', 39: 'transpose'},
    **{36: 'gather', 40: 'mean', 41: 'sub', 42: 'div', 54: 'prelu', 67: 'transpose_conv', 114: 'quantize'},
    **{117: 'hard_swish', 126: 'batch_matmul', 150: 'gelu'},
}
# Field numbers of the strides' height and width and of the activation in the options of the layers we name.
OPTIONS = {'conv': (2, 1, 3), 'dw': (2, 1, 4), 'fc': (None, None, 0)}
DTYPES = {0: '<f4', 1: '<f2', 2: '<i4', 3: 'u1', 4: '<i8', 6: '?', 7: '<i2', 9: 'i1', 10: '<f8'}
QUANTISED = (np.dtype('u1'), np.dtype('i1'), np.dtype('<i2'))


class Constant(NamedTuple):
    """A tensor of the graph. Its data are `size` bytes at `start` of the file; it has none if it is computed.

    `scale` is empty unless the tensor is quantised, value = (q − zero) · scale; otherwise one number, or one for each
    index of `axis`. `dtype` is None where we do not know the type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    start: int
    size: int
    scale: np.ndarray
    zero: np.ndarray
    axis: int


class Operator(NamedTuple):
    """A step of the computation: kind, indices of its tensors (−1: absent), and a layer's options.

    `stride` is (height, width), `padding` 'SAME' or 'VALID', `activation` 0 none, 1 relu, 3 relu6.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: str = ''
    activation: int = 0


class Graph(NamedTuple):
    """The main graph: its tensors, its operators in the order of computation, and the indices of its inputs."""

    tensors: tuple[Constant, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]


class _File(NamedTuple):
    path: Path
    data: mmap.mmap


def read(path: Path) -> Contents:
    """Names the constants in the order of computation: `NN_<conv|dw|fc>_s<stride>_act<activation>/{weight, bias}`.

    NN counts these layers. Constants of other operators are `op<place>_<kind>/input<index>`. Float32 all of them.

    Raises:
      UserError: the file is damaged, or a constant is of a type that we do not read.
    """
    file = _open(path)
    graph = _graph(file)
    # Half-precision files keep float16 constants and widen them in the graph.
    widened = {
        operator.outputs[0]: operator.inputs[0]
        for operator in graph.operators
        if operator.kind == 'dequantize' and operator.outputs and min(operator.inputs, default=-1) >= 0
    }
    tensors, numbered, quantised = {}, 0, 0
    for place, operator in enumerate(graph.operators):
        constants = _constants(operator, graph, widened)
        if operator.kind in OPTIONS and 1 in constants and operator.inputs[0] >= 0:
            name = f'{numbered:02}_{operator.kind}_s{_stride(operator)}_act{operator.activation}'
            numbered += 1
            tensors[f'{name}/weight'] = _tensor(file, f'{name}/weight', constants[1])
            if 2 in constants:
                bias = _with_scale(constants[2], constants[1], graph.tensors[operator.inputs[0]])
                tensors[f'{name}/bias'] = _tensor(file, f'{name}/bias', bias)
            quantised += constants[1].dtype in QUANTISED
        elif operator.kind != 'dequantize':
            for index, constant in constants.items():
                # Shapes, axes and paddings are int32 or int64: settings, not weights.
                if constant.dtype is None or constant.dtype.kind == 'f' or constant.dtype in QUANTISED:
                    name = f'op{place}_{operator.kind}/input{index}'
                    tensors[name] = _tensor(file, name, constant)
    notes = (f'dequantised {quantised} weights, (q − zero) · scale, to float32',) if quantised else ()
    return Contents(tensors, _metadata(graph), notes)


def read_graph(path: Path) -> Graph:
    """The main graph of a TFLite file, for those who need paddings or what else the names do not say."""
    return _graph(_open(path))


def _open(path: Path) -> _File:
    with open(path, 'rb') as handle:
        head = handle.read(8)
        if head[4:] != IDENTIFIER:
            raise UserError(
                f'{path}: no TFLite model (its first bytes are {head.hex()}, without TFL3); is it truncated?'
            )
        return _File(path, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))


def _stride(operator: Operator) -> str:
    height, width = operator.stride
    return f'{height}' if height == width else f'{height}x{width}'


def _constants(operator: Operator, graph: Graph, widened: Mapping[int, int]) -> dict[int, Constant]:
    """Those inputs of an operator that the file holds, by their place among the inputs."""
    places = ((i, widened.get(tensor, tensor)) for i, tensor in enumerate(operator.inputs) if tensor >= 0)
    return {i: graph.tensors[tensor] for i, tensor in places if graph.tensors[tensor].size}


def _with_scale(bias: Constant, weight: Constant, source: Constant) -> Constant:
    """TFLite's rule: an int32 bias is in units of the input's scale times the weight's, whether or not it states them."""
    return bias if bias.scale.size else bias._replace(scale=source.scale[:1] * weight.scale)


def _metadata(graph: Graph) -> dict[str, str]:
    """The shape of one image, (height, width, channels), if that is the graph's only input."""
    shape = graph.tensors[graph.inputs[0]].shape if len(graph.inputs) == 1 else ()
    return {'image_shape': str(shape[1:])} if len(shape) == 4 and min(shape) > 0 else {}


def _tensor(file: _File, name: str, constant: Constant) -> Tensor:
    """Checks a constant against its bytes, and says how its float32 values come of them."""
    tensor = f'{file.path}: the tensor {name!r:.80} (there {constant.name!r:.80})'
    shape, dtype, scale, zero, axis = constant.shape, constant.dtype, constant.scale, constant.zero, constant.axis
    if dtype is None or dtype.kind == 'b':
        raise UserError(
            f'{tensor} is of a type other than float, int8, uint8, int16 and int32; convert the model again'
        )
    if math.prod((*shape, dtype.itemsize)) != constant.size:
        raise UserError(f'{tensor} is {dtype} {list(shape)}, but its buffer has {constant.size} bytes; fetch it again')

    def stored() -> np.ndarray:
        return np.ndarray(shape, dtype, file.data, constant.start)

    if dtype.kind == 'f':
        return _float32(shape, lambda: stored().astype(np.float32, copy=False))
    if not scale.size:
        raise UserError(f'{tensor} is {dtype} without the scales that make it numbers; convert the model again')
    if not 0 <= axis < max(len(shape), 1) or any(x.size not in (1, *shape[axis : axis + 1]) for x in (scale, zero)):
        raise UserError(f'{tensor} has {scale.size} scales along axis {axis} of {list(shape)}; convert the model again')
    along = tuple(-1 if i == axis else 1 for i in range(len(shape)))

    def dequantised() -> np.ndarray:
        step, origin = scale.astype(np.float32), zero.astype(np.float32)
        return (stored().astype(np.float32) - origin.reshape(along)) * step.reshape(along)

    return _float32(shape, dequantised)


def _float32(shape: tuple[int, ...], array: Callable[[], np.ndarray]) -> Tensor:
    return Tensor(shape, np.dtype(np.float32), array)


# The schema: Model, OperatorCode, SubGraph, Operator, Tensor, QuantizationParameters and Buffer.


def _graph(file: _File) -> Graph:
    model = _forward(file, 0)
    kinds = [_kind(file, code) for code in _tables(file, model, 1)]
    graphs = _tables(file, model, 2)
    if not graphs:
        raise UserError(f'{file.path}: it holds no graph; convert the model again')
    extents = [_extent(file, buffer) for buffer in _tables(file, model, 4)]
    _check_apart(extents, file)
    tensors = tuple(_constant(file, table, extents) for table in _tables(file, graphs[0], 0))
    operators = tuple(_operator(file, table, kinds) for table in _tables(file, graphs[0], 3))
    inputs = tuple(_numbers(file, graphs[0], 1, '<i4').tolist())
    for indices in (inputs, *(operator.inputs + operator.outputs for operator in operators)):
        if not all(-1 <= index < len(tensors) for index in indices):
            raise UserError(f'{file.path}: an operator takes a tensor that the graph lacks; fetch the file again')
    return Graph(tensors, operators, tuple(index for index in inputs if index >= 0))


def _kind(file: _File, table: int) -> str:
    """An operator's name. Codes over 127 came later, in a field of their own, where the old one says 127."""
    code = max(_number(file, table, 0, '<b'), _number(file, table, 3, '<i'))
    return OPERATORS.get(code, f'code{code}')


def _operator(file: _File, table: int, kinds: Sequence[str]) -> Operator:
    code = _number(file, table, 0, '<I')
    if code >= len(kinds):
        raise UserError(f'{file.path}: an operator has the code {code} of {len(kinds)}; fetch the file again')
    indices = [_numbers(file, table, field, '<i4') for field in (1, 2)]
    if any(len(each) > MAX_ITEMS // 64 for each in indices):
        raise UserError(f'{file.path}: an operator has {max(map(len, indices))} tensors; fetch the file again')
    operator = Operator(kinds[code], *(tuple(each.tolist()) for each in indices))
    options = _follow(file, table, 4)
    if operator.kind not in OPTIONS or options is None:
        return operator
    height, width, activation = OPTIONS[operator.kind]
    operator = operator._replace(activation=_number(file, options, activation, '<b'))
    if height is None:
        return operator
    return operator._replace(
        stride=(_number(file, options, height, '<i'), _number(file, options, width, '<i')),
        padding='VALID' if _number(file, options, 0, '<b') else 'SAME',
    )


def _constant(file: _File, table: int, extents: Sequence[tuple[int, int]]) -> Constant:
    shape = tuple(_numbers(file, table, 0, '<i4').tolist())
    buffer = _number(file, table, 2, '<I')
    name_at = _follow(file, table, 3)
    name = '' if name_at is None else _vector(file, name_at, 'u1').tobytes()[:200].decode('utf-8', 'replace')
    if buffer >= len(extents) or len(shape) > MAX_RANK or any(n < -1 for n in shape):
        raise UserError(f'{file.path}: the tensor {name!r:.80} has an impossible shape or buffer; fetch the file again')
    start, size = extents[buffer]
    dtype = DTYPES.get(_number(file, table, 1, '<b'))
    if _follow(file, table, 6) is not None:  # Sparse: the bytes are not the dense tensor.
        dtype = None
    scale, zero, axis = np.zeros(0, np.float32), np.zeros(1, np.int64), 0
    quantization = _follow(file, table, 4)
    if quantization is not None:
        scale, zero = _numbers(file, quantization, 2, '<f4'), _numbers(file, quantization, 3, '<i8')
        zero = zero if zero.size else np.zeros(1, np.int64)
        axis = _number(file, quantization, 6, '<i')
    return Constant(name, shape, None if dtype is None else np.dtype(dtype), start, size, scale, zero, axis)


def _extent(file: _File, table: int) -> tuple[int, int]:
    """Start and size of a buffer's bytes: in the flatbuffer, or behind it in files over 2 GB."""
    start, size = _number(file, table, 1, '<Q'), _number(file, table, 2, '<Q')
    if start > 1:
        _check_inside(file, start, size)
        return start, size
    at = _follow(file, table, 0)
    return (0, 0) if at is None else (at + 4, _vector(file, at, 'u1').size)


def _check_apart(extents: Sequence[tuple[int, int]], file: _File) -> None:
    """Buffers may be one and the same, as tied weights are, but not overlap."""
    end = 0
    for start, size in sorted({each for each in extents if each[1]}):
        if start < end:
            raise UserError(f'{file.path}: two of its buffers overlap, at byte {start}; fetch the file again')
        end = start + size


# Flatbuffers. Tables, vectors and strings are known by the byte at which they start.


def _check_inside(file: _File, start: int, size: int) -> None:
    if start < 0 or start + size > len(file.data):
        raise UserError(f'{file.path}: damaged or truncated, it points to bytes beyond its end; fetch it again')


def _unpack(file: _File, at: int, form: str) -> int:
    _check_inside(file, at, struct.calcsize(form))
    return struct.unpack_from(form, file.data, at)[0]


def _forward(file: _File, at: int) -> int:
    """Where the distance at a byte leads."""
    return at + _unpack(file, at, '<I')


def _place(file: _File, table: int, field: int) -> int | None:
    """The byte of a table's field; None if it has its default."""
    vtable = table - _unpack(file, table, '<i')
    slot = 4 + 2 * field
    if slot + 2 > _unpack(file, vtable, '<H'):
        return None
    offset = _unpack(file, vtable + slot, '<H')
    return table + offset if offset else None


def _number(file: _File, table: int, field: int, form: str) -> int:
    at = _place(file, table, field)
    return 0 if at is None else _unpack(file, at, form)


def _follow(file: _File, table: int, field: int) -> int | None:
    at = _place(file, table, field)
    return None if at is None else _forward(file, at)


def _vector(file: _File, at: int, dtype: str) -> np.ndarray:
    """A vector of numbers, as a view of the file."""
    count, dtype = _unpack(file, at, '<I'), np.dtype(dtype)
    _check_inside(file, at + 4, count * dtype.itemsize)
    return np.ndarray((count,), dtype, file.data, at + 4)


def _numbers(file: _File, table: int, field: int, dtype: str) -> np.ndarray:
    at = _follow(file, table, field)
    return np.zeros(0, dtype) if at is None else _vector(file, at, dtype)


def _tables(file: _File, table: int, field: int) -> list[int]:
    """Where the tables of a vector start."""
    at = _follow(file, table, field)
    if at is None:
        return []
    distances = _vector(file, at, '<u4')
    if len(distances) > MAX_ITEMS:
        raise UserError(f'{file.path}: a list of {len(distances)} items, more than any model has; fetch the file again')
    return [at + 4 + 4 * i + distance for i, distance in enumerate(distances.tolist())]
