"""Distillation: a wrapper that adds to any objective what teachers say of the same inputs, compared by terms.

The wrapper runs the teachers, weighs terms and teachers, and keeps what a term learns (the role `projectors`) or remembers (the
collection `distillation`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.config import asked, call, check_type
from tl_jax.errors import UserError, nearest
from tl_jax.objectives.base import (
    Fixed,
    Model,
    Models,
    Objective,
    inputs_of,
    network_of,
    refreshed,
    role,
    started,
    with_loss,
)
from tl_jax.objectives.distillation.base import Pair, Term
from tl_jax.objectives.distillation.levels import FIELD, Level, check_level, check_weights, level, teacher_shares
from tl_jax.objectives.distillation.terms import TERMS
from tl_jax.objectives.teachers import teacher_of


class Weighted(NamedTuple):
    """A term in its place: `label` is its name in roles and logs, `where` its section, `level` its weight."""

    label: str
    where: str
    term: Term
    level: Level


def distilled(
    objective: Objective,
    *,
    model: Model,
    num_classes: int,
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
    facts = {'num_classes': num_classes, 'num_examples': num_examples.get(stream, 0)}
    weighted = terms_from(terms, facts)
    wanted = tuple(dict.fromkeys(name for w in weighted for name in w.term.teacher))
    check_level(label_weight, f'{FIELD}.label_weight')
    itself = bool(wanted) and not teacher
    check_decay(decay, itself)
    if teacher and not wanted:
        raise UserError(f'{FIELD}.teacher: none of the terms asks a teacher; leave it out, or add such a term')
    # A term without a teacher is still compared once.
    roles = [f'teacher{k}' if k > 1 else 'teacher' for k in range(1, max(1, len(teacher)) + 1)]
    networks = {name: role(name, network) for name, network in zip(roles, teacher, strict=False)}
    check_weights(teacher_weights, len(roles))

    def endpoints_of(name: str, variables: Any, inputs: Any) -> dict[str, Array]:
        if itself:
            found = model.apply(teacher_of(variables, decay, average_statistics=True), inputs, train=False)
        else:
            found = networks[name].apply(network_of(variables), inputs, train=False) if networks else {}
        if classes and 'logits' in found:
            found = {**found, 'logits': mapped(found['logits'], classes)}
        return lax.stop_gradient(dict(found))

    def taught(variables: Any, fields: Any, shown: Any) -> dict[str, dict[str, Array]]:
        """Each teacher's endpoints, from the batch where they are in it."""
        there = lambda name: {e: fields[f'{name}/{e}'] for e in wanted if f'{name}/{e}' in fields}
        return {name: there(name) or endpoints_of(name, variables, shown) for name in roles}

    def heads(variables: Any, name: str) -> dict[str, Callable]:
        by = lambda network: lambda features: network.classify(network_of(variables), features, train=False)
        return {'student_head': by(model), 'teacher_head': by(networks.get(name, model))}

    def pairs(variables: Any, fields: Any, student: Any, teachers: Any, fraction: Any) -> dict[str, Pair]:
        return {
            name: Pair(student, teachers[name], fields, **heads(variables, name), fraction=fraction) for name in roles
        }

    def init(key: Array, batch: Any) -> dict[str, Any]:
        variables, fields = objective.init(key, batch), batch[stream]
        for k, network in enumerate(networks.values()):
            variables = trees.merge(variables, network.init(jax.random.fold_in(key, k + 1), inputs_of(fields)))

        def look(variables, batch):
            begun = start(variables)
            outputs = objective.loss({**begun, **PROGRESS}, batch, key)[1].endpoints
            shown = shown_to(outputs, batch[stream])
            return outputs, {name: endpoints_of(name, begun, shown) for name in roles}

        student, teachers = jax.eval_shape(look, variables, batch)
        learned, kept = {}, {}
        for name, pair in pairs(variables, fields, student, teachers, 0.0).items():
            for number, w in enumerate(weighted):
                require(w, pair)
                own, remembered = jax.random.split(jax.random.fold_in(key, 1000 + number))
                learned = trees.merge(learned, {name: {w.label: w.term.init(own, pair)}})
                kept = trees.merge(kept, {name: {w.label: w.term.state(remembered, pair)}})
        # A term that learns or keeps nothing leaves no empty subtree: a step would hand back another structure.
        learned, kept = (trees.unflatten(trees.flatten(tree)) for tree in (learned, kept))
        added = {'params': {'projectors': learned}} if learned else {}
        if kept:
            added['distillation'] = kept
        return trees.merge(variables, added)

    def start(variables: Any) -> dict[str, Any]:
        variables = started(objective, variables)
        if not itself:
            return variables
        return {**variables, 'teacher': jax.tree.map(jnp.copy, network_of(variables))}

    def change(loss: Callable) -> Callable:
        def with_teachers(variables, batch, key):
            value, aux = loss(variables, batch, key)
            fields, student, fraction = batch[stream], aux.endpoints, variables['progress']['fraction']
            shown = shown_to(student, fields)
            known = {k: v for k, v in fields.items() if '/' not in k} if 'inputs' in student else fields
            teachers = taught(variables, known, shown)
            shares = teacher_shares(teacher_weights, teachers, fields)
            values, states = {}, {}
            for number, (name, pair) in enumerate(pairs(variables, fields, student, teachers, fraction).items()):
                for place, w in enumerate(weighted):
                    own = lambda tree, at=(name, w.label): tree.get(at[0], {}).get(at[1], {})
                    state, params = (
                        own(variables.get('distillation', {})),
                        own(variables['params'].get('projectors', {})),
                    )
                    seed = jax.random.fold_in(key, 1000 * (number + 1) + place)
                    term, state = w.term.loss(params, state, pair, seed)
                    term = jnp.mean(shares[number] * term)
                    values[w.label] = values.get(w.label, 0.0) + term
                    states = trees.merge(states, {name: {w.label: state}}) if state else states
            total = sum(level(w.level, fraction) * values[w.label] for w in weighted)
            share = level(label_weight, fraction)
            moved = {'distillation': lax.stop_gradient(states)} if states else {}
            if itself:
                moved['teacher'] = teacher_of(variables, decay, average_statistics=True)
            return share * value + total, aux._replace(
                metrics={**aux.metrics, **values, **agreement(student, teachers[roles[0]])},
                collections=trees.merge(aux.collections, moved),
                losses={**{n: share * part for n, part in aux.losses.items()}, 'distilled': total}
                if aux.losses
                else {},
            )

        return with_teachers

    def refresh(variables: Any, batches: Callable) -> dict[str, Any]:
        moved = refreshed(objective, variables, batches)
        ask = jax.jit(lambda v, fields: taught(v, fields, inputs_of(fields)))

        def over(name: str) -> Iterator[Pair]:
            for batch in batches(stream):
                yield Pair({}, ask(variables, batch)[name], batch, **heads(variables, name))

        kept = variables['distillation']
        for name in roles:
            for w in weighted:
                if w.term.refresh:
                    state = w.term.refresh(kept[name][w.label], over(name))
                    kept = trees.merge(kept, {name: {w.label: state}})
        return {**moved, 'distillation': kept}

    fixed = tuple(
        Fixed(name, lambda v, fields, name=name: endpoints_of(name, v, inputs_of(fields)), wanted, stream)
        for name in networks
    )
    looks = any(w.term.refresh for w in weighted)
    return with_loss(objective, change)._replace(
        init=init, start=start, refresh=refresh if looks else objective.refresh, fixed=(*objective.fixed, *fixed)
    )


