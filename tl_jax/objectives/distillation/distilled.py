"""Distillation: a wrapper that adds to any objective what teachers say of the same inputs, compared by terms.

The wrapper runs the teachers, weighs terms and teachers, and keeps what a term learns (the role `projectors`) or remembers (the
collection `distillation`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from tl_jax import trees
from tl_jax.objectives.base import Model, Models, Objective, inputs_of, network_of, refreshed, started, with_loss
from tl_jax.objectives.distillation.asked import agreement, teachers_from
from tl_jax.objectives.distillation.base import FIELD
from tl_jax.objectives.distillation.levels import check_level, check_weights, level, teacher_shares
from tl_jax.objectives.distillation.weighted import begun, compared, terms_from

# What a loss sees of its place in a stage, where only shapes are asked for.
PROGRESS = {'progress': {'step': jnp.zeros((), jnp.int32), 'fraction': jnp.zeros(())}}


def distilled(
    objective: Objective,
    *,
    model: Model,
    num_classes: int,
    class_names: Sequence[str],
    num_examples: Mapping[str, int],
    terms: Sequence[Mapping[str, Any]],
    teacher: Models = (),
    label_weight: float | Mapping[str, float] = 1.0,
    teacher_weights: Literal['mean', 'labels', 'entropy'] | Sequence[float] = 'mean',
    classes: Sequence[int] = (),
    decay: float = 1.0,
    stream: str = '',
) -> Objective:
    """label_weight · loss + Σ_terms weight · Σ_k mean_i w_ki term(student, teacher k)_i.

    With `soft_targets` alone it is Hinton, Vinyals & Dean 2015 (arXiv:1503.02531). Teachers run in evaluation mode on what
    the student sees, the same crop and mixup too (Beyer et al. 2021, arXiv:2106.05237), and no gradient enters them; where
    an example looks the same each time they run once (`tl_jax.teaching`).

    Args:
      objective: gives the student's pass in `Aux.endpoints`: supervised, unsupervised (no labels), mlm, …
      model: the student.
      num_classes: of the data.
      class_names: of the data.
      num_examples: of each stream.
      terms: `dict(name='soft_targets', temperature=4.0, weight=0.9)`: the fields of a constructor of `TERMS`, and `weight`.
      teacher: a network, its section as `config.model`, or a list of them: roles `teacher`, `teacher2`, …, which never learn.
        Without one the teacher is the student as the stage finds it.
      label_weight: of the wrapped loss. This and a term's `weight` may be `dict(start=1.0, end=0.0, until=1.0)`: linear in the
        stage's progress until that share of it.
      teacher_weights: w_k of several teachers: equal; by 'labels', for each example (1 - softmax_k(CE_k)) / (K - 1) (Zhang et
        al. 2022, arXiv:2201.00007, eq. 4); by 'entropy', softmax_k(-H(p_k)); or numbers, which are divided by their sum.
      classes: the teacher's class for each of the student's, where the two differ.
      decay: of a teacher that is the student itself: its weights follow as t ← decay t + (1 - decay) s; 1 to stay.
      stream: that the wrapped loss sees; its first unless given.
    """
    stream = stream or objective.streams[0]
    weighted = terms_from(terms, {'num_classes': num_classes, 'num_examples': num_examples.get(stream, 0)})
    reads = tuple(dict.fromkeys(name for w in weighted for name in w.term.teacher))
    teachers = teachers_from(model, teacher, reads, classes=classes, decay=decay)
    check_level(label_weight, f'{FIELD}.label_weight')
    check_weights(teacher_weights, len(teachers.roles))

    def init(key: Array, batch: Any) -> dict[str, Any]:
        teachers.require_classes(class_names)
        variables, fields = objective.init(key, batch), batch[stream]
        for k, network in enumerate(teachers.networks.values()):
            variables = trees.merge(variables, network.init(jax.random.fold_in(key, k + 1), inputs_of(fields)))

        def look(variables, batch):
            ready = start(variables)
            outputs = objective.loss({**ready, **PROGRESS}, batch, key)[1].endpoints
            shown = outputs.get('inputs', inputs_of(batch[stream]))
            return outputs, {name: teachers.endpoints(name, ready, shown) for name in teachers.roles}

        student, taught = jax.eval_shape(look, variables, batch)
        pairs = teachers.pairs(variables, taught, student=student, fields=fields)
        return trees.merge(variables, begun(weighted, pairs, key))

    def start(variables: Any) -> dict[str, Any]:
        variables = started(objective, variables)
        own = {'teacher': jax.tree.map(jnp.copy, network_of(variables))} if teachers.itself else {}
        return {**variables, **own}

    def change(loss: Callable) -> Callable:
        def with_teachers(variables, batch, key):
            value, aux = loss(variables, batch, key)
            fields, fraction = batch[stream], variables['progress']['fraction']
            taught = teachers.taught(variables, fields, aux.endpoints.get('inputs'))
            pairs = teachers.pairs(variables, taught, student=aux.endpoints, fields=fields, fraction=fraction)
            shares = teacher_shares(teacher_weights, taught, fields)
            values, states = compared(weighted, pairs, shares, variables, key)
            total = sum(level(w.level, fraction) * values[w.label] for w in weighted)
            share = level(label_weight, fraction)
            moved = {'distillation': lax.stop_gradient(states)} if states else {}
            if teachers.itself:
                moved['teacher'] = teachers.followed(variables)
            parts = {name: share * part for name, part in aux.losses.items()}
            return share * value + total, aux._replace(
                metrics={**aux.metrics, **values, **agreement(aux.endpoints, taught[teachers.roles[0]])},
                collections=trees.merge(aux.collections, moved),
                losses={**parts, 'distilled': total} if parts else {},
            )

        return with_teachers

    def refresh(variables: Any, batches: Callable) -> dict[str, Any]:
        moved, kept = refreshed(objective, variables, batches), variables['distillation']
        ask = jax.jit(teachers.taught)

        def over(name):
            for batch in batches(stream):
                yield teachers.pair(name, variables, student={}, teacher=ask(variables, batch)[name], fields=batch)

        for name in teachers.roles:
            for w in weighted:
                if w.term.refresh:
                    kept = trees.merge(kept, {name: {w.label: w.term.refresh(kept[name][w.label], over(name))}})
        return {**moved, 'distillation': kept}

    looks = any(w.term.refresh for w in weighted)
    return with_loss(objective, change)._replace(
        init=init,
        start=start,
        refresh=refresh if looks else objective.refresh,
        fixed=(*objective.fixed, *teachers.fixed(stream)),
    )
