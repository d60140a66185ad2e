"""A finished run's network, for whatever comes after: evaluation, prediction, labels for another run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import data as data_lib
from tl_jax import mesh as mesh_lib
from tl_jax import pretrained, trees
from tl_jax.config import call
from tl_jax.errors import UserError
from tl_jax.evaluate import Predictions, create_eval_step, evaluate
from tl_jax.experiment import model_from, module_from
from tl_jax.objectives import inputs_of


class Trained(NamedTuple):
    """What a run's `model.safetensors` holds and says of itself.

    Attributes:
      predict: (variables, batch) -> endpoints.
      variables: of the network, on the host.
      class_names: of its logits.
      input_shape: of one example.
      eval_transform: that its examples went through.
    """

    predict: Callable
    variables: dict[str, Any]
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    eval_transform: Any


def trained(workdir: Path) -> Trained:
    """Loads a finished run's network.

    Raises:
      UserError: the run has not finished, or its file does not say what it holds.
    """
    path, _, about = _opened(workdir)
    if not about.get('classification', True):
        raise UserError(
            f'{workdir}: its objective gives other figures than a classification; they stand in {workdir}/summary.json'
        )
    names, shape = tuple(about['class_names']), tuple(about['input_shape'])
    fields, dtype = {**about['model'], 'source': str(path)}, jnp.dtype(about['dtype'])
    model = call(model_from, fields, 'config.model', classes=len(names), dtype=dtype, load=True)

    def predict(variables, batch):
        return model.apply(variables, inputs_of(batch), train=False)

    variables = model.init(jax.random.key(0), np.zeros((1, *shape), about.get('input_dtype', 'float32')))
    return Trained(predict, variables, names, shape, about['eval_transform'])


def network(workdir: Path) -> tuple[Any, dict[str, Any]]:
    """The Linen module of a finished run and all variables that it left; errors as `trained`."""
    _, contents, about = _opened(workdir)
    module = module_from(**about['model'], classes=len(about['class_names']), dtype=about['dtype'])
    return module, trees.unflatten({path: np.asarray(tensor.array()) for path, tensor in contents.tensors.items()})


def _opened(workdir: Path) -> tuple[Path, pretrained.Contents, dict[str, Any]]:
    """A run's `model.safetensors`: its path, its tensors, and what it says of itself."""
    path = workdir / 'model.safetensors'
    if not path.exists():
        raise UserError(f'{path}: there is no such file; is {workdir} a finished run?')
    contents = pretrained.read(path)
    try:
        return path, contents, json.loads(contents.metadata['tl_jax'])
    except (KeyError, ValueError):
        raise UserError(f'{path}: does not say which model it holds; it was not written by a run') from None


def predict(model: Trained, source: Any, transforms: Any, batch_size: int = 64) -> Predictions:
    """The network's predictions for every example of a source, labelled or not, in its order."""
    mesh = mesh_lib.create_mesh(data=1)
    batches = data_lib.eval_batches(source, batch_size=min(batch_size, source.length), transforms=transforms)
    batches = ({'label': np.zeros(len(b['mask']), np.int32), **b} for b in batches)
    placed = mesh_lib.put_everywhere(model.variables, mesh)
    return evaluate(create_eval_step(model.predict), placed, batches, mesh, predictions=True)[1]
