"""What a term of a distillation is: a comparison of a student's endpoints with a teacher's, that knows neither network."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array

FIELD = 'config.objective.distilled'


class Pair(NamedTuple):
    """A batch as the student and one of its teachers see it; of shapes in place of arrays where a term is initialised.

    Attributes:
      student: endpoints of its pass in training mode; empty while a term looks over the whole data.
      teacher: the teacher's endpoints, constants to the gradient; at least those that the term reads.
      fields: of the stream's batch: `label` [B], `index` [B], …; `mask` [B] in a pass over the whole data.
      student_head: features [B, D] -> logits [B, C] by the student's head.
      teacher_head: the same by the teacher's.
      fraction: of the stage that is over, in [0, 1).
    """

    student: Mapping[str, Array]
    teacher: Mapping[str, Array]
    fields: Mapping[str, Array]
    student_head: Callable | None = None
    teacher_head: Callable | None = None
    fraction: Any = 0.0


class Term(NamedTuple):
    """One comparison of a student with a teacher; made by a constructor whose keyword arguments are the term's fields.

    Attributes:
      loss: (params, state, pair, key) -> (scalar [] or a number for each example [B], state).
      student: names of the endpoints that it reads of the student.
      teacher: the same of the teacher; where there are none, no teacher is asked.
      weight: unless the config gives one; the paper's where it has one.
      init: (key, pair of shapes) -> params, which learn; it refuses shapes that do not fit.
      state: (key, pair of shapes) -> what it remembers between steps.
      refresh: (state, pairs over the whole data, without students) -> state, when a stage begins.
    """

    loss: Callable
    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    weight: float = 1.0
    init: Callable = lambda key, pair: {}
    state: Callable = lambda key, pair: {}
    refresh: Callable | None = None


def comparing(compare: Callable[[Pair], Array], **attributes: Any) -> Term:
    """A term without parameters or memory: pair -> scalar or [B]."""
    return Term(lambda params, state, pair, key: (compare(pair), state), **attributes)
