"""One step: the pure function that the loop compiles, and the layout of the state that it maps to the next."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tl_jax import mesh as mesh_lib
from tl_jax import trees
from tl_jax.experiment import Experiment
from tl_jax.gradients import Gradient
from tl_jax.objectives import Objective, phases_of
from tl_jax.optimizers import Partition
from tl_jax.state import (
    Layout,
    TrainState,
    create_state,
    enter_stage,
    frozen_statistics,
    variables_of,
    without_markers,
)


def create_train_step(
    objective: Objective,
    gradient: Gradient,
    partition: Partition,
    clip_norm: float,
    ema: float,
    *,
    first_step: int = 0,
    steps: int = 1,
    ema_from: float = 0.0,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the pure function of one step: each phase's gradient of its trainable parameters, and their update.

    Frozen parameters are constants to it, so nothing is computed for them; statistics of frozen layers stay.

    Args:
      objective: the method.
      gradient: how each phase's loss becomes a gradient.
      partition: what the stage trains.
      clip_norm: global norm that a phase's gradient is clipped to; 0 for none.
      ema: decay of the averaged parameters; 0 for none, 1 for their plain mean.
      first_step: the run's step at which the stage began.
      steps: of the stage.
      ema_from: share of the stage that is over when the averages begin.
    """

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        trainable, frozen = trees.split(state.params, partition.trainable.__contains__)
        collections, opt_state, metrics = variables_of(state), state.opt_state, {}
        del collections['params']
        place = progress(state.step - first_step, steps)
        if 'batch_stats' in collections:
            markers = frozen_statistics(collections['batch_stats'], state.params, partition.trainable)
            collections['batch_stats'] = trees.merge(collections['batch_stats'], markers)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        for number, phase in enumerate(phases_of(objective)):
            moving, still = trees.split(trainable, partition.phases[number].__contains__)

            def loss(moving, collections, batch, key, phase=phase, still=still):
                variables = {'params': trees.merge(frozen, still, moving), **collections, **place}
                return phase.loss(variables, batch, key)

            grads, value, aux = gradient.transform(loss)(moving, collections, batch, jax.random.fold_in(key, number))
            squares = jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)])
            norm = jnp.sqrt(jnp.sum(squares))
            if clip_norm:
                grads = jax.tree.map(lambda g, n=norm: g * jnp.minimum(1.0, clip_norm / n).astype(g.dtype), grads)
            trainable, opt_state = partition.update(number, grads, opt_state, trainable)
            collections = trees.merge(collections, aux.collections)
            prefix = f'train/{phase.name}/' if len(partition.phases) > 1 else 'train/'
            metrics |= {f'{prefix}loss': value, **{prefix + k: v for k, v in aux.metrics.items()}}
            metrics |= {f'{prefix}grad_norm': norm, f'{prefix}bad_leaf': jnp.argmin(jnp.isfinite(squares))}
        if 'batch_stats' in collections:
            collections['batch_stats'] = without_markers(collections['batch_stats'])
        if ema:
            decay = averaging(ema, state.step - first_step, round(ema_from * steps))
            mean = jax.tree.map(lambda m, p: decay * m + (1 - decay) * p, state.collections['ema'], trainable)
            collections['ema'] = mean
        params = trees.merge(frozen, trainable)
        return TrainState(state.step + 1, params, collections, opt_state, state.key), metrics

    return train_step


def averaging(ema: float, step: jax.Array, begin: int) -> jax.Array:
    """The share of the old average that stays at a step of the stage; 0 until `begin`, so that the average is the parameters.

    With ema = 1 it is n / (n + 1) after n steps: their plain mean, stochastic weight averaging (Izmailov et al. 2018,
    arXiv:1803.05407, algorithm 1 with every step an end of a cycle).
    """
    if ema < 1:
        return jnp.where(step < begin, 0.0, ema)
    taken = jnp.maximum(step - begin, 0).astype(jnp.float32)
    return taken / (taken + 1)


def progress(step: Any, steps: int) -> dict[str, Any]:
    """What a loss sees of its place in the stage: the step, and the fraction in [0, 1) that is done."""
    step = jnp.asarray(step, jnp.int32)
    return {'progress': {'step': step, 'fraction': step.astype(jnp.float32) / steps}}


def layouts(
    experiment: Experiment, mesh: jax.sharding.Mesh, records: Sequence[Mapping[str, Any]] = ()
) -> Callable[[int], Layout]:
    """Returns a function from the number of a stage to the layout of its states on the mesh.

    Args:
      experiment: whose stages they are.
      mesh: of devices.
      records: the run's log, which may grow, and which decides what some stages train.
    """
    ema = experiment.config['ema']

    @functools.cache
    def shapes_of(number: int) -> TrainState:
        if not experiment.begins(number):
            return shapes_of(number - 1)
        return jax.eval_shape(lambda v: create_state(v, experiment.config['seed']), experiment.shapes(number))

    every = trees.merge(*(shapes_of(number).params for number in range(len(experiment.stages))))
    by_parameter = mesh_lib.parameter_shardings(every, experiment.config['sharding'], mesh)

    def create(number: int) -> Layout:
        shapes = shapes_of(number)
        partition = experiment.partition(number, shapes.params, records)
        state = jax.eval_shape(lambda s: enter_stage(s, partition, ema=ema), shapes)
        shardings = mesh_lib.state_shardings(state, by_parameter, mesh)
        return Layout(partition, jax.tree.map(lambda s, n: s.update(sharding=n), state, shardings))

    created = functools.cache(create)
    return lambda number: (create if callable(experiment.stages[number].rules) else created)(number)
