"""From a `source` to a file: a path, a folder, `shipped:NAME`, or `hf://org/repo[@revision][/file]`."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from tl_jax.errors import UserError, nearest
from tl_jax.pretrained import orbax_folder, sharded

SHIPPED = Path(__file__).parent / 'shipped'
# What a folder or repository is likely to call its weights, best first.
WEIGHTS = (
    'model.safetensors',
    f'model.safetensors{sharded.SUFFIX}',
    'pytorch_model.bin',
    f'pytorch_model.bin{sharded.SUFFIX}',
    'flax_model.msgpack',
)


def locate(source: str | os.PathLike) -> Path:
    """Returns the local file that a source names, fetched from the hub into its cache, with its shards, if need be.

    Of a folder or repository it is the first of `WEIGHTS` that is there; an Orbax checkpoint is the folder itself.

    Raises:
      UserError: there is no such file, or the hub cannot be reached and the cache does not hold it.
    """
    source = os.fspath(source)
    if source.startswith('hf://'):
        # Imported here: only this kind of source needs it, and it takes half a second.
        from tl_jax.pretrained import hub

        return hub.fetch(source, WEIGHTS)
    if source.startswith('shipped:'):
        path = SHIPPED / f'{source.removeprefix("shipped:")}.safetensors'
        if not path.is_file() or path.parent != SHIPPED:
            known = [f'shipped:{file.stem}' for file in SHIPPED.glob('*.safetensors')]
            raise UserError(f"source '{source}': tl_jax ships no such weights; {nearest(source, known)}")
        return path
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"source '{source}': there is no such file; {_nearby(path)}")
    if path.is_dir():
        return _in_folder(path, source)
    if not path.is_file():
        raise UserError(f"source '{source}': not a regular file; name a file of weights; {_nearby(path / 'x')}")
    return path


def sha256(path: Path) -> str:
    """Returns the hexadecimal digest of what `locate` returned.

    That of an index and its shards, or of a folder, is the digest of what `sha256sum` prints for the files in order.
    """
    if path.is_dir():
        files = sorted(file.relative_to(path) for file in path.rglob('*') if file.is_file())
        return _joint_sha256(path, files)
    if path.name.endswith(sharded.SUFFIX):
        return _joint_sha256(path.parent, [Path(path.name), *(Path(shard.name) for shard in sharded.shard_paths(path))])
    return _file_sha256(path)


def _joint_sha256(folder: Path, files: Sequence[Path]) -> str:
    lines = ''.join(f'{_file_sha256(folder / file)}  {file.as_posix()}\n' for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _in_folder(folder: Path, source: str) -> Path:
    if orbax_folder.is_checkpoint(folder):
        return folder
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise UserError(
            f"source '{source}': a folder that is no Orbax checkpoint and has none of {', '.join(WEIGHTS)}; name a file "
            f'of weights; {_nearby(folder / "model")}'
        )
    return found


def _nearby(path: Path) -> str:
    """A suggestion for a missing path: the nearest file of its folder, or the nearest folder that exists."""
    folder = path.parent
    if not folder.is_dir():
        existing = next(parent for parent in folder.absolute().parents if parent.is_dir())
        return f'nor the folder {folder}; the nearest that exists is {existing}'
    return f'in {folder.absolute()}: {nearest(path.name, (file.name for file in folder.iterdir()))}'
