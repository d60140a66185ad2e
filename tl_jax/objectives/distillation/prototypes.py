"""Class prototypes of a teacher's features as targets: the student is to place its examples among them."""

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jax import nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.objectives.base import cross_entropy, label_of, unit
from tl_jax.objectives.distillation.base import Pair, Term
from tl_jax.objectives.distillation.layers import FIELD, Layer, layer_pair
from tl_jax.objectives.distillation.logits import check_temperature, divergence
from tl_jax.objectives.distillation.projectors import project, projector_init


def prototypes(
    *,
    num_classes: int,
    layer: Layer = 'features',
    targets: Literal['labels', 'teacher'] = 'labels',
    temperature: float = 0.1,
) -> Term:
    """Places among the teacher's class prototypes, nats per example.

    c_k = Σᵢ q_ik tᵢ / Σᵢ q_ik over the stage's data when it begins;  p(x) = softmax_k(cos(x, c_k) / τ)
      'labels'   q is the label, the loss CE(p(r(s)), y)
      'teacher'  q = softmax(teacher's logits), the loss KL(p(t) ‖ p(r(s))); no labels are read

    Prototypes as of Snell et al. 2017 (arXiv:1703.05175, eq. 1 and 2), the teacher's embedding being theirs; what compares two
    networks' places among given points is SEED's (Fang et al. 2021, arXiv:2101.04731, sec. 3), with a queue for points.
    r is a linear map where the widths differ, and learns. A class without examples has no prototype and is left out.

    Args:
      num_classes: K of the labels.
      layer: vectors [B, D], or maps [B, H, W, D], of which the mean over positions is taken; the teacher's deterministic view.
      targets: what says where an example belongs.
      temperature: τ.
    """
    check_temperature(temperature)
    names = layer_pair(layer)
    by_labels = targets == 'labels'

    def init(key, pair: Pair):
        for who, side, name in (('student', pair.student, names[0]), ('teacher', pair.teacher, names[1])):
            if len(side[name].shape) not in (2, 4):
                raise UserError(
                    f"{FIELD}: prototypes are of vectors [B, D] or maps [B, H, W, D], and the {who}'s '{name}' is "
                    f'{list(side[name].shape)}; name another layer'
                )
        widths = [side[name].shape[-1] for side, name in zip((pair.student, pair.teacher), names, strict=True)]
        return projector_init(key, *widths, norm=False) if widths[0] != widths[1] else {}

    def state(key, pair: Pair):
        classes = num_classes if by_labels else pair.teacher['logits'].shape[-1]
        return {'sums': jnp.zeros((classes, pair.teacher[names[1]].shape[-1])), 'counts': jnp.zeros(classes)}

    def refresh(state, pairs: Iterator[Pair]):
        @jax.jit
        def add(state, members, t):
            return {'sums': state['sums'] + members.T @ t, 'counts': state['counts'] + jnp.sum(members, 0)}

        state = jax.tree.map(jnp.zeros_like, state)
        for pair in pairs:
            members = belonging(pair, len(state['counts'])) * pair.fields['mask'][:, None]
            state = add(state, members, pooled(pair.teacher[names[1]]))
        return state

    def belonging(pair: Pair, classes: int) -> Float[Array, 'batch classes']:
        if by_labels:
            return nn.one_hot(label_of(pair.fields), classes)
        return nn.softmax(pair.teacher['logits'].astype(jnp.float32))

    def loss(params, state, pair, key):
        s = pooled(pair.student[names[0]])
        s = project(params, s) if params else s
        p = places(s, state) / temperature
        if by_labels:
            return cross_entropy(p, label_of(pair.fields)), state
        return divergence(places(pooled(pair.teacher[names[1]]), state) / temperature, p), state

    reads = (names[1],) if by_labels else (names[1], 'logits')
    return Term(loss, student=(names[0],), teacher=reads, init=init, state=state, refresh=refresh)


def pooled(x: Float[Array, 'batch *positions dim']) -> Float[Array, 'batch dim']:
    return jnp.mean(x.astype(jnp.float32).reshape(len(x), -1, x.shape[-1]), 1)


def places(x: Float[Array, 'batch dim'], state: dict[str, Array]) -> Float[Array, 'batch classes']:
    """Cosines with the prototypes, far below any where there is none; a sum has its mean's direction."""
    return jnp.where(state['counts'] > 0, unit(x) @ unit(state['sums']).T, -1e4)
