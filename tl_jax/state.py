"""What a run carries from step to step, and which of it a stage leaves alone."""

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tl_jax import trees
from tl_jax.optimizers import Partition


class TrainState(NamedTuple):
    """Everything that training changes; a pytree.

    Attributes:
      step: int32 scalar, steps taken since the run began, over all stages.
      params: `{role: subtree}`, trainable and frozen together.
      collections: what is not a parameter, by name: `batch_stats`, `ema`, and whatever an objective keeps between steps.
      opt_state: of the current stage's optimizer; holds nothing for frozen leaves.
      key: the run's random key data; step t draws from `fold_in(key, t)`, so that a resumed run draws the same.
    """

    step: jax.Array
    params: dict[str, Any]
    collections: dict[str, Any]
    opt_state: Any
    key: jax.Array


def create_state(variables: Mapping[str, Any], seed: int) -> TrainState:
    """Returns the state before the first stage: variables and the run's key, no optimizer yet."""
    collections = {name: tree for name, tree in variables.items() if name != 'params'}
    return TrainState(
        jnp.zeros((), jnp.int32),
        variables['params'],
        collections,
        (),
        jax.random.key_data(jax.random.key(seed)),
    )


def variables_of(state: TrainState, *, averaged: bool = False) -> dict[str, Any]:
    """Returns `{'params': …, **collections}`, the parameters replaced by their moving average where asked for."""
    params = trees.merge(state.params, state.collections.get('ema', {})) if averaged else state.params
    return {'params': params, **{k: v for k, v in state.collections.items() if k != 'ema'}}


def with_variables(state: TrainState, variables: Mapping[str, Any]) -> TrainState:
    """The state with these variables for its own; its moving averages stay."""
    averages = {name: tree for name, tree in state.collections.items() if name == 'ema'}
    collections = {name: tree for name, tree in variables.items() if name != 'params'}
    return state._replace(params=variables['params'], collections={**collections, **averages})


def frozen_statistics(batch_stats: trees.Tree, params: trees.Tree, trainable: Set[str]) -> dict[str, Any]:
    """Returns a marker `frozen` for each batch-norm layer that a stage must not move.

    A layer is frozen when none of its parameters learns; one without parameters follows the smallest module around it that
    has some. Merged into `batch_stats`, the marker makes `tl_jax.models.layers.BatchNorm` use its stored statistics, also
    in training (as the layer will in evaluation), and leave them as they are.
    """
    paths = list(trees.flatten(params))
    markers = {}
    for module in sorted({path.rpartition('/')[0] for path in trees.flatten(batch_stats)}):
        around = module
        while around and not any(path.startswith(around + '/') for path in paths):
            around = around.rpartition('/')[0]
        if not any(path.startswith(around + '/') for path in trainable):
            markers[f'{module}/frozen'] = jnp.zeros((), bool)
    return trees.unflatten(markers)


def without_markers(batch_stats: trees.Tree) -> dict[str, Any]:
    """Removes what `frozen_statistics` added."""
    return trees.split(batch_stats, lambda path: not path.endswith('/frozen'))[0]


def enter_stage(state: TrainState, partition: Partition, *, ema: float) -> TrainState:
    """Starts a stage: a fresh optimizer over what it trains, and averages for the leaves that begin to learn."""
    trainable, _ = trees.split(state.params, partition.trainable.__contains__)
    collections = dict(state.collections)
    if ema:
        kept, _ = trees.split(collections.get('ema', {}), partition.trainable.__contains__)
        collections['ema'] = jax.tree.map(jnp.copy, trees.merge(trainable, kept))
    return state._replace(collections=collections, opt_state=partition.optimizer.init(trainable))


class Layout(NamedTuple):
    """What the states of one stage look like.

    Attributes:
      partition: which parameters learn, and how.
      state: shapes, dtypes and shardings in place of arrays.
    """

    partition: Partition
    state: TrainState

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)
