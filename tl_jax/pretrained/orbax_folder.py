"""Orbax checkpoints: a folder of `_METADATA`, which names the leaves, and their arrays, read by tensorstore leaf by leaf.

    NAME/_METADATA                          of StandardCheckpointer and PyTreeCheckpointer
    NAME/{default, state, …}/_METADATA      of CheckpointManager and other composites: the only item, or `state`
    WORKDIR/checkpoints/STEP/state          of our own runs; WORKDIR/frozen/STAGE holds what that stage left alone

Names are joined by '/'. Of our own runs the parameters and collections are read, under the names of `save_variables`.
"""

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorstore

from tl_jax.errors import UserError
from tl_jax.pretrained import strict_json
from tl_jax.pretrained.tensors import Contents, Tensor, listed

METADATA = '_METADATA'
MARKS = (METADATA, '_CHECKPOINT_METADATA')
MAX_BYTES = 100_000_000  # Of the metadata; one leaf takes about 300.
OWN = ('params/', 'collections/')  # Of a run's state; the rest is its optimizer, step and key.
ARRAYS = ('jax.Array', 'np.ndarray', 'scalar')


def is_checkpoint(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def read(folder: Path) -> Contents:
    """Reads the shape and dtype of every array; `array()` reads its values.

    Raises:
      UserError: the folder is no checkpoint, or holds several, or is damaged.
    """
    item = _item(folder)
    contents, stage = _read_item(item), _stage(folder)
    if stage is None or item.name != 'state':
        return contents
    frozen = folder.absolute().parents[1] / 'frozen' / str(stage) / 'state'
    every = dict(contents.tensors) | (dict(_read_item(frozen).tensors) if frozen.is_dir() else {})
    tensors = {name.removeprefix('collections/'): every[name] for name in every if name.startswith(OWN)}
    aside = sorted({name.split('/')[0] for name in every if not name.startswith(OWN)})
    return Contents(tensors, notes=(f"a run's checkpoint, of stage {stage}: left aside {listed(aside)}",))


def _stage(folder: Path) -> int | None:
    """The stage at which a run of ours saved this checkpoint; None if it is of another origin."""
    path = folder / 'about' / 'metadata'
    place = _json(path).get('place') if path.is_file() else None
    stage = place.get('stage') if type(place) is dict else None
    return stage if type(stage) is int else None


def _item(folder: Path) -> Path:
    """The folder itself or that of its items that holds arrays."""
    if (folder / METADATA).is_file():
        return folder
    items = sorted(path.parent for path in folder.glob(f'*/{METADATA}'))
    state = [item for item in items if item.name == 'state']
    if len(items) == 1 or state:
        return (state or items)[0]
    if items:
        raise UserError(f'{folder}: it holds several items; name one, such as {items[0]}')
    raise UserError(f'{folder}: no finished Orbax checkpoint of arrays: neither it nor a folder in it has {METADATA}')


def _read_item(folder: Path) -> Contents:
    about = _json(folder / METADATA)
    tree = about.get('tree_metadata')
    if type(tree) is not dict or not all(type(leaf) is dict for leaf in tree.values()):
        raise UserError(f"{folder}: its {METADATA} has no 'tree_metadata'; save it with Orbax 0.5 or later")
    try:
        keys = {
            tuple(str(part['key']) for part in leaf['key_metadata']): leaf['value_metadata'] for leaf in tree.values()
        }
        wanted = [key for key, value in keys.items() if value['value_type'] in ARRAYS]
        empty = {key for key, value in keys.items() if value.get('skip_deserialize')}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{folder}: its {METADATA} is damaged; fetch the checkpoint again') from None
    if len({'/'.join(key) for key in keys}) < len(tree):
        raise UserError(f'{folder}: two of its leaves have one name; it is refused')
    others = ['/'.join(key) for key in keys if key not in wanted and key not in empty]
    opening = {key: tensorstore.open(_spec(folder, key, about), open=True, read=True) for key in wanted}
    tensors = {'/'.join(key): _tensor(folder, '/'.join(key), future) for key, future in opening.items()}
    return Contents(tensors, notes=(f'left aside what is no tensor: {listed(others)}',) if others else ())


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f'{path}: there is no such file; fetch the whole checkpoint')
    with open(path, 'rb') as file:
        text = file.read(MAX_BYTES + 1)
    try:
        table = strict_json.parse(text[:MAX_BYTES])
    except ValueError as error:
        raise UserError(f'{path}: damaged ({error!s:.200}); fetch the checkpoint again') from None
    if type(table) is not dict:
        raise UserError(f'{path}: no table; fetch the checkpoint again')
    return table


def _spec(folder: Path, key: tuple[str, ...], about: Mapping[str, Any]) -> dict[str, Any]:
    """Tensorstore's description of where a leaf lies: by its dotted name in the one OCDBT store, or in a folder."""
    name = '.'.join(key)
    if name.startswith('/') or '..' in PurePosixPath(name).parts or not name.isprintable():
        raise UserError(f'{folder}: the name {name!r:.80} leaves the folder; it is refused')
    root = f'{folder.absolute()}/'
    if about.get('use_ocdbt'):
        store = {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': root}, 'path': f'{name}/'}
    else:
        store = {'driver': 'file', 'path': f'{root}{name}/'}
    # Older checkpoints omit chunks of zeros, so that a lost one cannot be told from them.
    complete = about.get('store_array_data_equal_to_fill_value') is True
    driver = 'zarr3' if about.get('use_zarr3') else 'zarr'
    return {'driver': driver, 'kvstore': store, 'fill_missing_data_reads': not complete}


def _tensor(folder: Path, name: str, opening: tensorstore.Future) -> Tensor:
    try:
        store = opening.result()
        shape, dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
        chunk = store.chunk_layout.write_chunk.shape or shape
    except Exception as error:  # Tensorstore raises half a dozen types on damaged files.
        raise _damaged(folder, name, error) from None
    # A chunk is decoded whole, so one that is larger than its array is a bomb.
    if dtype.hasobject or math.prod(chunk) > max(1, math.prod(shape)):
        raise UserError(f'{folder}: the array {name!r:.80} is stored as no weights are; it is refused')

    def array() -> np.ndarray:
        try:
            return np.asarray(store.read().result())
        except Exception as error:  # As above.
            raise _damaged(folder, name, error) from None

    return Tensor(shape, dtype, array)


def _damaged(folder: Path, name: str, error: Exception) -> UserError:
    why = ' '.join(str(error).split())
    return UserError(f'{folder}: the array {name!r:.80} is missing or damaged ({why:.150}); fetch the checkpoint again')
