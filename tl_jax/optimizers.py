"""Rule lists to optax: which leaves a stage trains, with what, and how the learning rate moves."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tl_jax import trees
from tl_jax.config import asked, call
from tl_jax.errors import UserError, nearest
from tl_jax.peft.adalora import budgeted

# name -> (optax constructor, its own argument for decoupled weight decay)
OPTIMIZERS = {
    'sgd': (optax.sgd, None),
    'momentum': (partial(optax.sgd, momentum=0.9), None),
    'adam': (optax.adam, None),
    'adamw': (optax.adamw, 'weight_decay'),
    'adamax': (optax.adamax, None),
    'rmsprop': (optax.rmsprop, None),
    'lamb': (optax.lamb, 'weight_decay'),
    'lion': (optax.lion, 'weight_decay'),
    'adalora': (budgeted, 'weight_decay'),
    'adafactor': (optax.adafactor, 'weight_decay_rate'),
    'adadelta': (optax.adadelta, 'weight_decay'),
}


class Partition(NamedTuple):
    """What one stage trains and how.

    Attributes:
      trainable: paths of the parameters that learn; every other one is frozen.
      phases: for each phase of the objective, the trainable paths that it moves.
      optimizer: acts on the tree of trainable parameters alone.
      groups: for each phase, the optimizer's groups that it moves.
      schedules: `{rule: step within the stage -> learning rate}`.
    """

    trainable: frozenset[str]
    phases: tuple[frozenset[str], ...]
    optimizer: optax.GradientTransformation
    groups: tuple[frozenset[str], ...]
    schedules: dict[str, optax.Schedule]

    def update(self, phase: int, grads: trees.Tree, opt_state: Any, params: trees.Tree) -> tuple[dict[str, Any], Any]:
        """Moves the parameters of one phase; the others, and their moments, stay as they are.

        Args:
          phase: number of the phase.
          grads: of that phase's parameters.
          opt_state: of all trainable parameters.
          params: all trainable parameters.

        Returns:
          the trainable parameters and the optimizer's state after the step.
        """
        padded = trees.merge(jax.tree.map(jnp.zeros_like, params), grads)
        updates, moved = self.optimizer.update(padded, opt_state, params)
        inner = {g: (moved if g in self.groups[phase] else opt_state).inner_states[g] for g in moved.inner_states}
        mine, _ = trees.split(params, self.phases[phase].__contains__)
        updates, _ = trees.split(updates, self.phases[phase].__contains__)
        return trees.merge(params, optax.apply_updates(mine, updates)), moved._replace(inner_states=inner)

    def figures(self, opt_state: Any) -> dict[str, float]:
        """`{'gradient/<rule>': Σ_leaves |Σ_t g_t|₁}` over the stage so far, of the rules whose optimizer is `measured`."""
        number = lambda group: int(group.partition('/')[0])
        rules = dict(zip(sorted({*map(number, opt_state.inner_states)}), self.schedules, strict=True))
        sizes: dict[str, float] = {}
        for group, state in opt_state.inner_states.items():
            for found in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Measured)):
                if isinstance(found, Measured):
                    name = f'gradient/{rules[number(group)]}'
                    sizes[name] = sizes.get(name, 0.0) + sum(float(jnp.sum(jnp.abs(g))) for g in jax.tree.leaves(found))
        return sizes


class Measured(NamedTuple):
    """The sum of the gradients that a group has seen in a stage."""

    total: Any


def measured() -> optax.GradientTransformation:
    """Adds up the gradients and hands them on as they are."""
    return optax.GradientTransformation(
        lambda params: Measured(jax.tree.map(jnp.zeros_like, params)),
        lambda grads, state, params=None: (grads, Measured(jax.tree.map(jnp.add, state.total, grads))),
    )


def create_partition(
    rules: trees.Rules,
    params: trees.Tree,
    *,
    steps: int,
    phases: Sequence[tuple[str, str]] = (),
    field: str = 'train',
) -> Partition:
    """Turns a stage's rules into the partition of the parameters and its optimizer.

    Args:
      rules: `(regex, optimizer)` pairs; an optimizer is a dict as `create_optimizer` takes it, or None for frozen.
        Leaves that no rule matches are frozen.
      params: the parameters, `{role: subtree}`; only paths are looked at.
      steps: length of the stage, for the schedules.
      phases: name and regex of each move of a step; one that moves everything where there are none.
      field: name of the rules in the config, for error messages.

    Raises:
      UserError: a rule does nothing, an optimizer or schedule is not known, or nothing is left to train.
    """
    indices = [(rule[0], i) for i, rule in enumerate(rules)]
    flat = trees.flatten(params)
    winners = trees.match(indices, flat, field=field, default=None)
    winners = {path: i for path, i in winners.items() if i is not None and rules[i][1] is not None}
    for path, i in winners.items():
        if jnp.issubdtype(getattr(flat[path], 'dtype', jnp.float32), jnp.integer):
            raise UserError(
                f"{field}[{i}]: the rule '{rules[i][0]}' would train '{path}', which is held as {flat[path].dtype} codes; train "
                "'adapters/.*' and 'head/.*', or leave out config.model.quantize"
            )
    if not winners:
        raise UserError(f"{field}: trains no leaf; add a rule such as ('head/.*', dict(name='adamw', lr=1e-3))")
    winners = _moved_by_some(winners, rules, phases, field)
    moved = [frozenset(path for path in winners if re.fullmatch(rule, path)) for _, rule in phases]
    for (name, rule), paths in zip(phases, moved, strict=True):
        if not paths:
            raise UserError(f"{field}: leaves the phase '{name}' ({rule}) nothing to train; add a rule for it")
    moved = moved or [frozenset(winners)]
    # A group is what one rule and the same phases share, so that a phase moves whole groups.
    labels = {
        path: f'{i}/{"".join(f"{n}." for n, paths in enumerate(moved) if path in paths)}' for path, i in winners.items()
    }
    built = {
        i: create_optimizer(rules[i][1], steps=steps, where=f'{field}[{i}][1]') for i in sorted(set(winners.values()))
    }
    groups = {}
    for group in sorted(set(labels.values())):
        rule, _, members = group.partition('/')
        # optax counts updates, of which a step has as many as there are phases that move the group.
        groups[group], _ = create_optimizer(
            rules[int(rule)][1], steps=steps, updates=max(members.count('.'), 1), where=f'{field}[{rule}][1]'
        )
    return Partition(
        trainable=frozenset(winners),
        phases=tuple(moved),
        optimizer=optax.multi_transform(
            groups,
            trees.unflatten(labels),
        ),
        groups=tuple(frozenset(labels[path] for path in paths) for paths in moved),
        schedules={rules[i][0]: schedule for i, (_, schedule) in built.items()},
    )


def _moved_by_some(
    winners: Mapping[str, int], rules: trees.Rules, phases: Sequence[tuple[str, str]], field: str
) -> dict[str, int]:
    """The leaves that some phase moves; the others are frozen, whatever the rules say."""
    kept = {p: i for p, i in winners.items() if not phases or any(re.fullmatch(rule, p) for _, rule in phases)}
    for i in sorted(set(winners.values()) - set(kept.values())):
        if kept:
            raise UserError(
                f"{field}[{i}]: the rule '{rules[i][0]}' trains only what no phase of the objective moves; remove it "
                f'(phases: {", ".join(f"{name} {rule}" for name, rule in phases)})'
            )
    return kept


def create_optimizer(
    spec: Mapping[str, Any], *, steps: int, updates: int = 1, where: str
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds `dict(name=…, lr=…, weight_decay=0., **optax's own arguments)`.

    Weight decay is decoupled where optax's optimizer has it so (adamw, lamb, lion, adafactor), and otherwise added to the
    gradient, as in torch.optim. It is 0 unless given, whatever optax's default. With several `updates` a step the schedule
    still goes by steps.

    `max_norm=3.` keeps the norm of each unit's incoming weights to that (see the function). With `measured=True` its state also
    holds the sum of the stage's gradients, for `Partition.figures`.

    Returns:
      the transformation, and its learning rate as a function of the step within the stage.
    """
    if not isinstance(spec, Mapping):
        raise UserError(f"{where}: must be an optimizer such as dict(name='sgd', lr=0.1), not {spec!r}")
    options = dict(spec)
    name, lr, decay = options.pop('name', None), options.pop('lr', None), options.pop('weight_decay', 0.0)
    measure, norm = options.pop('measured', False), options.pop('max_norm', None)
    if name not in OPTIMIZERS:
        raise UserError(f'{where}.name: unknown optimizer {name!r}; {nearest(str(name), OPTIMIZERS)}')
    if lr is None:
        raise UserError(f'{where}.lr: is required; a number, or a schedule such as dict(name="cosine", peak=1e-3)')
    schedule = create_schedule(lr, steps=steps, where=f'{where}.lr')
    counted = schedule if updates == 1 else lambda count: schedule(count // updates)
    constructor, own_decay = OPTIMIZERS[name]
    extra = {own_decay: decay} if own_decay else {}
    extra |= asked(constructor, {'steps': steps * updates, 'field': where})
    optimizer = call(constructor, options, where, learning_rate=counted, **extra)
    if decay and not own_decay:
        optimizer = optax.chain(optax.add_decayed_weights(decay), optimizer)
    if norm is not None:
        optimizer = optax.chain(optimizer, max_norm(norm, f'{where}.max_norm'))
    return optax.chain(measured(), optimizer) if measure else optimizer, schedule


def scaled(spec: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The optimizer with its learning rate, a number or a schedule, times `factor`."""
    lr = spec.get('lr')
    if isinstance(lr, Mapping):
        lr = {**lr, **{name: lr[name] * factor for name in ('peak', 'end') if name in lr}}
    elif isinstance(lr, int | float):
        lr = lr * factor
    return {**spec, 'lr': lr}


def max_norm(limit: float, where: str = 'max_norm') -> optax.GradientTransformation:
    """Projects a kernel after the step: a column of norm above `limit` is scaled to it (Hinton et al. 2012, arXiv:1207.0580).

    A step p + u becomes p + (P(p + u) − p), so that it needs no place in the loop. Biases and other vectors are left alone.
    """
    if not isinstance(limit, int | float) or isinstance(limit, bool) or limit <= 0:
        raise UserError(f'{where}: must be a norm above 0, not {limit!r}')

    def project(update, param):
        if param.ndim < 2:
            return update
        after = param + update
        norms = jnp.sqrt(jnp.sum(jnp.square(after), axis=tuple(range(param.ndim - 1)), keepdims=True))
        return after * jnp.minimum(1.0, limit / jnp.maximum(norms, 1e-12)) - param

    return optax.stateless(lambda updates, params: jax.tree.map(project, updates, params))


def create_schedule(spec: float | Mapping[str, Any], *, steps: int, where: str = 'lr') -> optax.Schedule:
    """Builds a learning rate: a number, or `dict(name='cosine', peak=1e-3, warmup=100)`; see the functions below.

    `span=[a, b]` makes it the part from a to b, as fractions, of a schedule that several stages share.
    """
    if isinstance(spec, int | float) and not isinstance(spec, bool):
        return optax.constant_schedule(float(spec))
    if not isinstance(spec, Mapping):
        raise UserError(f'{where}: must be a number or a schedule, not {spec!r}')
    options = dict(spec)
    name = options.pop('name', None)
    if name not in SCHEDULES:
        raise UserError(f'{where}.name: unknown schedule {name!r}; {nearest(str(name), SCHEDULES)}')
    if 'span' in options:
        span = options.pop('span')
        if not isinstance(span, list | tuple) or len(span) != 2 or not 0 <= span[0] < span[1] <= 1:
            raise UserError(f'{where}.span: must be two fractions, the smaller one first, not {span!r}')
        begin, end = span
        whole = round(steps / (end - begin))
        inner = create_schedule({'name': name, **options}, steps=whole, where=where)
        return lambda count: inner(count + round(begin * whole))
    warmup = options.pop('warmup', 0)
    if not isinstance(warmup, int) or not 0 <= warmup < max(steps, 1):
        raise UserError(f'{where}.warmup: must be a number of steps below the {steps} of the stage, not {warmup!r}')
    schedule = call(SCHEDULES[name], options, where, steps=steps - warmup)
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, float(schedule(0)), warmup), schedule], [warmup])


def constant(*, peak: float, steps: int) -> optax.Schedule:
    """`peak` throughout."""
    del steps
    return optax.constant_schedule(peak)


def linear(*, peak: float, end: float = 0.0, steps: int) -> optax.Schedule:
    """A straight line from `peak` to `end`."""
    return optax.linear_schedule(peak, end, steps)


def exponential(*, peak: float, end: float, steps: int) -> optax.Schedule:
    """peak · (end / peak)^p, p the fraction that is done; `end` may be the higher one."""
    if min(peak, end) <= 0:
        raise UserError(f"a learning rate's exponential schedule: peak and end must be above 0, not {peak} and {end}")
    return lambda count: peak * (end / peak) ** (count / max(steps, 1))


def cosine(*, peak: float, end: float = 0.0, steps: int) -> optax.Schedule:
    """Half a cosine from `peak` to `end` (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5 without restarts)."""
    return optax.cosine_decay_schedule(peak, steps, alpha=end / peak if peak else 0.0)


def step(*, peak: float, at: list[float], factor: float = 0.1, steps: int) -> optax.Schedule:
    """`peak`, multiplied by `factor` at each of `at`: steps, or fractions of the stage where below 1."""
    boundaries = [round(a * steps) if a < 1 else int(a) for a in at]
    return optax.piecewise_constant_schedule(peak, {b: factor for b in boundaries})


def slanted_triangular(*, peak: float, cut: float = 0.1, ratio: float = 32.0, steps: int) -> optax.Schedule:
    """Up to `peak` over the fraction `cut`, then down to `peak / ratio` (Howard & Ruder 2018, arXiv:1801.06146, eq. 3)."""
    top = max(int(steps * cut), 1)

    def schedule(count):
        fraction = jnp.where(count < top, count / top, 1 - (count - top) / (top * (1 / cut - 1)))
        return peak * (1 + jnp.maximum(fraction, 0.0) * (ratio - 1)) / ratio

    return schedule


def annealed(*, peak: float, rate: float = 10.0, power: float = 0.75, steps: int) -> optax.Schedule:
    """peak / (1 + rate · p)^power, p the fraction that is done (Ganin et al. 2016, arXiv:1505.07818, sec. 5.2.2)."""
    return lambda count: peak / (1 + rate * count / steps) ** power


SCHEDULES = {
    'annealed': annealed,
    'constant': constant,
    'linear': linear,
    'exponential': exponential,
    'cosine': cosine,
    'step': step,
    'slanted_triangular': slanted_triangular,
}
