"""TensorFlow.js weights (`model.json` and the shards beside it), of layers models and of graph models.

The manifest is a list of groups. A group's shards, one after another, are the bytes of its tensors in their order.
A quantised tensor is stored as uint8 or uint16, value = q · scale + min, or as float16.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from tl_jax.errors import UserError
from tl_jax.pretrained.tensors import Contents, Tensor

MAX_JSON = 1 << 28  # Bytes; a graph model of a thousand nodes has 2 ** 20.
DTYPES = {name: np.dtype(name).newbyteorder('<') for name in ('float32', 'float16', 'int32', 'uint8', 'bool')}
STORED = {name: np.dtype(name).newbyteorder('<') for name in ('uint8', 'uint16', 'float16')}
VALUES = (np.dtype(np.float32), np.dtype(np.int32))  # What may be quantised.


class Shard(NamedTuple):
    """A file of weights, and which bytes of its group it holds."""

    path: Path
    start: int
    size: int


class Weight(NamedTuple):
    """A tensor of the manifest: the dtype it has, the dtype it is stored as, and for integers of that q · scale + min."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stored: np.dtype
    scale: float = 1.0
    min: float = 0.0

    @property
    def size(self) -> int:
        """Bytes in the shards."""
        return math.prod((*self.shape, self.stored.itemsize))


def read(path: Path) -> Contents:
    """Describes the tensors of the manifest, sizes checked against the shards; `array()` reads their values.

    Raises:
      UserError: the manifest or a shard is damaged, missing or outside of the model's folder.
    """
    model = _json(path)
    groups = model.get('weightsManifest')
    if not isinstance(groups, list):
        raise UserError(f'{path}: it has no weightsManifest; convert the model with tensorflowjs_converter')
    tensors, dequantised = {}, 0
    for group in groups:
        weights = [_weight(spec, path) for spec in _list(group, 'weights', path)]
        shards = tuple(_shards(_list(group, 'paths', path), path))
        _check_sizes(weights, shards, path)
        start = 0
        for weight in weights:
            if weight.name in tensors:
                raise UserError(f'{path}: two tensors are called {weight.name!r:.80}; convert the model again')
            tensors[weight.name] = _tensor(weight, shards, start)
            dequantised += weight.stored != weight.dtype
            start += weight.size
    notes = (f'dequantised {dequantised} weights, q · scale + min or from float16',) if dequantised else ()
    return Contents(tensors, _metadata(model), notes)


def _json(path: Path) -> Mapping[str, Any]:
    if path.stat().st_size > MAX_JSON:
        raise UserError(f'{path}: {path.stat().st_size} bytes of JSON are more than any model needs; it is refused')
    try:
        model = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        why = ' '.join(str(error).split())
        raise UserError(f'{path}: damaged or truncated JSON ({why:.100}); fetch the file again') from None
    if not isinstance(model, dict):
        raise UserError(f'{path}: JSON, but not the model.json of TensorFlow.js')
    return model


def _list(group: Any, field: str, path: Path) -> list:
    value = group.get(field) if isinstance(group, dict) else None
    if not isinstance(value, list):
        raise UserError(f'{path}: a group of its weightsManifest has no list of {field}; convert the model again')
    return value


def _shards(names: Sequence[Any], path: Path) -> Iterator[Shard]:
    """The shards of a group. Links in the folder are the user's own (the hub's cache is made of them); paths are not."""
    start = 0
    for name in names:
        shard = path.parent / str(name)
        if not isinstance(name, str) or not _is_inside(name):
            raise UserError(f'{path}: its shard {name!r:.80} is outside of the folder of model.json; it is refused')
        if not shard.is_file():
            raise UserError(f'{path}: its shard {name!r:.80} is missing; put it into {path.parent}')
        size = shard.stat().st_size
        yield Shard(shard, start, size)
        start += size


def _is_inside(name: str) -> bool:
    return (
        bool(name)
        and not set(name) & set('\\:\0')
        and not name.startswith('/')
        and '..' not in PurePosixPath(name).parts
    )


