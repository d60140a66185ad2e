"""Contrastive representation distillation: each example's student is told from other examples' teachers, and the reverse."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tl_jax.errors import UserError
from tl_jax.objectives.base import unit
from tl_jax.objectives.distillation.base import Pair, Term
from tl_jax.objectives.distillation.layers import FIELD, at_least_float32
from tl_jax.objectives.distillation.projectors import dense, dense_init

# The one class of all entries of the bank that no batch has filled yet: they are noise, and like no example.
UNSEEN = -1


def crd(
    *,
    num_examples: int,
    student: str = 'features',
    teacher: str = 'features',
    width: int = 128,
    num_negatives: int = 16384,
    temperature: float = 0.07,
    momentum: float = 0.5,
    negatives: Literal['classes', 'examples'] = 'classes',
) -> Term:
    """Contrastive representation distillation (Tian, Krishnan & Isola 2020, arXiv:1910.10699, eq. 10 and 18), nats.

    nce(v_s, bank of t) + nce(v_t, bank of s),   v = W f / ‖W f‖, of student and teacher a matrix and a bias each, and

    nce(v, bank) = -log h(bank_i) - Σ_{j of K negatives} log (1 - h(bank_j)),   h(b) = p / (p + K / N),  p = exp(v·b / τ) / Z

    A bank holds one vector for each of the N examples: the other network's when it was last seen, averaged as
    b ← unit(momentum b + (1 - momentum) v). Z = N · the mean of exp(v·b / τ) over the first batch, then fixed. K negatives
    are drawn for each example anew and, unlike the authors', with replacement. Weight 0.8, as the authors' code.

    All scores of a batch against a bank are computed, [B, N], and those of the negatives picked: less than the vectors of
    K negatives for each example, [B, K, width].

    Args:
      num_examples: N, of the stream.
      student: its endpoint [B, …], flattened; the last layer before the logits in the paper.
      teacher: the same of the teacher.
      width: of the space in which they are compared.
      num_negatives: K.
      temperature: τ.
      momentum: of the banks.
      negatives: examples of other 'classes', or any other 'examples', where there are no labels.

    Reads `index` [B] of the batch, and `label` [B] where negatives are of other classes.
    """
    check_crd(num_examples, width, num_negatives, temperature, momentum)
    needed = ('index', 'label') if negatives == 'classes' else ('index',)

    def init(key, pair: Pair):
        missing = next((name for name in needed if name not in pair.fields), None)
        if missing:
            raise UserError(
                f"{FIELD}: crd reads '{missing}' of each example, and these have {', '.join(pair.fields)}; "
                "without labels use negatives='examples'"
            )
        keys = jax.random.split(key)
        sizes = (math.prod(x.shape[1:]) for x in (pair.student[student], pair.teacher[teacher]))
        return {
            who: dense_init(k, size, width) for who, k, size in zip(('student', 'teacher'), keys, sizes, strict=True)
        }

    def state(key, pair: Pair):
        del pair
        reach = (3 / width) ** 0.5
        banks = jax.random.uniform(key, (2, num_examples, width), minval=-reach, maxval=reach)
        return {
            'student': banks[0],
            'teacher': banks[1],
            'kind': jnp.full(num_examples, UNSEEN, jnp.int32),
            'student_sum': jnp.zeros(()),
            'teacher_sum': jnp.zeros(()),
        }

    def loss(params, state, pair, key):
        index = pair.fields['index']
        kind = pair.fields['label'] if negatives == 'classes' else index
        v_s = embed(params['student'], pair.student[student])
        v_t = embed(params['teacher'], pair.teacher[teacher])
        others = draw_negatives(key, kind, state['kind'], num_negatives)
        chosen = jnp.concatenate([index[:, None], others], 1)
        of_student, sum_t = nce(v_s, state['teacher'], chosen, temperature, state['teacher_sum'])
        of_teacher, sum_s = nce(v_t, state['student'], chosen, temperature, state['student_sum'])
        moved = {
            'student': remember(state['student'], index, v_s, momentum),
            'teacher': remember(state['teacher'], index, v_t, momentum),
            'kind': state['kind'].at[index].set(kind.astype(jnp.int32)),
            'student_sum': sum_s,
            'teacher_sum': sum_t,
        }
        return of_student + of_teacher, moved

    return Term(loss, student=(student,), teacher=(teacher,), weight=0.8, init=init, state=state)


def nce(
    v: Float[Array, 'batch width'],
    bank: Float[Array, 'examples width'],
    chosen: Int[Array, 'batch one_and_negatives'],
    temperature: float,
    total: Float[Array, ''],
) -> tuple[Float[Array, 'batch'], Float[Array, '']]:
    """-log of telling each example's own vector in the bank, its first `chosen`, from the others; and Z, set where it was 0."""
    scores = jnp.take_along_axis(v @ bank.T, chosen, 1) / temperature
    total = jax.lax.stop_gradient(jnp.where(total > 0, total, jnp.mean(jnp.exp(scores)) * len(bank)))
    count = chosen.shape[1] - 1
    p, noise = jnp.exp(scores) / total, count / len(bank)
    # The authors' 1e-7 keeps a positive that is far below the noise from an infinite loss.
    positive = jnp.log(p[:, 0] / (p[:, 0] + noise + 1e-7))
    return -positive - jnp.sum(jnp.log(noise / (p[:, 1:] + noise + 1e-7)), 1), total


def draw_negatives(
    key: Array, kind: Int[Array, 'batch'], kinds: Int[Array, 'examples'], count: int
) -> Int[Array, 'batch count']:
    """For each example `count` indices of examples of another kind, each as likely, with replacement."""
    order = jnp.argsort(kinds)
    first, end = (jnp.searchsorted(kinds[order], kind, side=side)[:, None] for side in ('left', 'right'))
    own = end - first
    # A number among those of other kinds, which stand before and behind the block of the example's own.
    place = jax.random.randint(key, (len(kind), count), 0, jnp.maximum(len(kinds) - own, 1))
    return order[jnp.minimum(jnp.where(place < first, place, place + own), len(kinds) - 1)]


def remember(bank: Array, index: Array, v: Array, momentum: float) -> Float[Array, 'examples width']:
    return bank.at[index].set(unit(momentum * bank[index] + (1 - momentum) * v))


def embed(params: Any, x: Array) -> Float[Array, 'batch width']:
    return unit(dense(params, at_least_float32(x).reshape(len(x), -1)))


def check_crd(num_examples, width, num_negatives, temperature, momentum) -> None:
    if min(width, num_negatives) < 1:
        raise UserError(f'{FIELD}: crd.width and crd.num_negatives must be at least 1, not {width} and {num_negatives}')
    if not temperature > 0:
        raise UserError(f'{FIELD}: crd.temperature must be above 0, not {temperature}; 0.07 is the paper’s')
    if not 0 <= momentum < 1:
        raise UserError(f'{FIELD}: crd.momentum must lie in 0 … 1, below 1, not {momentum}; 0.5 is the authors’')
    if num_examples < 2:
        raise UserError(f'{FIELD}: crd keeps a vector for each example, and this stream does not say how many it has')
