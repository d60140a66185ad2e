"""Full-size networks by name and shape alone: what the origin's own network states, and what our map writes, agree."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity_harness as harness
import pytest

torch = pytest.importorskip('torch')
import torch_side  # noqa: E402, F401

from tl_jax.models import create_model  # noqa: E402
from tl_jax.pretrained import maps  # noqa: E402
from tl_jax.pretrained.export import foreign_tensors  # noqa: E402
from tl_jax.trees import flatten  # noqa: E402


def sizes():
    """(model, num_classes, fields, origin, builder[, inputs[, regexes of names that only they have]])."""
    for file in sorted(harness.HERE.glob('cases_*.py')):
        yield from getattr(importlib.import_module(file.stem), 'SIZES', ())


@pytest.mark.parametrize('size', sizes(), ids=lambda size: f'{size[0]}-{size[3]}')
def test_names_and_shapes(size):
    model, num_classes, fields, origin, build, *rest = size
    inputs = rest[0] if rest else np.zeros((1, 224, 224, 3), np.float32)
    absent = (*(rest[1] if len(rest) > 1 else ()), r'(.*\.)?num_batches_tracked')
    with torch.device('meta'):
        theirs = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    theirs = {n: s for n, s in theirs.items() if not any(re.fullmatch(regex, n) for regex in absent)}
    module = create_model(model, num_classes=num_classes, **fields)
    leaves = flatten(jax.eval_shape(module.init, jax.random.key(0), jax.tree.map(jnp.asarray, inputs)))
    # Arrays of the right shape that take no memory.
    blank = {path: np.broadcast_to(np.zeros((), np.bool_), leaf.shape) for path, leaf in leaves.items()}
    ours = {n: t.shape for n, t in foreign_tensors(blank, maps.name_map(origin, module.backbone)).items()}
    assert ours == theirs