def _weight(spec: Any, path: Path) -> Weight:
    """Checks one entry of the manifest."""
    spec = spec if isinstance(spec, dict) else {}
    name, shape, dtype, quantization = (spec.get(key) for key in ('name', 'shape', 'dtype', 'quantization'))
    if not isinstance(name, str):
        raise UserError(f'{path}: a tensor of its weightsManifest has no name; convert the model again')
    tensor = f'{path}: the tensor {name!r:.80}'
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise UserError(f'{tensor} has the shape {shape!s:.40}; convert the model again')
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f'{tensor} is of dtype {dtype!r:.40}; known: {", ".join(DTYPES)}')
    plain = Weight(name, tuple(shape), DTYPES[dtype], DTYPES[dtype])
    if quantization is None:
        return plain
    stored = quantization.get('dtype') if isinstance(quantization, dict) else None
    if not isinstance(stored, str) or stored not in STORED or plain.dtype not in VALUES:
        raise UserError(
            f'{tensor}, {dtype}, is quantised as {stored!r:.40}; known: float32 or int32 as {", ".join(STORED)}'
        )
    if stored == 'float16':
        return plain._replace(stored=STORED[stored])
    scale, least = quantization.get('scale'), quantization.get('min')
    if not all(type(x) in (int, float) and math.isfinite(x) for x in (scale, least)):
        raise UserError(f'{tensor} is quantised without a finite scale and min; convert the model again')
    return plain._replace(stored=STORED[stored], scale=float(scale), min=float(least))


def _check_sizes(weights: Sequence[Weight], shards: Sequence[Shard], path: Path) -> None:
    needed, there = sum(weight.size for weight in weights), sum(shard.size for shard in shards)
    if needed == there:
        return
    end = 0
    for weight in weights:
        end += weight.size
        if end > there:
            raise UserError(
                f'{path}: the tensor {weight.name!r:.80} ends at byte {end}, its shards have {there}; '
                f'fetch {shards[-1].path.name if shards else "them"!r:.80} again'
            )
    raise UserError(f'{path}: its tensors take {needed} bytes, their shards have {there}; fetch the files again')


def _tensor(weight: Weight, shards: Sequence[Shard], start: int) -> Tensor:
    dtype = weight.dtype.newbyteorder('=')

    def array() -> np.ndarray:
        values = np.frombuffer(_bytes(shards, start, weight.size), weight.stored).reshape(weight.shape)
        if weight.stored == weight.dtype or weight.stored.kind == 'f':
            return values.astype(dtype, copy=False)
        # As TensorFlow.js: in double precision, then rounded.
        real = values * weight.scale + weight.min
        return (np.floor(real + 0.5) if dtype.kind == 'i' else real).astype(dtype)

    return Tensor(weight.shape, dtype, array)


def _bytes(shards: Sequence[Shard], start: int, size: int) -> bytearray:
    """Bytes of a group, which may lie in several shards."""
    out = bytearray(size)
    view = memoryview(out)
    for shard in shards:
        first, last = max(start, shard.start), min(start + size, shard.start + shard.size)
        if first >= last:
            continue
        with open(shard.path, 'rb') as file:
            file.seek(first - shard.start)
            if file.readinto(view[first - start : last - start]) != last - first:
                raise UserError(f'{shard.path}: it has become shorter since it was opened; fetch it again')
    return out


def _metadata(model: Mapping[str, Any]) -> dict[str, str]:
    """Who made it, and the shape of one image if its first layer states it."""
    stated = {key: model[key] for key in ('format', 'generatedBy', 'convertedBy') if isinstance(model.get(key), str)}
    try:
        config = model['modelTopology']['model_config']['config']
        shape = (config if isinstance(config, list) else config['layers'])[0]['config']['batch_input_shape'][1:]
    except (KeyError, IndexError, TypeError):  # Graph models, and those whose topology lies elsewhere.
        return stated
    if len(shape) == 3 and all(type(n) is int and n > 0 for n in shape):
        stated['image_shape'] = str(tuple(shape))
    return stated
