"""Terms that compare what student and teacher predict."""

from typing import Literal

import jax.numpy as jnp
from jax import nn
from jaxtyping import Array, Bool, Float

from tl_jax.errors import UserError
from tl_jax.objectives.base import cross_entropy, label_of, unit
from tl_jax.objectives.distillation.base import Pair, Term, comparing
from tl_jax.objectives.distillation.layers import FIELD


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


def dkd(*, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0) -> Term:
    """Decoupled knowledge distillation (Zhao et al. 2022, arXiv:2203.08679, eq. 7), nats per example.

    τ² (alpha · KL(bᵗ ‖ bˢ) + beta · KL(p̂ᵗ ‖ p̂ˢ)), b = (p_y, 1 - p_y) of the label's class y, p̂ the distribution over the
    others; `soft_targets` is alpha = 1 and beta = 1 - p_yᵗ. The authors' warmup: `weight=dict(start=0.0, end=1.0, until=…)`.

    Args:
      temperature: τ.
      alpha: of the label's class against the rest.
      beta: of the other classes among themselves; the authors choose it by the pair, 2 for ResNet-56 → 20 on CIFAR-100.
    """
    check_temperature(temperature)

    def compare(pair):
        s, t = (side['logits'].astype(jnp.float32) / temperature for side in (pair.student, pair.teacher))
        wanted = nn.one_hot(label_of(pair.fields), s.shape[-1], dtype=bool)
        target = divergence(against_rest(t, wanted), against_rest(s, wanted))
        others = divergence(without(t, wanted), without(s, wanted))
        return temperature**2 * (alpha * target + beta * others)

    return comparing(compare, student=('logits',), teacher=('logits',), init=same_classes('logits', 'logits'))


def dist(*, temperature: float = 1.0, inter: float = 1.0, intra: float = 1.0) -> Term:
    """τ² (inter · mean_i (1 - ρ(sᵢ, tᵢ)) + intra · mean_c (1 - ρ(s_c, t_c))) (DIST: Huang et al. 2022, arXiv:2205.10536).

    s, t are softmax(logits / τ) [B, C], ρ is Pearson's correlation: of an example's classes, and of a class's examples, for
    which a batch wants many. Without unit. The defaults are those of the authors' code on ImageNet.

    Args:
      temperature: τ.
      inter: weight of what tells classes apart, β in the paper.
      intra: weight of what tells a class's examples apart, γ in the paper.
    """
    check_temperature(temperature)

    def compare(pair):
        s, t = (nn.softmax(side['logits'].astype(jnp.float32) / temperature) for side in (pair.student, pair.teacher))
        return temperature**2 * (inter * (1 - pearson(s, t)) + intra * jnp.mean(1 - pearson(s.T, t.T)))

    return comparing(compare, student=('logits',), teacher=('logits',), init=same_classes('logits', 'logits'))


def virtual_teacher(
    *, temperature: float = 20.0, correct: float = 0.99, form: Literal['paper', 'code'] = 'paper'
) -> Term:
    """A teacher by hand, Tf-KD_reg (Yuan et al. 2020, arXiv:1909.11723), nats per example; no network is asked.

    KL(u_τ ‖ softmax(s / τ)), u = `correct` for the label's class and equal shares of the rest for the others, u_τ ∝ u^(1/τ).
    The authors' code has KL(softmax(u / τ) ‖ softmax(s)): `form='code'`. It also takes the mean over the C classes and has
    a multiplier m, so that its weight α is `weight=α * m / C` here. Neither has a factor τ².

    Args:
      temperature: τ, 20 or more in the paper.
      correct: probability of the label's class; 0.9 or more in the paper.
      form: whose softening.
    """
    check_temperature(temperature)
    if not 0 < correct < 1:
        raise UserError(f'{FIELD}: virtual_teacher.correct is a probability, above 0 and below 1, not {correct}')

    def compare(pair):
        s = pair.student['logits'].astype(jnp.float32)
        by_hand = jnp.where(
            nn.one_hot(label_of(pair.fields), s.shape[-1]) > 0, correct, (1 - correct) / (s.shape[-1] - 1)
        )
        if form == 'code':
            return divergence(by_hand / temperature, s)
        return divergence(jnp.log(by_hand) / temperature, s / temperature)

    return comparing(compare, student=('logits',))


def divergence(
    target: Float[Array, '*batch classes'], logits: Float[Array, '*batch classes']
) -> Float[Array, '*batch']:
    """KL(softmax(target) ‖ softmax(logits)) of each row, nats."""
    return jnp.sum(nn.softmax(target) * (nn.log_softmax(target) - nn.log_softmax(logits)), -1)


def standardise(logits: Float[Array, 'batch classes']) -> Float[Array, 'batch classes']:
    """Rows of mean 0 and (unbiased, as the authors' code) variance 1."""
    centred = logits - jnp.mean(logits, -1, keepdims=True)
    return centred / (jnp.std(logits, -1, keepdims=True, ddof=1) + 1e-7)


def against_rest(
    logits: Float[Array, 'batch classes'], wanted: Bool[Array, 'batch classes']
) -> Float[Array, 'batch 2']:
    """Logits of the wanted class and of all others together."""
    both = (jnp.where(keep, logits, -jnp.inf) for keep in (wanted, ~wanted))
    return jnp.stack([nn.logsumexp(kept, -1) for kept in both], -1)


def without(
    logits: Float[Array, 'batch classes'], unwanted: Bool[Array, 'batch classes']
) -> Float[Array, 'batch classes']:
    """Logits of a distribution that leaves one class out; a finite number keeps 0 · log 0 from being NaN."""
    return jnp.where(unwanted, -1e4, logits)


def pearson(x: Float[Array, 'rows columns'], y: Float[Array, 'rows columns']) -> Float[Array, 'rows']:
    """Correlation of each row of one with that of the other; 0 where a row does not vary."""
    return jnp.sum(unit(x - jnp.mean(x, -1, keepdims=True)) * unit(y - jnp.mean(y, -1, keepdims=True)), -1)


def check_temperature(temperature: float, section: str = FIELD) -> None:
    if not temperature > 0:
        raise UserError(f'{section}: temperature must be above 0, not {temperature}')


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
