"""Pretrained weights: any supported file into our variables, with every tensor and every leaf accounted for."""

import contextlib
import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tl_jax import models
from tl_jax.errors import UserError, nearest
from tl_jax.pretrained import (
    based,
    keras_file,
    maps,
    msgpack_file,
    names,
    npz_file,
    orbax_folder,
    safetensors_file,
    sharded,
    strict_json,
    tfjs_file,
    tflite_file,
    torch_file,
)
from tl_jax.pretrained.account import Account, fill
from tl_jax.pretrained.based import LOADING, Base, card_of, differences
from tl_jax.pretrained.export import export_pretrained
from tl_jax.pretrained.safetensors_file import save_variables
from tl_jax.pretrained.sources import locate, sha256
from tl_jax.pretrained.tensors import Contents, Tensor
from tl_jax.trees import flatten, unflatten

__all__ = [
    'LOADING',
    'Account',
    'Base',
    'Contents',
    'Tensor',
    'card_of',
    'differences',
    'export_pretrained',
    'fill',
    'fill_model',
    'list_pretrained',
    'load_pretrained',
    'locate',
    'overlay',
    'read',
    'resolved',
    'root_of',
    'save_variables',
    'whole',
]

MAX_CONFIG_BYTES = 10_000_000
# By the end of the name; an Orbax checkpoint is a folder, and needs none.
READERS = {
    '.safetensors': safetensors_file.read,
    '.pth': torch_file.read,
    '.pt': torch_file.read,
    '.bin': torch_file.read,
    '.th': torch_file.read,
    sharded.SUFFIX: sharded.read_index,
    '.npz': npz_file.read,
    '.h5': keras_file.read,
    '.hdf5': keras_file.read,
    '.keras': keras_file.read,
    'model.json': tfjs_file.read,
    '.tflite': tflite_file.read,
    '.msgpack': msgpack_file.read,
}


def read(path: str | os.PathLike) -> Contents:
    """Reads a file of weights, known by its suffix, or a checkpoint's folder: names, shapes and dtypes now, values on demand.

    Raises:
      UserError: it cannot be read, is damaged, or asks for anything but tensors.
    """
    path = Path(path)
    reader = next((reader for end, reader in READERS.items() if path.name.endswith(end)), None)
    if path.is_dir():
        reader = orbax_folder.read
    if reader is None:
        raise UserError(f"{path}: no reader for the suffix '{path.suffix}'; known: {', '.join(READERS)}")
    try:
        return reader(path)
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); check the path and its permissions') from None


def overlay(
    source: str | os.PathLike,
    variables: Mapping[str, Any],
    *,
    backbone: nn.Module | None = None,
    ignore: Sequence[str] = (),
    fresh: Sequence[str] = (),
    pick: Sequence[int] = (),
) -> tuple[dict[str, Any], Account]:
    """Fills a model's variables from a source; rules and errors as in `fill`, sources as in `load_pretrained`."""
    opened = _open(source)
    return fill(
        variables,
        opened.contents,
        backbone=backbone,
        ignore=ignore,
        fresh=fresh,
        pick=pick,
        source=opened.source,
        sha256=opened.sha256,
    )


def fill_model(
    name: str,
    source: str | os.PathLike,
    variables: Mapping[str, Any],
    *,
    backbone: nn.Module | None = None,
    ignore: Sequence[str] = (),
    fresh: Sequence[str] = (),
    pick: Sequence[int] = (),
) -> dict[str, Any]:
    """Overlays a source on a model's freshly initialised variables, and prints the account.

    Args:
      name: of the model, for the account.
      source: as in `load_pretrained`.
      variables: `{'params': {'backbone': …, 'head': …}, 'batch_stats': …}`; fresh leaves keep these values.
      backbone: the module of that role; its family's name maps are then the only ones looked at.
      ignore: regexes of tensors, by the file's names, that are not wanted.
      fresh: regexes of leaves, `role/module/…/leaf`, that keep the value they have.
      pick: blocks of the source that become the model's.
    """
    filled, account = overlay(source, variables, backbone=backbone, ignore=ignore, fresh=fresh, pick=pick)
    print(f'{name}: {account}')
    return filled


