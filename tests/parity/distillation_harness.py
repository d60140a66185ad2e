"""Distillation's terms beside independent implementations in torch: what a case is, and how ours is asked.

Files `torch_terms_<family>.py` hold `CASES: dict[str, Case]`. `live_distillation.py` compares values and gradients where
torch is installed (`make parity`) and writes golden files; `test_distillation_golden.py` needs those alone.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from parity_harness import draw

from tl_jax.objectives.distillation.base import Pair, Term
from tl_jax.objectives.distillation.weighted import terms_from
from tl_jax.trees import flatten

try:
    import torch
except ModuleNotFoundError:  # the cases' inputs need none, and the golden files hold what their references gave
    torch = None

HERE = Path(__file__).parent
FACTS = {'num_classes': 10, 'num_examples': 40}
ENTRIES = 6  # of each gradient, in a golden file


class Case(NamedTuple):
    """One term, its inputs, and the same formula in torch.

    Attributes:
      section: as in `config.objective.distilled.terms`, `name` included; its `weight` does not count.
      arrays: seed -> (student's endpoints, teacher's, fields of the batch), numpy, in our layout.
      reference: (student, teacher, fields, params) -> scalar, all torch float64 in our layout, `params` nested as ours; where
        the term keeps a state, `fields['state']` is it.
      passes: seed -> [(teacher's endpoints, fields), …] over the whole data, for a term that looks over it.
      heads: (student's, teacher's): features -> logits, in jax.numpy.
      stopped: the student's endpoints through which no gradient goes, where it teaches itself.
      slopes: whether finite differences give the gradient: not where one is stopped on purpose, or at a ReLU's exact zero.
      tolerance: of values and gradients in float64, relative to the largest number.
      single: the same of ours in float32.
    """

    section: Mapping[str, Any]
    arrays: Callable[[int], tuple[dict, dict, dict]]
    reference: Callable[..., Any]
    passes: Callable[[int], list[tuple[dict, dict]]] | None = None
    heads: tuple[Callable, Callable] = (None, None)
    stopped: tuple[str, ...] = ()
    slopes: bool = True
    tolerance: float = 1e-7
    single: float = 2e-4


class Question(NamedTuple):
    """A case's numbers, ours to answer: `learned` = {'student': endpoints, 'params': …} is what gradients are taken of.

    `constant` are the student's endpoints that are no floats, such as a mask, or that no gradient goes through.
    """

    learned: dict[str, Any]
    constant: dict[str, Any]
    teacher: dict[str, Any]
    fields: dict[str, Any]
    state: dict[str, Any]


def families() -> dict[str, dict[str, Case]]:
    """The cases of the files `torch_terms_*.py`, by family and name."""
    files = sorted(HERE.glob('torch_terms_*.py'))
    found = {file.stem.removeprefix('torch_terms_'): importlib.import_module(file.stem).CASES for file in files}
    names = [name for cases in found.values() for name in cases]
    assert len(set(names)) == len(names), sorted(names)
    return found


def term_of(case: Case) -> Term:
    return terms_from([case.section], FACTS)[0].term


def question(case: Case, seed: int, dtype: Any) -> Question:
    """Inputs by the seed, parameters by their paths, and the state as the term makes it, floats in `dtype`."""
    term, key = term_of(case), jax.random.key(seed)
    student, teacher, fields = (_cast(tree, dtype) for tree in case.arrays(seed))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (student, teacher, fields))
    pair = Pair(*shapes, *case.heads)
    # Drawn anew: what starts at zero would hide what multiplies it.
    params = _cast(draw(jax.eval_shape(lambda key: term.init(key, pair), key)), dtype)
    state = term.state(key, pair)
    if case.passes:
        state = term.refresh(state, _pairs(case, seed, dtype))
    still = lambda name, x: name in case.stopped or not np.issubdtype(x.dtype, np.floating)
    constant = {name: x for name, x in student.items() if still(name, x)}
    floats = {name: x for name, x in student.items() if name not in constant}
    return Question({'student': floats, 'params': params}, constant, teacher, fields, _cast(state, dtype))


def asking(case: Case) -> Callable:
    """(learned, the rest of a question, key) -> our value and its gradients, compiled."""
    term = term_of(case)

    def value(learned, asked, key):
        pair = Pair({**learned['student'], **asked.constant}, asked.teacher, asked.fields, *case.heads)
        return jnp.mean(term.loss(learned['params'], asked.state, pair, key)[0])

    return jax.jit(jax.value_and_grad(value))


def answer(ask: Callable, asked: Question, seed: int = 0) -> tuple[float, dict[str, np.ndarray]]:
    """Our value, and its gradients by path: 'student/logits', 'params/…'."""
    value, gradients = ask(asked.learned, asked._replace(learned={}), jax.random.key(seed))
    return float(value), {path: np.asarray(g) for path, g in flatten(gradients).items()}


def torch_answer(case: Case, asked: Question) -> tuple[float, dict[str, np.ndarray]]:
    """The reference's value, and its gradients by path, in float64."""
    learned = jax.tree.map(lambda x: torch.from_numpy(np.array(x)).requires_grad_(), asked.learned)
    constant, teacher, fields, state = (
        jax.tree.map(lambda x: torch.from_numpy(np.array(x)), tree)
        for tree in (asked.constant, asked.teacher, asked.fields, asked.state)
    )
    # torch takes indices in 64 bits alone.
    fields = {name: x.long() if not x.is_floating_point() else x for name, x in fields.items()}
    if state:
        fields['state'] = state
    value = case.reference({**learned['student'], **constant}, teacher, fields, learned['params'])
    value.backward()
    return value.item(), {
        path: np.zeros(x.shape) if x.grad is None else x.grad.numpy() for path, x in flatten(learned).items()
    }


def golden_path(family: str) -> Path:
    return HERE / 'golden' / f'distillation_{family}.json'


def golden(family: str) -> dict[str, Any]:
    file = golden_path(family)
    return json.loads(file.read_text()) if file.exists() else {}


def write_golden(family: str, name: str, value: float, gradients: Mapping[str, np.ndarray]) -> None:
    """Puts one case's figures into its family's file."""
    entries = {path: [float(f'{x:.8g}') for x in sample(g)] for path, g in gradients.items()}
    figures = {**golden(family), name: {'value': float(f'{value:.10g}'), 'gradients': entries}}
    partial = golden_path(family).with_suffix('.partial')
    partial.write_text(json.dumps(dict(sorted(figures.items())), indent=1) + '\n')
    partial.replace(golden_path(family))


def sample(values: np.ndarray) -> np.ndarray:
    """A few entries spread over an array."""
    flat = np.asarray(values).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(ENTRIES, flat.size)).astype(int)]


def _pairs(case: Case, seed: int, dtype: Any) -> Iterator[Pair]:
    for teacher, fields in case.passes(seed):
        yield Pair({}, _cast(teacher, dtype), _cast(fields, dtype), *case.heads)


def _cast(tree: Any, dtype: Any) -> Any:
    """Floats in `dtype`, whole numbers as they are."""
    cast = lambda x: np.asarray(x, dtype) if np.issubdtype(np.asarray(x).dtype, np.floating) else np.asarray(x)
    return jax.tree.map(cast, tree)
