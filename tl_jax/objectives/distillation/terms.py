"""The terms by name."""

from collections.abc import Callable, Mapping

from tl_jax.objectives.distillation.base import Term
from tl_jax.objectives.distillation.logits import hard_targets, soft_targets

# name -> constructor(**fields of config.objective.distilled.terms[i])
TERMS: Mapping[str, Callable[..., Term]] = {
    'soft_targets': soft_targets,
    'hard_targets': hard_targets,
}
