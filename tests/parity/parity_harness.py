"""Ours beside the origin's own network: the same weights through its state dict, the same inputs, every figure compared.

A case names one of our models and how to build the reference in torch. Weights are drawn from their paths, exported under
the origin's names, and loaded there; what the reference then saves is what our reader must give back.

`live_parity.py` does all of this where torch is installed (`make parity`) and writes golden files; `test_golden.py` needs
those alone.
"""

import importlib
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.models import create_model

HERE = Path(__file__).parent
CLASSES = 7


class Case(NamedTuple):
    """One network at one origin.

    Attributes:
      name: unique; the golden file's.
      model: of ours.
      fields: overrides of `create_model`.
      origin: whose names are written.
      reference: builds the origin's network; imports torch when called.
      outputs: (reference, torch inputs) -> {our endpoint: torch tensor in the origin's layout, NCHW maps among them}.
      inputs: rng -> what our model takes, numpy.
      torch_inputs: our inputs -> what `outputs` takes; images become NCHW unless it is given.
      num_classes: of the head; None for none.
      tolerance: of outputs, relative to the largest value; 1e-4 for networks of more than 100 layers.
      train: whether to compare a pass in training mode and the statistics it moves (no dropout in the case, then).
      absent: regexes of the reference's state that our file need not hold: tables that it computes itself.
      tied: {the reference's parameter: its other name}, whose gradient it shares.
      golden: whether `make test` checks the case against a golden file.
    """

    name: str
    model: str
    fields: Mapping[str, Any]
    origin: str
    reference: Callable[[], Any]
    outputs: Callable[[Any, Any], Mapping[str, Any]]
    inputs: Callable[[np.random.Generator], Any] = lambda rng: rng.standard_normal((2, 64, 64, 3), np.float32)
    torch_inputs: Callable[[Any], Any] | None = None
    num_classes: int | None = CLASSES
    tolerance: float = 2e-5
    train: bool = False
    absent: tuple[str, ...] = ()
    tied: Mapping[str, str] = {}
    golden: bool = False


def cases() -> list[Case]:
    """Every case of the files `cases_*.py`, by file and in order."""
    found = [case for file in sorted(HERE.glob('cases_*.py')) for case in importlib.import_module(file.stem).CASES]
    names = [case.name for case in found]
    assert len(set(names)) == len(names), sorted(names)
    return found


def images(batch: int, height: int, width: int | None = None, channels: int = 3) -> Callable:
    """Standard normal images."""
    return lambda rng: rng.standard_normal((batch, height, width or height, channels), np.float32)


def torchvision_network(name: str, **fields: Any) -> Any:
    """torchvision's own network of that name, at a random start."""
    import torch_side  # noqa: F401
    import torchvision

    return torchvision.models.get_model(name, weights=None, **fields)


def timm_network(name: str, **fields: Any) -> Any:
    """timm's own network of that name, at a random start."""
    import timm
    import torch_side  # noqa: F401

    return timm.create_model(name, **fields)


def created(case: Case, **fields: Any) -> tuple[Any, Any, Any]:
    """Our module, its variables drawn from their paths, and the inputs."""
    module = create_model(case.model, num_classes=case.num_classes, **{**case.fields, **fields})
    inputs = case.inputs(np.random.default_rng(0))
    return module, draw(jax.eval_shape(module.init, jax.random.key(0), inputs)), inputs


def draw(shapes: Any, path: str = '') -> Any:
    """Returns float32 arrays in place of a nested dict of shaped leaves, each a function of its path and shape alone."""
    if isinstance(shapes, Mapping):
        return {name: draw(node, f'{path}/{name}'.lstrip('/')) for name, node in shapes.items()}
    values = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shapes.shape)
    leaf = path.rpartition('/')[2]
    if leaf in ('kernel', 'embedding'):
        values *= np.sqrt(2 / max(1, np.prod(shapes.shape[:-1]))) if leaf == 'kernel' else 0.5
    elif leaf in ('scale', 'var', 'gamma'):
        values = 1 + 0.5 * np.tanh(values)
    else:
        values *= 0.1
    return values.astype(np.float32)


def evaluated(module: Any, variables: Any, inputs: Any) -> dict[str, np.ndarray]:
    """Our endpoints in evaluation, compiled."""
    endpoints = jax.jit(lambda v, x: module.apply(v, x))(variables, inputs)
    return {name: np.asarray(value, np.float32) for name, value in endpoints.items()}


def trained(module: Any, variables: Any, inputs: Any) -> tuple[dict[str, np.ndarray], Any]:
    """Our endpoints in training mode, and the statistics after it."""
    step = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=['batch_stats']))
    endpoints, updates = step(variables, inputs)
    return {name: np.asarray(value, np.float32) for name, value in endpoints.items()}, updates['batch_stats']


def objective(outputs: Mapping[str, Any]) -> Any:
    """A loss that every parameter matters to: half the mean square of the logits, or of whatever comes last."""
    last = outputs['logits'] if 'logits' in outputs else outputs[list(outputs)[-1]]
    return 0.5 * (last**2).mean()


def gradient(module: Any, variables: Any, inputs: Any, wanted: Any) -> Any:
    """Our gradient of `objective` over the endpoints that the reference has, in evaluation mode."""
    others = {name: value for name, value in variables.items() if name != 'params'}

    def loss(params):
        endpoints = module.apply({'params': params, **others}, inputs)
        return objective({name: endpoints[name] for name in wanted})

    return jax.jit(jax.grad(loss))(variables['params'])


def error(ours: np.ndarray, reference: np.ndarray) -> float:
    """max |Δ| / max |reference|; infinite where shapes differ."""
    if ours.shape != reference.shape:
        return float('inf')
    scale = float(np.abs(reference).max(initial=0)) or 1.0
    return float(np.abs(ours.astype(np.float64) - reference).max(initial=0)) / scale


def golden_path(case: Case) -> Path:
    return HERE / 'golden' / f'{case.name}.npz'


def sample(values: np.ndarray, count: int = 64) -> np.ndarray:
    """At most `count` values spread over an array: what a golden file keeps of each endpoint."""
    flat = values.reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(count, flat.size)).astype(int)].astype(np.float32)


def bfloat16(variables: Any) -> Any:
    """Variables rounded to bfloat16, still float32."""
    return jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), variables)
