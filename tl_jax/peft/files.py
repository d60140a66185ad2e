"""Adapters on file. A config names a folder of Hugging Face's `peft` by its path: `model.peft='hf://org/adapter'`.

A finished run with adapters leaves a small `model.safetensors`: its adapters and every other leaf that is not its base's. As
`model.source` of another run it is read as the whole network; `tl_jax.pretrained.based` has the format.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tl_jax import models, pretrained
from tl_jax.config import call
from tl_jax.errors import UserError
from tl_jax.objectives.base import Model
from tl_jax.peft import adapters_from
from tl_jax.peft.base import CONSTANTS, ROLE, adapted
from tl_jax.peft.huggingface import check_base, load_peft
from tl_jax.peft.quantized import KERNELS, held, restored
from tl_jax.trees import flatten, unflatten

ON_FILE = rf'(params|{CONSTANTS})/{ROLE}/.*'
Peft = str | Mapping[str, Any]


def sections(peft: Peft, backbone: nn.Module) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """What `config.model.peft` stands for: adapters' sections by name, and the leaves of those that are folders.

    Args:
      peft: a section, sections by name, or in the place of any section the path of an adapter folder.
      backbone: of the network.

    Returns:
      `{adapter: section}`, and `{path: array}`, collection included.
    """
    found, leaves = {}, {}
    for name, section in _named(peft).items():
        if isinstance(section, str):
            imported = load_peft(section, backbone, name=name)
            found |= imported.adapters
            leaves |= imported.leaves
        else:
            found[name] = section
    return found, leaves


def laid_over(variables: Mapping[str, Any], leaves: Mapping[str, np.ndarray], source: Any) -> dict[str, Any]:
    """The variables with the leaves of an adapter folder in the place of those that they are.

    Raises:
      UserError: the network has no such leaf, or of another shape; a value is not finite.
    """
    flat = flatten(variables)
    for path, leaf in leaves.items():
        there = flat.get(path)
        if there is None or there.shape != leaf.shape:
            has = 'no such leaf' if there is None else f'it is {list(there.shape)}'
            raise UserError(
                f'{source}: its {path.partition("/")[2]} is {list(leaf.shape)}, in this network {has}; is it the right '
                'model, and num_classes that of the adapter?'
            )
        if not np.isfinite(leaf).all():
            raise UserError(f'{source}: its {path.partition("/")[2]} has values that are not finite; fetch it again')
        flat[path] = jnp.asarray(leaf, there.dtype)
    return unflatten(flat)


def model_with(
    model: Model,
    peft: Peft,
    backbone: nn.Module,
    *,
    active: Sequence[str] | None = None,
    loading: Mapping[str, Any] | None = None,
    load: bool = True,
) -> Model:
    """A network with the adapters of `config.model.peft`, which begin as their method says, or as they are on file.

    The network's own weights are there before the adapters are made, as some are made of them; what is on file is laid over.

    Args:
      model: the network at a random start.
      peft: as in `sections`.
      backbone: of the network.
      active: names of the adapters that act; all unless given.
      loading: `name`, `source`, `ignore`, `fresh` and `pick` of `pretrained.fill_model`; None where there is no source.
      load: whether to read it.
    """
    found, leaves = sections(peft, backbone)
    if leaves and not loading:
        raise UserError(
            f'config.model.source: name the base that {peft} is for; an adapter of random weights is nothing'
        )
    on_file = load and loading is not None and holds_adapters(loading['source'])

    def begun(key, inputs):
        variables = model.init(key, inputs)
        if not loading or not load:
            return variables
        for section in _named(peft).values():
            if isinstance(section, str):
                check_base(section, loading['source'])
        rules = dict(loading)
        if on_file:
            rules |= {'ignore': [*rules['ignore'], ON_FILE], 'fresh': _matching(rules['fresh'], flatten(variables))}
        return pretrained.fill_model(variables=variables, backbone=backbone, **rules)

    whole = adapted(model._replace(init=begun), adapters_from(found, type(backbone).__name__), active=active)

    def init(key, inputs):
        variables = whole.init(key, inputs)
        if on_file:
            variables = pretrained.fill_model(variables=variables, backbone=backbone, **loading)
        return laid_over(variables, leaves, peft) if leaves and load else variables

    return whole._replace(init=init)


def stored(variables: Mapping[str, Any], section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What a run's file has to hold: the variables, or where they have adapters and a base what differs from that.

    Args:
      variables: of the adapted network, on the host.
      section: `config.model`.

    Returns:
      The leaves to save, and what the card says of their base; None where they are whole.
    """
    whole = {**variables, 'params': restored(variables['params']) if section.get('quantize') else variables['params']}
    # A base completes a file block by block, and picked ones are others than its own.
    if not section.get('peft') or not section.get('source') or section.get('pick'):
        return whole, None
    base, fresh = pretrained.root_of(section['source'], section.get('ignore', ()), section.get('fresh', ()))
    own = {path: leaf for path, leaf in flatten(whole).items() if not re.fullmatch(ON_FILE, path)}
    shapes = unflatten({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in own.items()})
    filled, _ = pretrained.overlay(
        base.source, shapes, backbone=backbone_of(section), ignore=base.ignore, fresh=_matching(fresh, own)
    )
    if section.get('quantize'):
        filled['params'] = as_held(filled['params'], section['quantize'])
    return pretrained.differences(whole, filled), base._asdict()


def as_held(params: Mapping[str, Any], quantize: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as they are restored from few bits, by `config.model.quantize`; those that are but shapes stay so."""
    flat = flatten(params)
    lacking = {path: leaf for path, leaf in flat.items() if isinstance(leaf, jax.ShapeDtypeStruct)}
    zeros = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in lacking.items()}
    return unflatten(flatten(restored(held(unflatten(flat | zeros), **{'rule': KERNELS, **quantize}))) | lacking)


def described(section: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` as a file says which network it holds: without its weights, folders of adapters by what they are."""
    fields = {name: value for name, value in section.items() if name not in ('source', 'ignore', 'fresh', 'pick')}
    return {**fields, 'peft': sections(fields['peft'], backbone_of(section))[0]} if fields.get('peft') else fields


def backbone_of(section: Mapping[str, Any]) -> nn.Module:
    """The backbone alone of a section like `config.model`, without weights, adapters or head."""
    fields = {name: value for name, value in section.items() if name not in (*pretrained.LOADING, 'head')}
    return call(models.create_model, fields, 'config.model').backbone


def holds_adapters(source: str) -> bool:
    """Whether a file of weights, ours then, has adapters."""
    path = pretrained.locate(source)
    return path.suffix == '.safetensors' and any(re.fullmatch(ON_FILE, name) for name in pretrained.read(path).tensors)


def refuse_adapters(source: str) -> None:
    """Refuses a file that has adapters, for a network that has none."""
    if holds_adapters(source):
        peft = pretrained.card_of(pretrained.read(pretrained.locate(source))).get('model', {}).get('peft')
        raise UserError(
            f'config.model.source: {source} has adapters; add model.peft={peft!r}, or merge them into a file of their own '
            'with --mode=export --merge'
        )


def _named(peft: Peft) -> Mapping[str, Any]:
    """`{adapter: section, or path of a folder}`."""
    return {'default': peft} if isinstance(peft, str) or isinstance(peft.get('name'), str) else peft


def _matching(rules: Sequence[str], paths: Iterable[str]) -> list[str]:
    """Those of the rules of leaves, `role/module/…/leaf`, that match one of the paths."""
    named = [path.partition('/')[2] for path in paths]
    return [rule for rule in rules if any(re.fullmatch(rule, name) for name in named)]
