"""Adapters that enter a model from outside, by rule: `config.model.peft=dict(name='lora', rank=8)`."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from tl_jax.config import call
from tl_jax.errors import UserError, nearest
from tl_jax.peft.adalora import adalora
from tl_jax.peft.base import Adapter, adapted, merged, unmerged
from tl_jax.peft.bottleneck import houlsby, parallel, pfeiffer
from tl_jax.peft.fourier import fourierft
from tl_jax.peft.lora import dora, lora, olora, pissa, rslora, vera
from tl_jax.peft.orthogonal import oft
from tl_jax.peft.prefixes import prefix
from tl_jax.peft.prompts import p_tuning, prompt
from tl_jax.peft.scaling import ia3, ssf
from tl_jax.peft.structured import loha, lokr
from tl_jax.peft.targets import default_targets
from tl_jax.peft.visual_prompts import vpt

__all__ = ['ADAPTERS', 'Adapter', 'adapted', 'adapters_from', 'merged', 'unmerged']

# name -> constructor(**fields of config.model.peft)
ADAPTERS: Mapping[str, Callable[..., Adapter]] = {
    'adalora': adalora,
    'dora': dora,
    'fourierft': fourierft,
    'houlsby': houlsby,
    'ia3': ia3,
    'loha': loha,
    'lokr': lokr,
    'lora': lora,
    'oft': oft,
    'olora': olora,
    'p_tuning': p_tuning,
    'parallel': parallel,
    'pfeiffer': pfeiffer,
    'pissa': pissa,
    'prefix': prefix,
    'prompt': prompt,
    'rslora': rslora,
    'ssf': ssf,
    'vera': vera,
    'vpt': vpt,
}


def adapters_from(
    section: Mapping[str, Any], family: str, field: str = 'config.model.peft'
) -> dict[str, tuple[Adapter, str]]:
    """The adapters of a config's section, as `adapted` takes them.

    Args:
      section: `dict(name='lora', rank=8)`, an adapter then called 'default'; or `dict(english=dict(name='lora'), …)`.
      family: class of the backbone, for the rules that are not given.
      field: the section's name in the config.
    """
    named = {'default': section} if isinstance(section.get('name'), str) else section
    adapters = {}
    for name, fields in named.items():
        # It is a step of its leaves' paths.
        if not re.fullmatch(r'\w+', name):
            raise UserError(f'{field}: no adapter can be called {name!r}; use letters, digits and _ alone')
        where = field if named is not section else f'{field}.{name}'
        if not isinstance(fields, Mapping) or 'name' not in fields:
            raise UserError(
                f"{where}: must be a method with its fields, such as dict(name='lora', rank=8), not {fields!r}"
            )
        kind = fields['name']
        if kind not in ADAPTERS:
            raise UserError(f'{where}.name: there is no method {kind!r}; {nearest(str(kind), ADAPTERS)}')
        adapter = call(ADAPTERS[kind], {k: v for k, v in fields.items() if k != 'name'}, where)
        adapters[name] = adapter, adapter.targets or default_targets(family, where)
    return adapters
