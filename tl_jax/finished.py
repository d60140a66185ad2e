"""A finished run's network, for whatever comes after: evaluation, prediction, labels for another run."""

import json
import re
from collections.abc import Callable, Mapping
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
from tl_jax.networks import model_from, module_from
from tl_jax.objectives import Model, inputs_of
from tl_jax.peft import adapters_from, merged
from tl_jax.peft.files import ON_FILE, as_held
from tl_jax.peft.huggingface import save_peft


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
    path, _, about = opened(workdir)
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


def network(workdir: Path, *, merge: str = '') -> tuple[Any, dict[str, Any]]:
    """The Linen module of a finished run and all variables that it left; errors as `trained`.

    Args:
      workdir: of the run.
      merge: whether to merge its adapters, if it has any, into the network's weights; 'restored' says so of a base that was
        held in few bits, which is merged as it was restored from them.
    """
    path, _, about = opened(workdir)
    module, section = _module(about), about['model']
    variables = variables_of(path)
    if not section.get('peft'):
        return module, variables
    if not merge:
        raise UserError(f'{workdir}: has adapters; merge them into the network: --mode=export --merge --origin=tl_jax')
    if section.get('quantize'):
        if merge != 'restored':
            raise UserError(
                f'{workdir}: its base was held in {section["quantize"].get("name")}, and merging makes it whole again, of the '
                'values that are restored from that; --merge=restored if that is what you want'
            )
        variables['params'] = as_held(variables['params'], section['quantize'])
    adapters = adapters_from(section['peft'], type(module.backbone).__name__)
    acting = {name: adapters[name] for name in _active(section)}
    inputs = np.zeros((1, *about['input_shape']), about.get('input_dtype', 'float32'))
    return module, merged(Model(None, module.apply, None), acting, variables, inputs)


def export_adapters(workdir: Path, folder: Path) -> list[str]:
    """Writes the adapters of a finished run, and what learned beside them, as a folder of Hugging Face's `peft`.

    Raises:
      UserError: as `trained`; the run has no adapters or no base, or `peft` has no such adapters.
    """
    path, contents, about = opened(workdir)
    section = about['model']
    if not section.get('peft'):
        raise UserError(f'{workdir}: has no adapters; export its network, with --origin=transformers say')
    if 'base' not in about:
        raise UserError(f'{workdir}: its adapters have no base that others could have: it began at random; use --merge')
    acting = {name: section['peft'][name] for name in _active(section)}
    if not acting:
        raise UserError(f'{workdir}: none of its adapters is active; export its base')
    own = [name for name in contents.tensors if not re.fullmatch(ON_FILE, name)]
    base = dict(base=about['base']['source'].removeprefix('hf://'), sha256=about['base']['sha256'])
    return save_peft(folder, acting, variables_of(path), own, _module(about).backbone, **base)


def _active(section: Mapping[str, Any]) -> list[str]:
    """Names of the adapters that act: all unless said, and none of an empty list."""
    return list(section['peft']) if section.get('active') is None else list(section['active'])


def _module(about: Mapping[str, Any]) -> Any:
    """The network that a run's file describes, without its adapters."""
    fields = {name: value for name, value in about['model'].items() if name not in ('peft', 'active', 'quantize')}
    return module_from(**fields, classes=len(about['class_names']), dtype=about['dtype'])


def variables_of(path: Path) -> dict[str, Any]:
    """All variables of a file of ours, those of its base included."""
    tensors = pretrained.whole(path).tensors
    return trees.unflatten({name: np.asarray(tensor.array()) for name, tensor in tensors.items()})


def opened(workdir: Path) -> tuple[Path, pretrained.Contents, dict[str, Any]]:
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
