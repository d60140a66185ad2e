"""Who is asked: the teachers of a student, or the student itself as it was."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.objectives.base import Fixed, Model, inputs_of, network_of, role
from tl_jax.objectives.distillation.base import FIELD, Pair
from tl_jax.objectives.teachers import teacher_of


class Teachers(NamedTuple):
    """The networks that terms compare a student with.

    Attributes:
      student: the network that learns.
      networks: by role, `teacher`, `teacher2`, …; none where the student teaches itself or no term asks.
      reads: the endpoints that terms read of them.
      classes: the teacher's class for each of the student's; empty where they are the same.
      decay: with which a student that teaches itself is followed.
    """

    student: Model
    networks: Mapping[str, Model]
    reads: tuple[str, ...]
    classes: Sequence[int]
    decay: float

    @property
    def itself(self) -> bool:
        """Whether the student teaches itself, from the collection `teacher`."""
        return bool(self.reads) and not self.networks

    @property
    def roles(self) -> tuple[str, ...]:
        """Of those that are asked; a term without a teacher is still compared once."""
        return tuple(self.networks) or ('teacher',)

    def endpoints(self, name: str, variables: Any, inputs: Any) -> dict[str, Array]:
        """What one of them says of inputs, in evaluation mode and without a gradient."""
        if self.itself:
            found = self.student.apply(self.followed(variables), inputs, train=False)
        else:
            network = self.networks.get(name)
            found = network.apply(network_of(variables), inputs, train=False) if network else {}
        if self.classes and 'logits' in found:
            found = {**found, 'logits': mapped(found['logits'], self.classes)}
        return lax.stop_gradient(dict(found))

    def followed(self, variables: Any) -> dict[str, Any]:
        """The student that teaches itself, after the last update."""
        return teacher_of(variables, self.decay, average_statistics=True)

    def taught(self, variables: Any, fields: Mapping[str, Array], inputs: Any = None) -> dict[str, dict[str, Array]]:
        """What each says of a batch: its fields `<role>/<endpoint>` where they are there, unless other `inputs` are shown."""
        there = lambda name: {e: fields[f'{name}/{e}'] for e in self.reads if f'{name}/{e}' in fields}
        if inputs is not None:
            return {name: self.endpoints(name, variables, inputs) for name in self.roles}
        return {name: there(name) or self.endpoints(name, variables, inputs_of(fields)) for name in self.roles}

    def pair(self, name: str, variables: Any, **sides: Any) -> Pair:
        """A term's view of the student and this teacher."""

        # Not before a term asks: a student that teaches itself is copied when the stage begins, after terms are initialised.
        asked = lambda: self.followed(variables) if self.itself else variables
        head = lambda network, now: lambda x: network.classify(network_of(now()), x, train=False)
        theirs = head(self.networks.get(name, self.student), asked)
        return Pair(student_head=head(self.student, lambda: variables), teacher_head=theirs, **sides)

    def pairs(self, variables: Any, taught: Mapping[str, Mapping[str, Array]], **sides: Any) -> dict[str, Pair]:
        """That of each teacher, by role."""
        return {name: self.pair(name, variables, teacher=taught[name], **sides) for name in self.roles}

    def require_classes(self, class_names: Sequence[str]) -> None:
        """Refuses teachers whose files say that they tell other classes apart than the data have, unless they are mapped."""
        ours = tuple(class_names)
        if self.classes or 'logits' not in self.reads or ours == tuple(map(str, range(len(ours)))):
            return
        for name, network in self.networks.items():
            theirs = network.class_names()
            if theirs and theirs != ours:
                raise UserError(
                    f'{FIELD}.teacher: the {name} tells {said(theirs)} apart, the data {said(ours)}; name the teacher’s class '
                    'for each of the student’s in `classes`'
                )

    def fixed(self, stream: str) -> tuple[Fixed, ...]:
        """Those that never learn, as the loop sees them."""
        say = lambda name: lambda variables, fields: self.endpoints(name, variables, inputs_of(fields))
        return tuple(Fixed(name, say(name), self.reads, stream) for name in self.networks)


def teachers_from(
    student: Model,
    teacher: Sequence[Model],
    reads: tuple[str, ...],
    *,
    classes: Sequence[int],
    decay: float,
) -> Teachers:
    """Gives the teachers their roles, and refuses those that nothing asks."""
    if teacher and not reads:
        raise UserError(f'{FIELD}.teacher: none of the terms asks a teacher; leave it out, or add such a term')
    roles = [f'teacher{k}' if k > 1 else 'teacher' for k in range(1, len(teacher) + 1)]
    networks = {name: role(name, network) for name, network in zip(roles, teacher, strict=True)}
    found = Teachers(student, networks, reads, classes, decay)
    if not 0 <= decay <= 1:
        raise UserError(f'{FIELD}.decay: must lie in 0 … 1, not {decay}; 1 keeps the teacher as the stage finds it')
    if decay < 1 and not found.itself:
        raise UserError(f'{FIELD}.decay: is of a student that teaches itself; leave out the teacher, or the decay')
    return found


def said(names: Sequence[str]) -> str:
    """The first few names, and how many there are."""
    return ', '.join(names) if len(names) <= 4 else f'{", ".join(names[:4])}, … ({len(names)})'


def mapped(logits: Float[Array, 'batch teacher'], classes: Sequence[int]) -> Float[Array, 'batch classes']:
    """The teacher's logits of the student's classes."""
    wrong = next((c for c in classes if not 0 <= c < logits.shape[-1]), None)
    if wrong is not None:
        raise UserError(f'{FIELD}.classes: names {wrong}, and the teacher has the classes 0 … {logits.shape[-1] - 1}')
    return logits[..., jnp.asarray(classes)]


def agreement(student: Mapping[str, Array], teacher: Mapping[str, Array]) -> dict[str, Array]:
    """How often the two name one class, for the log; nothing where either has no logits."""
    both = [found['logits'] for found in (student, teacher) if 'logits' in found]
    if len(both) < 2 or both[0].shape != both[1].shape:
        return {}
    return {'teacher_agreement': jnp.mean(jnp.argmax(both[0], -1) == jnp.argmax(both[1], -1))}
