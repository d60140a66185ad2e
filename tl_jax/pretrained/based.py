"""A file of what differs from a base: adapters and whatever else was trained, kilobytes beside the base's gigabytes.

It is our own format (`save_variables`) with fewer leaves, and its card says which base completes it:

    {"base": {"source": "hf://google-bert/bert-base-uncased", "sha256": "4a…", "ignore": []}, "model": {…}, …}
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.errors import FlaxError

from tl_jax import models
from tl_jax.errors import UserError
from tl_jax.pretrained.account import fill
from tl_jax.pretrained.sources import locate, sha256
from tl_jax.pretrained.tensors import Contents, Tensor, listed
from tl_jax.trees import flatten, unflatten

# Fields of a model's section that are not its network's.
LOADING = ('source', 'ignore', 'fresh', 'pick', 'peft', 'active', 'quantize', 'num_classes')


class Base(NamedTuple):
    """The weights that a file completes itself with.

    Attributes:
      source: where they are, as in `config.model.source`.
      sha256: of that file.
      ignore: regexes of its tensors that the network is without.
    """

    source: str
    sha256: str
    ignore: tuple[str, ...] = ()


def base_of(contents: Contents, path: Path) -> Base | None:
    """The base that a file names; None if it is whole.

    Raises:
      UserError: what it says of its base is no such thing.
    """
    match card_of(contents).get('base'):
        case None:
            return None
        case {'source': str() as source, 'sha256': str() as digest, 'ignore': [*ignore]} if all(
            type(rule) is str for rule in ignore
        ):
            return Base(source, digest, tuple(ignore))
    raise UserError(f'{path}: what it says of its base is damaged; fetch it again')


def card_of(contents: Contents) -> dict[str, Any]:
    """What a file of ours says of itself; {} of any other."""
    try:
        card = json.loads(contents.metadata.get('tl_jax', '{}'))
    except (ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}


def completed(contents: Contents, base: Base, path: Path, read: Callable[[Path], Contents]) -> Contents:
    """The whole network's tensors: the base's under our names, and over them the file's own.

    Args:
      contents: of the file.
      base: that it names.
      path: of the file.
      read: reads the base's.

    Raises:
      UserError: the base is not there, is another one than it was, or does not have what the file leaves to it.
    """
    try:
        below = locate(base.source)
    except UserError as error:
        raise UserError(f'{path}: holds what differs from {base.source}; {error}') from None
    digest = sha256(below)
    if digest != base.sha256:
        raise UserError(
            f'{path}: an adapter of another base: it belongs to {base.source} of sha256 {base.sha256}, and what is there now '
            f'has {digest}; put the former back'
        )
    found = read(below)
    if base_of(found, below):
        raise UserError(f'{path}: its base {base.source} is itself completed by a base; export that one with --merge')
    shapes, backbone = _network(card_of(contents), path)
    own = contents.tensors
    kept = [leaf for leaf in flatten(shapes) if leaf in own]
    filled, _ = fill(
        shapes,
        found,
        backbone=backbone,
        ignore=base.ignore,
        fresh=[re.escape(leaf.partition('/')[2]) for leaf in kept],
        source=base.source,
        sha256=digest,
    )
    lacking = [leaf for leaf, value in flatten(filled).items() if leaf not in own and not isinstance(value, jax.Array)]
    if lacking:
        raise UserError(f'{path}: neither it nor its base {base.source} has {listed(lacking)}; fetch it again')
    under = {leaf: _tensor(value) for leaf, value in flatten(filled).items() if leaf not in own}
    return contents._replace(tensors={**under, **own}, notes=(*contents.notes, f'over {base.source}'))


def differences(variables: Mapping[str, Any], filled: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of `variables` that `filled`, a base's, lacks or has another value of, bit by bit."""
    base = flatten(filled)
    return unflatten(
        {
            path: leaf
            for path, leaf in flatten(variables).items()
            if not isinstance(base.get(path), jax.Array | np.ndarray) or not np.array_equal(base[path], leaf)
        }
    )


def _network(card: Mapping[str, Any], path: Path) -> tuple[Any, Any]:
    """Shapes of the variables of the network that a card describes, without its adapters, and its backbone."""
    try:
        section, classes = card['model'], len(card['class_names'])
        fields = {name: value for name, value in section.items() if name not in LOADING}
        width = classes if section.get('num_classes') is None else section['num_classes']
        shape, dtype = card['input_shape'], np.dtype(card.get('input_dtype', 'float32'))
        if min(shape) < 1 or dtype.kind not in 'fiu':
            raise ValueError(f'an input of {shape}, {dtype}')
        inputs = jax.ShapeDtypeStruct((1, *shape), dtype)
        module = models.create_model(**fields, num_classes=width or None)
        init = lambda key, inputs: dict(module.init(key, inputs, train=False))
        shapes = jax.eval_shape(init, jax.random.key(0), inputs)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, FlaxError) as error:
        raise UserError(f'{path}: does not say which network it is of ({error!r:.120}); fetch it again') from None
    return shapes, module.backbone


def _tensor(value: Any) -> Tensor:
    return Tensor(value.shape, np.dtype(value.dtype), lambda: np.asarray(value))