# What a loss sees of its place in a stage, where only shapes are asked for.
PROGRESS = {'progress': {'step': jnp.zeros((), jnp.int32), 'fraction': jnp.zeros(())}}


def shown_to(endpoints: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    """What the student's pass has seen: the stream's inputs, unless the objective altered them (hid tokens)."""
    return endpoints['inputs'] if 'inputs' in endpoints else inputs_of(fields)


def terms_from(sections: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[Weighted]:
    """Builds the terms of a config; a constructor gets those facts of the data that its signature asks for."""
    if not sections:
        raise UserError(f"{FIELD}.terms: is empty; add one, such as dict(name='soft_targets', temperature=4.0)")
    made: list[Weighted] = []
    for number, section in enumerate(sections):
        where = f'{FIELD}.terms[{number}]'
        check_type(section, Mapping, where)
        fields = dict(section)
        name, weight = fields.pop('name', None), fields.pop('weight', None)
        if name not in TERMS:
            raise UserError(f'{where}.name: {name!r} is not known; {nearest(str(name), TERMS)}')
        term = call(TERMS[name], fields, where, **asked(TERMS[name], facts))
        if weight is not None:
            check_level(weight, f'{where}.weight')
        before = sum(other.get('name') == name for other in sections[:number])
        label = f'{name}{before + 1}' if before else name
        made.append(Weighted(label, where, term, term.weight if weight is None else weight))
    return made


def require(weighted: Weighted, pair: Pair) -> None:
    """Refuses a term that reads an endpoint which its network does not give."""
    for who, found, names in (
        ('student', pair.student, weighted.term.student),
        ('teacher', pair.teacher, weighted.term.teacher),
    ):
        missing = next((name for name in names if name not in found), None)
        if missing and not found:
            raise UserError(
                f"{weighted.where}: wants the {who}'s '{missing}', and this objective shows no endpoints of it"
            )
        if missing:
            raise UserError(f"{weighted.where}: the {who} gives no '{missing}'; it gives {', '.join(sorted(found))}")


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


def check_decay(decay: float, itself: bool) -> None:
    """Refuses a decay that is no share, or of a teacher that cannot follow."""
    if not 0 <= decay <= 1:
        raise UserError(f'{FIELD}.decay: must lie in 0 … 1, not {decay}; 1 keeps the teacher as the stage finds it')
    if decay < 1 and not itself:
        raise UserError(f'{FIELD}.decay: is of a student that teaches itself; leave out the teacher, or the decay')
