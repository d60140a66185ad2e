"""Terms that compare what student and teacher predict."""

import jax.numpy as jnp
from jax import nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.objectives.base import cross_entropy
from tl_jax.objectives.distillation.base import Pair, Term, comparing


def soft_targets(
    *, temperature: float = 4.0, student: str = 'logits', teacher: str = 'logits', standardised: bool = False
) -> Term:
    """τ² KL(softmax(t / τ) ‖ softmax(s / τ)), nats per example (Hinton, Vinyals & Dean 2015, arXiv:1503.02531, sec. 2).

    With τ² the gradient keeps its scale at any temperature, (softmax(s) - softmax(t)) in the limit of small logits.

    Args:
      temperature: τ.
      student: its endpoint [B, C].
      teacher: the same of the teacher.
      standardised: whether both rows of logits are first given mean 0 and variance 1 (Sun et al. 2024, arXiv:2403.01427,
        eq. 9), so that the student need not match their scale.
    """
    check_temperature(temperature)

    def compare(pair):
        s, t = (x.astype(jnp.float32) for x in (pair.student[student], pair.teacher[teacher]))
        if standardised:
            s, t = standardise(s), standardise(t)
        return temperature**2 * divergence(t / temperature, s / temperature)

    return comparing(compare, student=(student,), teacher=(teacher,), init=same_classes(student, teacher))


def hard_targets(*, student: str = 'logits', teacher: str = 'logits', smoothing: float = 0.0) -> Term:
    """CE(student, the teacher's first class), nats per example (Touvron et al. 2020, arXiv:2012.12877, eq. 3)."""

    def compare(pair):
        return cross_entropy(pair.student[student], jnp.argmax(pair.teacher[teacher], -1), smoothing)

    return comparing(compare, student=(student,), teacher=(teacher,), init=same_classes(student, teacher))


def divergence(
    target: Float[Array, '*batch classes'], logits: Float[Array, '*batch classes']
) -> Float[Array, '*batch']:
    """KL(softmax(target) ‖ softmax(logits)) of each row, nats."""
    return jnp.sum(nn.softmax(target) * (nn.log_softmax(target) - nn.log_softmax(logits)), -1)


def standardise(logits: Float[Array, 'batch classes']) -> Float[Array, 'batch classes']:
    """Rows of mean 0 and (unbiased, as the authors' code) variance 1."""
    centred = logits - jnp.mean(logits, -1, keepdims=True)
    return centred / (jnp.std(logits, -1, keepdims=True, ddof=1) + 1e-7)


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f'config.objective.distilled.terms: temperature must be above 0, not {temperature}')


def same_classes(student: str, teacher: str):
    """An `init` that refuses predictions over other numbers of classes."""

    def init(key, pair: Pair):
        mine, theirs = pair.student[student].shape[-1], pair.teacher[teacher].shape[-1]
        if mine != theirs:
            raise UserError(
                f"config.objective.distilled: the student tells {mine} classes apart ('{student}'), the teacher {theirs} "
                f"('{teacher}'); name the teacher's class for each of the student's in `classes`"
            )
        return {}

    return init
