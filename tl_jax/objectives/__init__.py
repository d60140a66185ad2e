"""Objectives: what a transfer method minimises, as pure functions of variables, a batch and a key.

An objective is to losses what an `optax.GradientTransformation` is to updates: a named tuple of pure functions, made by a
constructor whose keyword arguments are the fields of `config.objective`.
"""

from collections.abc import Callable, Mapping

from tl_jax.objectives.adversarial import adda, cdan, dann
from tl_jax.objectives.base import (
    Aux,
    Model,
    Models,
    Objective,
    Phase,
    inputs_of,
    phases_of,
    started,
    with_loss,
    without_endpoints,
)
from tl_jax.objectives.bi_tuning import bi_tuning
from tl_jax.objectives.contrastive import contrastive
from tl_jax.objectives.discrepancy import mcd
from tl_jax.objectives.distillation.distilled import distilled
from tl_jax.objectives.language import causal_lm, mlm, regression, token_labelling
from tl_jax.objectives.matching import coral, dan
from tl_jax.objectives.meta import joint, maml
from tl_jax.objectives.multitask import multitask
from tl_jax.objectives.mutual import mutual
from tl_jax.objectives.orthogonal import orthogonal
from tl_jax.objectives.penalties import bss, l1, l2
from tl_jax.objectives.prototypes import protonet
from tl_jax.objectives.references import delta, l2_sp
from tl_jax.objectives.source_free import shot
from tl_jax.objectives.source_head import co_tuning, lwf
from tl_jax.objectives.stochastic import mixout, r_drop, stoch_norm
from tl_jax.objectives.supervised import supervised, unsupervised
from tl_jax.objectives.teachers import self_ensembling
from tl_jax.objectives.views import mixed

__all__ = [
    'OBJECTIVES',
    'WRAPPERS',
    'Aux',
    'Model',
    'Models',
    'Objective',
    'Phase',
    'inputs_of',
    'mixed',
    'phases_of',
    'started',
    'supervised',
    'with_loss',
    'without_endpoints',
]

# name -> constructor(model, **fields of config.objective)
OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    'self_ensembling': self_ensembling,
    'shot': shot,
    'supervised': supervised,
    'unsupervised': unsupervised,
    'contrastive': contrastive,
    'dann': dann,
    'cdan': cdan,
    'adda': adda,
    'coral': coral,
    'dan': dan,
    'multitask': multitask,
    'mutual': mutual,
    'mcd': mcd,
    'protonet': protonet,
    'maml': maml,
    'joint': joint,
    'mlm': mlm,
    'causal_lm': causal_lm,
    'token_labelling': token_labelling,
    'regression': regression,
}
# name -> wrapper(objective, **fields of config.objective.<name>). Wrapped in this order, whatever a config's is (a config does
# not keep one): what changes the pass goes inside, what adds to the loss around it, what changes the batch around all.
WRAPPERS: Mapping[str, Callable[..., Objective]] = {
    'stoch_norm': stoch_norm,
    'mixout': mixout,
    'r_drop': r_drop,
    'distilled': distilled,
    'l1': l1,
    'l2': l2,
    'orthogonal': orthogonal,
    'l2_sp': l2_sp,
    'delta': delta,
    'bss': bss,
    'lwf': lwf,
    'co_tuning': co_tuning,
    'bi_tuning': bi_tuning,
    'mixed': mixed,
}
