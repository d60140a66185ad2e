"""The terms by name."""

from collections.abc import Callable, Mapping

from tl_jax.objectives.distillation.attention import attention, fsp
from tl_jax.objectives.distillation.base import Term
from tl_jax.objectives.distillation.contrast import crd
from tl_jax.objectives.distillation.exits import exits
from tl_jax.objectives.distillation.factors import factor_transfer
from tl_jax.objectives.distillation.hints import hints, srrl, vid
from tl_jax.objectives.distillation.logits import dist, dkd, hard_targets, soft_targets, virtual_teacher
from tl_jax.objectives.distillation.overhaul import ofd
from tl_jax.objectives.distillation.prototypes import prototypes
from tl_jax.objectives.distillation.relations import correlation, correlation_code, ickd, nst, pkt, rkd, similarity
from tl_jax.objectives.distillation.review import reviewkd
from tl_jax.objectives.distillation.text import (
    attention_scores,
    hidden_states,
    minilm,
    token_cosine,
    token_targets,
)

# name -> constructor(**fields of config.objective.distilled.terms[i])
TERMS: Mapping[str, Callable[..., Term]] = {
    'soft_targets': soft_targets,
    'hard_targets': hard_targets,
    'hints': hints,
    'attention': attention,
    'fsp': fsp,
    'vid': vid,
    'factor_transfer': factor_transfer,
    'ofd': ofd,
    'reviewkd': reviewkd,
    'srrl': srrl,
    'crd': crd,
    'dkd': dkd,
    'dist': dist,
    'virtual_teacher': virtual_teacher,
    'exits': exits,
    'pkt': pkt,
    'rkd': rkd,
    'similarity': similarity,
    'correlation': correlation,
    'correlation_code': correlation_code,
    'ickd': ickd,
    'nst': nst,
    'prototypes': prototypes,
    'token_targets': token_targets,
    'token_cosine': token_cosine,
    'hidden_states': hidden_states,
    'attention_scores': attention_scores,
    'minilm': minilm,
}