def load_pretrained(
    name: str,
    source: str | os.PathLike | None = None,
    num_classes: int | None = None,
    *,
    ignore: Sequence[str] = (),
    fresh: Sequence[str] = (),
    pick: Sequence[int] = (),
    key: jax.Array | None = None,
    image_shape: Sequence[int] | None = None,
    inputs: Any = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Creates a model's variables from pretrained weights, and prints the account of both.

    Args:
      name: of the model, in `tl_jax.models.list_models()`, or of a checkpoint, in `list_pretrained()`.
      source: a path, `hf://org/repo[@revision][/file]`, or `shipped:NAME`; the checkpoint's own unless given.
      num_classes: of the head; where it is not the file's the head is fresh. None keeps the file's head, if it has one.
      ignore: regexes of tensors, by the file's names, that are not wanted.
      fresh: regexes of leaves, `role/module/…/leaf`, that keep their random start.
      pick: blocks of the source, by number, that become the model's: `pick=[2, 4], depth=2`. All unless given.
      key: of that random start; `jax.random.key(0)` unless given.
      image_shape: height, width, channels to initialise for; the file's own if it says, else 32×32×3.
      inputs: to initialise with, of models that take no images: tokens [1, length], say. Values do not matter.
      **overrides: the model's own fields.

    Returns:
      `{'params': {'backbone': …, 'head': …}, 'batch_stats': …}`.

    Raises:
      UserError: as `fill`, `read` and `locate` do.
    """
    given = {'source': source} if source is not None else {}
    overrides = resolved({'name': name, **given, **overrides})
    name, source = overrides.pop('name'), overrides.pop('source', None)
    if source is None:
        raise UserError(
            f"source: '{name}' is an architecture; give the path of its weights, or a name of list_pretrained()"
        )
    opened = _open(source)
    if num_classes is None:
        num_classes = _classes(
            opened, models.create_model(name, **{k: v for k, v in overrides.items() if k != 'head'}).backbone
        )
    if image_shape is None:
        image_shape = _stated_shape(opened.contents.metadata) or (32, 32, 3)
    module = models.create_model(name, num_classes=num_classes, **overrides)
    key = jax.random.key(0) if key is None else key
    inputs = jnp.zeros((1, *image_shape)) if inputs is None else inputs

    def start(key):
        return dict(module.init(key, inputs, train=False))

    variables, account = fill(
        jax.eval_shape(start, key),
        opened.contents,
        backbone=module.backbone,
        ignore=ignore,
        fresh=fresh,
        pick=pick,
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
    return _Opened(os.fspath(source), whole(path), sha256(path))


def whole(path: str | os.PathLike) -> Contents:
    """Reads a file of weights as `read` does, and where it holds but what differs from a base, that base below it.

    Raises:
      UserError: as `read` does; the base is not there, or another one than it was.
    """
    path = Path(path)
    contents = read(path)
    base = based.base_of(contents, path)
    return based.completed(contents, base, path, read) if base else contents


def root_of(source: str | os.PathLike, ignore: Sequence[str], fresh: Sequence[str]) -> tuple[Base, list[str]]:
    """The file of whole weights that a source is, or is completed by, and the rules of the leaves that it does not give."""
    path = locate(source)
    contents = read(path)
    base = based.base_of(contents, path)
    if base is None:
        return Base(os.fspath(source), sha256(path), tuple(ignore)), list(fresh)
    return base, [re.escape(name.partition('/')[2]) for name in contents.tensors]


def class_names(source: str | os.PathLike) -> tuple[str, ...]:
    """The classes of a run's network, as its file names them; none where it does not, or only numbers them."""
    names = tuple(map(str, based.card_of(read(locate(source))).get('class_names') or ()))
    return () if names == tuple(map(str, range(len(names)))) else names


def resolved(section: Mapping[str, Any]) -> dict[str, Any]:
    """A model's section with the names of checkpoints and the sizes that stand beside their weights put in.

    Args:
      section: `name`, perhaps `source`, and fields of the model. A name of the catalogue, such as
        'timm/resnet50.a1_in1k', stands for its architecture, source and fields; where the folder of the source has the
        `config.json` of Hugging Face, that states the sizes. What the section itself states counts before either.

    Raises:
      UserError: no such checkpoint, or `config.json` is damaged or asks for what the family cannot express.
    """
    fields = dict(section)
    for field, kinds in (('name', str), ('source', str | os.PathLike)):
        if fields.get(field) is not None and not isinstance(fields[field], kinds):
            raise UserError(f'model.{field}: must be a string, not {fields[field]!r}')
    name = fields.get('name')
    if name is None:
        raise UserError("model.name: is missing; name an architecture or a checkpoint, such as name='resnet18'")
    if name in maps.CATALOGUE:
        entry = maps.CATALOGUE[name]
        fields = {'source': entry.source, **entry.fields, **fields, 'name': entry.model}
    elif name not in models.MODELS and ('/' in name or '.' in name):
        # A name without its organisation is nearest to itself with one.
        known = [each for each in maps.CATALOGUE if each.endswith(f'/{name}')] or maps.CATALOGUE
        raise UserError(f"model.name: no checkpoint '{name}' in the catalogue; {nearest(name, known)}")
    if fields.get('source'):
        fields = _stated_fields(fields['name'], fields['source']) | fields
    return fields


def _stated_fields(name: str, source: str | os.PathLike) -> dict[str, Any]:
    """The sizes of a network that the `config.json` beside its weights states, as fields of the model; {} without one."""
    if not os.fspath(source).startswith(('hf://', 'shipped:')) and not Path(source).expanduser().exists():
        return {}  # the load will say so; a config of weights that are yet to be made can still be built
    path = locate(source).parent / 'config.json'
    family = maps.family_of(models.create_model(name).backbone)
    if family is None or not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f'{path}: has {path.stat().st_size:,} bytes, more than any network needs to be described')
        config = strict_json.parse(path.read_bytes())
        # Hugging Face's files say what they describe; others, such as a run's own, are none of ours.
        stated = [config[key] for key in ('model_type', 'architecture') if key in config]
        fields = family.fields(config) if stated else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(f'{path}: a damaged description of a network ({error!r:.200}); fetch it again') from None
    if fields is None:
        raise UserError(
            f"{path}: describes {stated[0]!r:.80}, which '{name}' ({family.module.__name__}) is not and would not compute; "
            'choose its own model, or put the weights where that file is not'
        )
    return fields


def list_pretrained(pattern: str = '*') -> list[str]:
    """The checkpoints of the catalogue whose name matches, such as 'timm/vit*'."""
    return sorted(fnmatch.filter(maps.CATALOGUE, pattern))


def _classes(opened: _Opened, backbone: nn.Module) -> int | None:
    """The width of the file's head; None if it has none."""
    short, _ = names.without_prefix(opened.contents.tensors)
    name_map = maps.choose(short.values(), opened.source, backbone)
    for name, tensor in opened.contents.tensors.items():
        found = names.target(name_map, short[name])
        if found and found.paths == ('params/head/kernel',):
            # [in, out] in our layout, found on an array that has no memory of its own.
            with contextlib.suppress(ValueError):  # of a tensor that is no such kernel, which the account will refuse
                _, width = found.layout.read(np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape)).shape
                return width
    return None


def _stated_shape(metadata: Mapping[str, str]) -> tuple[int, ...] | None:
    """The `image_shape` that `save_variables` was given, such as '(28, 28, 1)'."""
    numbers = re.findall(r'\d+', metadata.get('image_shape', ''))
    return tuple(map(int, numbers)) or None
