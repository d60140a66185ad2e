"""The protocol between the loop and the methods."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Model(NamedTuple):
    """A network as two pure functions; `init` also loads pretrained weights, so what copies them copies the loaded ones.

    Attributes:
      init: (key, inputs) -> variables `{'params': {'backbone': …, 'head': …}, 'batch_stats': …}`.
      apply: as a Linen module's: (variables, inputs, train=…, mutable=…, rngs=…) -> endpoints, with `features` [B, D] and
        `logits` [B, C].
    """

    init: Callable
    apply: Callable


class Aux(NamedTuple):
    """What a loss gives besides its value: scalars to log, and the collections that it changed."""

    metrics: dict[str, Any]
    collections: dict[str, Any]


class Phase(NamedTuple):
    """One player's move within a step: a loss, and a regex over the trainable parameters that it moves."""

    name: str
    loss: Callable
    rule: str


class Objective(NamedTuple):
    """A transfer method.

    Attributes:
      init: (key, batch) -> variables: `{'params': {role: …}, 'batch_stats': {role: …}, …}`.
      loss: (variables, batch, key) -> (scalar, Aux), in training mode.
      predict: (variables, batch of an evaluation stream) -> dict of arrays, at least `logits`, for evaluation.
      phases: for several players, their moves in order, with repeats; empty for one loss that moves all.
      refresh: (variables, streams) -> collections, a pass over whole datasets between steps.
    """

    init: Callable
    loss: Callable
    predict: Callable
    phases: tuple[Phase, ...] = ()
    refresh: Callable | None = None


def inputs_of(stream: dict[str, Any]) -> Any:
    """What a model sees of a stream's batch: `image` [B, H, W, C], or `inputs` [B, F] of a table."""
    return stream['image'] if 'image' in stream else stream['inputs']


def phases_of(objective: Objective) -> tuple[Phase, ...]:
    """The moves of a step: one that moves everything, unless the objective says otherwise."""
    return objective.phases or (Phase('train', objective.loss, '.*'),)
