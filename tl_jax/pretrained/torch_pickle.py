"""The pickle inside a torch checkpoint, read as data: nothing is imported, looked up or called.

`read` walks the opcodes and builds plain Python values. A global is only ever a name, compared with the names of
`GLOBALS`; the few calls that checkpoints need (`torch._utils._rebuild_tensor_v2`, `collections.OrderedDict`, …) are
pattern-matched here and yield descriptions, `Storage` and `View`, that `torch_file` resolves against the file's bytes.
Anything else in the stream is a `UserError` that names the file and the global.
"""

import pickletools
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from tl_jax.errors import UserError
from tl_jax.pretrained.mapped import array_bytes

MAX_BYTES = 16 << 20  # A tensor takes about 200 bytes of pickle.
MAX_OPCODES = 2_000_000  # And about 30 opcodes; each costs at most some 200 bytes of memory.


class Global(NamedTuple):
    """A name that the pickle mentions. It stays a name."""

    name: str


class Storage(NamedTuple):
    """`length` elements from `start` on, of the run of `size` elements that the file stores under `key`."""

    key: str
    dtype: np.dtype
    size: int
    start: int
    length: int


class Pickled(NamedTuple):
    """A pickle's value, and every storage it names, also those of tensors that the value no longer holds."""

    value: Any
    storages: dict[str, Storage]


