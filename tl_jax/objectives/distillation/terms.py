"""The terms by name."""

from collections.abc import Callable, Mapping

from tl_jax.objectives.distillation.attention import attention, fsp
from tl_jax.objectives.distillation.base import Term
from tl_jax.objectives.distillation.hints import hints, vid
from tl_jax.objectives.distillation.logits import dist, dkd, hard_targets, soft_targets, virtual_teacher

# name -> constructor(**fields of config.objective.distilled.terms[i])
TERMS: Mapping[str, Callable[..., Term]] = {
    'soft_targets': soft_targets,
    'hard_targets': hard_targets,
    'hints': hints,
    'attention': attention,
    'fsp': fsp,
    'vid': vid,
    'dkd': dkd,
    'dist': dist,
    'virtual_teacher': virtual_teacher,
}
