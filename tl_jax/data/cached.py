"""Arrays on disk under the hash of what they were computed from: written whole or not at all, verified when read."""

import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from tl_jax.data.base import Source

DIGEST = hashlib.sha256().digest_size


def folder() -> Path:
    """Where every run of this user finds what another has computed: `$XDG_CACHE_HOME/tl_jax/features`; safe to delete."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'tl_jax' / 'features'


def content_hash(parts: Iterable[str | np.ndarray]) -> str:
    """32 hex digits of the values, shapes and dtypes, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else f'|{part.dtype.str}{part.shape}|'.encode())
        if not isinstance(part, str):
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
    return digest.hexdigest()[: 2 * 16]


def write(path: Path, array: np.ndarray) -> None:
    """Writes an array as npy with its sha256 behind it."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    content = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    partial.write_bytes(content + hashlib.sha256(content).digest())
    os.replace(partial, path)


def read(path: Path) -> np.ndarray | None:
    """The array that `write` stored; None where there is none, or a damaged one."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    content, digest = stored[:-DIGEST], stored[-DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        return None
    return np.load(io.BytesIO(content), allow_pickle=False)


def column_source(source: Source, columns: Mapping[str, np.ndarray]) -> Source:
    """The examples of a source with the fields of `columns`, [N, …] each, in place of their own."""
    rows = list(columns.items())
    get = lambda i: {field: column[i] for field, column in rows}
    return source._replace(get=get, lengths=None, buckets=())
