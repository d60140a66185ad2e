"""Back to where the weights came from: our variables as a safetensors file under an origin's names."""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tl_jax.errors import UserError
from tl_jax.models import Classifier, heads
from tl_jax.pretrained import maps, names
from tl_jax.pretrained.names import NameMap
from tl_jax.pretrained.safetensors_file import save_tensors
from tl_jax.pretrained.tensors import listed
from tl_jax.trees import flatten


def export_pretrained(
    path: str | os.PathLike,
    variables: Mapping[str, Any],
    module: Classifier,
    origin: str,
    *,
    dtype: Any = None,
    metadata: Mapping[str, Any] = {},
) -> list[str]:
    """Writes a network so that the origin's own library loads the file.

    Args:
      path: ends in `.safetensors`; written at once or not at all.
      variables: `{'params': {'backbone': …, 'head': …}, 'batch_stats': …}`.
      module: the network, as `create_model` gives it.
      origin: whose names to write: 'torchvision', 'timm', 'transformers', …, or 'tl_jax'.
      dtype: a floating type for all tensors; each leaf's own unless given.
      metadata: strings for the header.

    Returns:
      The names written.

    Raises:
      UserError: the family has no such origin, or the origin no place for a leaf, or it would compute something else.
    """
    if (
        origin != 'tl_jax'
        and 'head' in variables['params']
        and not isinstance(module.head, heads.Linear | heads.Distilled)
    ):
        raise UserError(
            f"origin: {origin!r} has linear heads, and this is {type(module.head).__name__}; export to 'tl_jax', or train a "
            "head='linear'"
        )
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f'dtype: must be a floating type, not {dtype}')
    tensors = foreign_tensors(flatten(variables), maps.name_map(origin, module.backbone))
    if dtype is not None:
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save_tensors(path, tensors, {'format': 'pt'} | dict(metadata))
    return list(tensors)


def foreign_tensors(leaves: Mapping[str, Any], name_map: NameMap) -> dict[str, np.ndarray]:
    """Returns `{their name: tensor in their layout}` of flat variables `{path: leaf}`; errors as `export_pretrained`."""
    if name_map.refuses_head and any(path.startswith('params/head/') for path in leaves):
        raise UserError(
            f'origin: {name_map.origin} has its heads on other features than {name_map.refuses_head} gives; the backbone '
            "alone is the same there: export it without the head, or choose 'tl_jax'"
        )
    tensors: dict[str, np.ndarray] = {}
    homeless = []
    for path in leaves:
        try:
            found = names.foreign(name_map, path)
        except KeyError:
            raise UserError(
                f'origin: {name_map.origin!r} names cannot be written, only read; export to another'
            ) from None
        if found is None or any(each not in leaves for each in found[1].paths):
            homeless.append(path)
        elif found[0] not in tensors:
            name, (paths, layout) = found
            tensors[name] = layout.write(*(np.asarray(leaves[each]) for each in paths))
    if homeless:
        raise UserError(
            f'origin: {name_map.origin!r} has no place for {len(homeless)} leaves: {listed(homeless)}; export what it '
            "knows, or choose 'tl_jax'"
        )
    return tensors
