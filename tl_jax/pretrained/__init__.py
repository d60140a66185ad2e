"""Pretrained weights: any supported file into our variables, with every tensor and every leaf accounted for."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tl_jax import models
from tl_jax.errors import UserError
from tl_jax.pretrained import names, npz_file, safetensors_file, torch_file
from tl_jax.pretrained.account import Account, fill
from tl_jax.pretrained.safetensors_file import save_variables
from tl_jax.pretrained.sources import locate
from tl_jax.pretrained.tensors import Contents, Tensor
from tl_jax.trees import flatten, unflatten

__all__ = [
    'Account',
    'Contents',
    'Tensor',
    'fill',
    'fill_model',
    'load_pretrained',
    'overlay',
    'read',
    'save_variables',
]

READERS = {
    '.safetensors': safetensors_file.read,
    '.pth': torch_file.read,
    '.pt': torch_file.read,
    '.bin': torch_file.read,
    '.th': torch_file.read,
    '.npz': npz_file.read,
}


def read(path: str | os.PathLike) -> Contents:
    """Reads a file of weights by its suffix: names, shapes and dtypes now, values on demand.

    Raises:
      UserError: it cannot be read, is damaged, or asks for anything but tensors.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise UserError(f"{path}: no reader for the suffix '{path.suffix}'; known: {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path)
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); check the path and its permissions') from None


def overlay(
    source: str | os.PathLike,
    variables: Mapping[str, Any],
    *,
    ignore: Sequence[str] = (),
    fresh: Sequence[str] = (),
) -> tuple[dict[str, Any], Account]:
    """Fills a model's variables from a source; rules and errors as in `fill`, sources as in `load_pretrained`."""
    opened = _open(source)
    return fill(variables, opened.contents, ignore=ignore, fresh=fresh, source=opened.source, sha256=opened.sha256)


def fill_model(
    name: str,
    source: str | os.PathLike,
    variables: Mapping[str, Any],
    *,
    ignore: Sequence[str] = (),
    fresh: Sequence[str] = (),
) -> dict[str, Any]:
    """Overlays a source on a model's freshly initialised variables, and prints the account.

    Args:
      name: of the model, for the account.
      source: as in `load_pretrained`.
      variables: `{'params': {'backbone': …, 'head': …}, 'batch_stats': …}`; fresh leaves keep these values.
      ignore: regexes of tensors, by the file's names, that are not wanted.
      fresh: regexes of leaves, `role/module/…/leaf`, that keep the value they have.
    """
    filled, account = overlay(source, variables, ignore=ignore, fresh=fresh)
    print(f'{name}: {account}')
    return filled


def load_pretrained(
    name: str,
    source: str | os.PathLike,
    num_classes: int | None = None,
    *,
    ignore: Sequence[str] = (),
    fresh: Sequence[str] = (),
    key: jax.Array | None = None,
    image_shape: Sequence[int] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Creates a model's variables from pretrained weights, and prints the account of both.

    Args:
      name: of the model, in `tl_jax.models.list_models()`.
      source: a path, `hf://org/repo[@revision][/file]`, or `shipped:NAME`.
      num_classes: of the head; where it is not the file's the head is fresh. None keeps the file's head, if it has one.
      ignore: regexes of tensors, by the file's names, that are not wanted.
      fresh: regexes of leaves, `role/module/…/leaf`, that keep their random start.
      key: of that random start; `jax.random.key(0)` unless given.
      image_shape: height, width, channels to initialise for; the file's own if it says, else 32×32×3.
      **overrides: the model's own fields.

    Returns:
      `{'params': {'backbone': …, 'head': …}, 'batch_stats': …}`.

    Raises:
      UserError: as `fill`, `read` and `locate` do.
    """
    opened = _open(source)
    if num_classes is None:
        num_classes = _classes(opened)
    if image_shape is None:
        image_shape = _stated_shape(opened.contents.metadata) or (32, 32, 3)
    module = models.create_model(name, num_classes=num_classes, **overrides)
    key = jax.random.key(0) if key is None else key

    def start(key):
        return dict(module.init(key, jnp.zeros((1, *image_shape)), train=False))

    variables, account = fill(
        jax.eval_shape(start, key),
        opened.contents,
        ignore=ignore,
        fresh=fresh,
        source=opened.source,
        sha256=opened.sha256,
    )
    print(f'{name}: {account}')
    if not account.fresh:
        return variables
    # Only what stays fresh leaves the compiled function, so XLA drops the rest of the initialisation.
    begun = jax.jit(lambda key: {path: leaf for path, leaf in flatten(start(key)).items() if path in account.fresh})(
        key
    )
    return unflatten(flatten(variables) | begun)


class _Opened(NamedTuple):
    source: str
    contents: Contents
    sha256: str


def _open(source: str | os.PathLike) -> _Opened:
    path = locate(source)
    contents = read(path)
    with open(path, 'rb') as file:
        return _Opened(os.fspath(source), contents, hashlib.file_digest(file, 'sha256').hexdigest())


def _classes(opened: _Opened) -> int | None:
    """The width of the file's head; None if it has none."""
    short, _ = names.without_prefix(opened.contents.tensors)
    name_map = names.choose(short.values(), opened.source)
    for name, tensor in opened.contents.tensors.items():
        found = names.target(name_map, short[name])
        if found and found.path == 'params/head/bias' and len(tensor.shape) == 1:
            return tensor.shape[0]
    return None


def _stated_shape(metadata: Mapping[str, str]) -> tuple[int, ...] | None:
    """The `image_shape` that `save_variables` was given, such as '(28, 28, 1)'."""
    numbers = re.findall(r'\d+', metadata.get('image_shape', ''))
    return tuple(map(int, numbers)) or None
