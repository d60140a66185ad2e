"""Objectives: what a transfer method minimises, as pure functions of variables, a batch and a key.

An objective is to losses what an `optax.GradientTransformation` is to updates: a named tuple of pure functions, made by a
constructor whose keyword arguments are the fields of `config.objective`.
"""

from collections.abc import Callable, Mapping

from tl_jax.objectives.base import Aux, Model, Objective, Phase, inputs_of, phases_of
from tl_jax.objectives.supervised import supervised
from tl_jax.objectives.views import mixed

__all__ = ['OBJECTIVES', 'VIEWS', 'Aux', 'Model', 'Objective', 'Phase', 'inputs_of', 'mixed', 'phases_of', 'supervised']

# name -> constructor(model, **fields of config.objective)
OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    'supervised': supervised,
}
# name -> wrapper(objective, **fields of config.objective.<name>)
VIEWS: Mapping[str, Callable[..., Objective]] = {'mixed': mixed}