class View(NamedTuple):
    """A tensor as torch describes it: a strided view of a storage. Offset and strides count elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


STORAGES = {
    'DoubleStorage': np.float64,
    'FloatStorage': np.float32,
    'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16,
    'LongStorage': np.int64,
    'IntStorage': np.int32,
    'ShortStorage': np.int16,
    'CharStorage': np.int8,
    'ByteStorage': np.uint8,
    'BoolStorage': np.bool_,
    'ComplexFloatStorage': np.complex64,
    'ComplexDoubleStorage': np.complex128,
    'UntypedStorage': np.uint8,
}
DTYPES = {
    'float64': np.float64,
    'float32': np.float32,
    'float16': np.float16,
    'bfloat16': ml_dtypes.bfloat16,
    'float8_e4m3fn': ml_dtypes.float8_e4m3fn,
    'float8_e5m2': ml_dtypes.float8_e5m2,
    'int64': np.int64,
    'int32': np.int32,
    'int16': np.int16,
    'int8': np.int8,
    'uint64': np.uint64,
    'uint32': np.uint32,
    'uint16': np.uint16,
    'uint8': np.uint8,
    'bool': np.bool_,
}
GLOBALS = {
    'collections.OrderedDict',
    'torch.Size',
    'torch.device',
    'torch._utils._rebuild_tensor',
    'torch._utils._rebuild_tensor_v2',
    'torch._utils._rebuild_tensor_v3',
    'torch._utils._rebuild_parameter',
    'torch._utils._rebuild_parameter_with_state',
    'torch.storage.UntypedStorage',
    *(f'torch.{name}' for name in STORAGES),
    *(f'torch.{name}' for name in DTYPES),
}
PUSHED = {
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINFLOAT',
    'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8', 'BINSTRING', 'SHORT_BINSTRING', 'BINBYTES', 'SHORT_BINBYTES',
}  # fmt: skip


def read(stream: BinaryIO, file: str) -> Pickled:
    """Reads one pickle, up to and including its STOP.

    Args:
      stream: positioned at the pickle; the caller bounds its length by `MAX_BYTES`.
      file: what to call it in errors.

    Returns:
      A value of None, bools, numbers, strings, bytes, lists, tuples and dicts of these, `View`s and `np.dtype`s.

    Raises:
      UserError: the stream is malformed, too long, or asks for anything else.
    """
    try:
        return _run(stream, file)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f'{file}: the pickle is damaged ({_brief(error)}); fetch the file again') from None


def _run(stream: BinaryIO, file: str) -> Pickled:
    """The machine: a stack, the stacks set aside by MARK, and a memo."""
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[int, Any] = {}
    storages: dict[str, Storage] = {}
    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPCODES:
            raise UserError(f'{file}: the pickle has more than {MAX_OPCODES} opcodes; this is no table of tensors')
        match opcode.name:
            case 'PROTO' | 'FRAME':
                pass
            case 'STOP':
                return Pickled(stack.pop(), storages)
            case name if name in PUSHED:
                stack.append(arg)
            case 'NONE' | 'NEWTRUE' | 'NEWFALSE':
                stack.append({'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}[opcode.name])
            case 'MARK':
                marked.append(stack)
                stack = []
            case 'EMPTY_TUPLE':
                stack.append(())
            case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                stack.append(tuple(_popped(stack, int(opcode.name[-1]))))
            case 'TUPLE':
                items, stack = stack, marked.pop()
                stack.append(tuple(items))
            case 'EMPTY_LIST':
                stack.append([])
            case 'APPEND':
                item = stack.pop()
                _checked(stack[-1], list).append(item)
            case 'APPENDS':
                items, stack = stack, marked.pop()
                _checked(stack[-1], list).extend(items)
            case 'EMPTY_DICT':
                stack.append({})
            case 'SETITEM':
                key, value = _popped(stack, 2)
                _checked(stack[-1], dict)[_key(key)] = value
            case 'SETITEMS':
                items, stack = stack, marked.pop()
                pairs = zip(items[::2], items[1::2], strict=True)
                _checked(stack[-1], dict).update((_key(key), value) for key, value in pairs)
            case 'MEMOIZE':
                memo[len(memo)] = stack[-1]
            case 'BINPUT' | 'LONG_BINPUT':
                memo[arg] = stack[-1]
            case 'BINGET' | 'LONG_BINGET':
                stack.append(memo[arg])
            case 'GLOBAL':
                stack.append(_named(arg.replace(' ', '.'), file))
            case 'STACK_GLOBAL':
                stack.append(_named('.'.join(_checked(part, str) for part in _popped(stack, 2)), file))
            case 'BINPERSID':
                storage = _storage(stack.pop(), file)
                first = storages.setdefault(storage.key, storage)
                if (first.dtype, first.size) != (storage.dtype, storage.size):
                    raise ValueError(f'two descriptions of storage {storage.key}')
                stack.append(storage)
            case 'REDUCE':
                function, args = _popped(stack, 2)
                stack.append(_call(function, _checked(args, tuple), file))
            case 'BUILD':
                # An OrderedDict of torch carries `_metadata`, the versions of its modules. It is left aside.
                _popped(stack, 1)
                _checked(stack[-1], dict)
            case 'INST':
                raise _refusal(arg.replace(' ', '.'), file)
            case name:
                raise UserError(f'{file}: the pickle uses {name}, which no table of tensors needs; it is refused')
    raise ValueError('it has no end')


def _named(name: str, file: str) -> Global | np.dtype:
    if name not in GLOBALS:
        raise _refusal(name, file)
    leaf = name.removeprefix('torch.')
    return np.dtype(DTYPES[leaf]) if leaf in DTYPES else Global(name)


def _storage(identity: Any, file: str) -> Storage:
    """The persistent id of a storage: ('storage', type, key, device, size[, (name, start, length) of its part])."""
    match identity:
        case ('storage', Global(name), str() as key, str(), int() as size, *rest) if size >= 0:
            dtype = np.dtype(STORAGES[name.rsplit('.', 1)[-1]])
            match rest:
                case [] | [None]:
                    return Storage(key, dtype, size, 0, size)
                case [(str(), int() as start, int() as length)] if 0 <= start <= start + length <= size:
                    return Storage(key, dtype, size, start, length)
    raise UserError(f'{file}: the pickle has a persistent id that names no storage; it is refused')


def _call(function: Any, args: tuple, file: str) -> Any:
    """What a REDUCE stands for. Hooks, `requires_grad` and device are read past: none concerns a value."""
    match function, args:
        case Global('collections.OrderedDict'), ():
            return {}
        case Global('collections.OrderedDict'), (list() as pairs,):
            return {_key(key): value for key, value in pairs}
        case Global('torch.Size'), (tuple() as shape,):
            return shape
        case Global('torch.device'), (str() as device, *_):
            return device
        case Global('torch._utils._rebuild_parameter' | 'torch._utils._rebuild_parameter_with_state'), (
            View() as v,
            *_,
        ):
            return v
        case (
            Global('torch._utils._rebuild_tensor' | 'torch._utils._rebuild_tensor_v2'),
            (Storage() as storage, offset, shape, strides, *_),
        ):
            return _view(storage, storage.dtype, offset, shape, strides, file)
        case (
            Global('torch._utils._rebuild_tensor_v3'),
            (Storage() as storage, offset, shape, strides, _, _, np.dtype() as dtype, *_),
        ):
            return _view(storage, dtype, offset, shape, strides, file)
        case Global(name), _:
            raise UserError(f'{file}: the pickle calls {name} with arguments that make no tensor; it is refused')
    raise UserError(f'{file}: the pickle calls a value that is not a function; it is refused')


def _view(storage: Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any, file: str) -> View:
    """Checks a strided view against its storage, in exact integers, before anything takes memory."""
    numbers = (offset, *_checked(shape, tuple), *_checked(strides, tuple))
    try:
        if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError
        size = array_bytes(shape, dtype) // dtype.itemsize
    except ValueError:
        raise UserError(
            f'{file}: a tensor in the storage {storage.key!r:.40} has impossible sizes; the file is damaged'
        ) from None
    available = storage.length * storage.dtype.itemsize // dtype.itemsize
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if size else 0
    if size > available or (size and last >= available):
        raise UserError(
            f'{file}: a tensor of shape {shape} reaches outside its storage {storage.key!r:.40} of {available}; '
            'the file is damaged, or the tensor expanded: save it contiguous'
        )
    # The stride of an axis of one element says nothing, and may be any number.
    used = tuple(stride if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
    return View(storage, dtype, offset, shape, used)


def _popped(stack: list, count: int) -> list:
    if len(stack) < count:
        raise IndexError('stack underflow')
    items = stack[-count:]
    del stack[-count:]
    return items


def _checked(value: Any, kind: type) -> Any:
    """`value` if it is exactly of this built-in kind; subclasses, such as our own tuples, are not."""
    if type(value) is not kind:
        raise TypeError(f'{type(value).__name__} in place of {kind.__name__}')
    return value


def _key(key: Any) -> str | int:
    """A dict key: text, or an integer of 64 bits. Other keys could be crafted to collide, and none is needed."""
    if type(key) is str or (type(key) is int and -(2**63) <= key < 2**63):
        return key
    raise TypeError(f'{type(key).__name__} as a key')


def _refusal(name: str, file: str) -> UserError:
    return UserError(
        f'{file}: the pickle asks for {name!r:.80}, which is not part of a tensor; nothing of it was run. '
        'If you trust its origin, save its state dict as safetensors'
    )


def _brief(error: Exception) -> str:
    return ' '.join(str(error).split())[:80] or type(error).__name__
