"""Sharded weights: an index, `model.safetensors.index.json` or `pytorch_model.bin.index.json`, and its shards beside it.

{"metadata": {"total_size": 13476835328}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors", …}}
"""

import math
from collections.abc import Mapping
from pathlib import Path

from tl_jax.errors import UserError
from tl_jax.pretrained import safetensors_file, strict_json, torch_file
from tl_jax.pretrained.tensors import Contents, listed

READERS = {'.safetensors': safetensors_file.read, '.bin': torch_file.read}
SUFFIX = '.index.json'
MAX_BYTES = 100_000_000  # Of an index; one tensor takes about 100.


def read_index(path: Path) -> Contents:
    """Reads the headers of every shard; `array()` is a view of its shard.

    Raises:
      UserError: the index is malformed, a shard is missing, damaged or outside the folder, or lacks one of its tensors.
    """
    shard_of = weight_map(path)
    shards = {shard: _read_shard(path, shard) for shard in sorted(set(shard_of.values()))}
    lacking = [name for name, shard in shard_of.items() if name not in shards[shard].tensors]
    if lacking:
        shard = shard_of[lacking[0]]
        raise UserError(
            f'{path}: its shard {shard!r:.80} lacks {listed(lacking)}; fetch the index and the shards again'
        )
    tensors = {name: shards[shard].tensors[name] for name, shard in shard_of.items()}
    spare = [name for shard, contents in shards.items() for name in contents.tensors if shard_of.get(name) != shard]
    size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    notes = [f'{len(tensors)} tensors, {size:,} bytes, of {len(shards)} shards']
    notes += [f'left aside what the index does not list: {listed(spare)}'] if spare else []
    notes += [f'{shard}: {note}' for shard, contents in shards.items() for note in contents.notes]
    return Contents(tensors, next(iter(shards.values())).metadata, tuple(notes))


def weight_map(path: Path) -> Mapping[str, str]:
    """Returns `{tensor: shard}`; every shard is a plain file name with a suffix that we read."""
    with open(path, 'rb') as file:
        text = file.read(MAX_BYTES + 1)
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f'more than {MAX_BYTES:,} bytes')
        index = strict_json.parse(text)
    except ValueError as error:
        raise UserError(f'{path}: a damaged index ({error!s:.200}); fetch the file again') from None
    table = index.get('weight_map') if type(index) is dict else None
    if type(table) is not dict or not table or not all(type(shard) is str for shard in table.values()):
        raise UserError(f"{path}: an index without a 'weight_map' of tensors to shards; fetch the file again")
    for shard in sorted(set(table.values())):
        if not shard.isprintable() or '/' in shard or '\\' in shard or shard.startswith('.'):
            raise UserError(f'{path}: its shard {shard!r:.80} is not the name of a file beside it; it is refused')
        if Path(shard).suffix not in READERS:
            raise UserError(f'{path}: no reader for its shard {shard!r:.80}; known: {", ".join(READERS)}')
    return table


def shard_paths(path: Path) -> list[Path]:
    """The shards of an index, by name. Raises UserError as `weight_map` does, or where one is missing or lies outside."""
    return [_shard_path(path, shard) for shard in sorted(set(weight_map(path).values()))]


def _read_shard(index: Path, shard: str) -> Contents:
    path = _shard_path(index, shard)
    try:
        return READERS[path.suffix](path)
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); check its permissions') from None


def _shard_path(index: Path, shard: str) -> Path:
    path = index.parent / shard
    if not path.is_file():
        raise UserError(f'{index}: its shard {shard!r:.80} is missing from {index.parent.absolute()}; fetch it too')
    if not any(path.resolve().is_relative_to(root) for root in _roots(index.parent.absolute())):
        raise UserError(f'{index}: its shard {shard!r:.80} is a link out of the folder; put the file itself there')
    return path


def _roots(folder: Path) -> list[Path]:
    """Where the shards of a folder may lie: in it, or if it is a snapshot of the hub's cache in the blobs it links to.

    CACHE/models--ORG--NET/snapshots/REVISION/… links to CACHE/models--ORG--NET/blobs, and that to CACHE/blobs.
    """
    caches = [parent for parent in folder.parents if parent.name.startswith('models--')]
    return [folder.resolve(), *(root.resolve() / 'blobs' for repo in caches for root in (repo, repo.parent))]
