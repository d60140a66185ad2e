"""From a section like `config.model` to a network as pure functions: weights, adapters and few bits included."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from tl_jax import models, pretrained
from tl_jax.config import call
from tl_jax.errors import UserError
from tl_jax.objectives import Model
from tl_jax.peft import files as peft_files
from tl_jax.peft.quantized import forgetful, quantized


def model_from(
    *,
    name: str,
    source: str | None = None,
    ignore: list = (),
    fresh: list = (),
    pick: list = (),
    num_classes: int | None = None,
    peft: str | Mapping | None = None,
    active: list | None = None,
    quantize: Mapping | None = None,
    classes: int,
    dtype: Any,
    load: bool,
    **overrides: Any,
) -> Model:
    """Builds a network as pure functions, its pretrained weights read when `init` is called.

    Args:
      name: of the architecture, `tl_jax.models.list_models()`.
      source: of pretrained weights: a path, `hf://org/repo/file` or `shipped:NAME`; None for a random start.
      ignore: regexes of stored tensors that are not wanted.
      fresh: regexes of parameters that keep their random start.
      pick: the source's blocks, by number, that become ours: `pick=[2, 4], depth=2` is every other of four. All unless given.
      num_classes: width of the head, 0 for none; the data's number of classes unless given.
      peft: an adapter, `dict(name='lora', rank=8)`, or several by names of their own; see `tl_jax.peft.ADAPTERS`. The path
        of a folder of Hugging Face's `peft`, 'hf://org/adapter' say, stands for what it holds.
      active: names of the adapters that act; all unless given.
      quantize: how a frozen base is held, `dict(name='nf4')`; see `tl_jax.peft.quantized.quantized`.
      classes: the data's number of classes.
      dtype: of the computation.
      load: whether to read `source`.
      **overrides: the architecture's own fields.
    """
    module = module_from(name=name, num_classes=num_classes, classes=classes, dtype=dtype, **overrides)
    if pick and not source:
        raise UserError('config.model.pick: names blocks of weights, and there is no source of them; give model.source')
    loading = {'name': name, 'source': source, 'ignore': ignore, 'fresh': fresh, 'pick': pick} if source else None

    def start(key, inputs):
        return dict(jax.jit(lambda k, x: module.init(k, x, train=False))(key, inputs))

    def init(key, inputs):
        variables = start(key, inputs)
        if not (loading and load):
            return variables
        peft_files.refuse_adapters(source)
        return pretrained.fill_model(variables=variables, backbone=module.backbone, **loading)

    def classify(variables, features, *, train=False, rngs=None):
        return module.apply(variables, features, train, rngs=rngs, method='classify')

    model = Model(init, module.apply, classify)
    if quantize:
        model = forgetful(model, dtype=dtype)
    if peft:
        plain = model._replace(init=start)
        model = peft_files.model_with(plain, peft, module.backbone, active=active, loading=loading, load=load)
    elif active:
        raise UserError('config.model.active: there is no adapter; add model.peft=dict(name=…)')
    return call(quantized, quantize, 'config.model.quantize', model, dtype=dtype) if quantize else model


def layer_order(section: Mapping[str, Any]) -> tuple[str, ...]:
    """Regexes of the backbone's layers, from input to output, of a section like `config.model`."""
    return peft_files.backbone_of(section).layer_order


def module_from(*, name: str, num_classes: int | None = None, classes: int, **overrides: Any) -> models.Classifier:
    """The Linen module of a model's section: with the data's number of classes unless it states its own, 0 for no head."""
    width = classes if num_classes is None else num_classes
    return models.create_model(name, num_classes=width or None, **overrides)


def original_from(section: Mapping[str, Any], classes: int, dtype: Any, *, load: bool) -> Callable[[int], Model]:
    """Returns a function from the number of classes of `config.model.source` to that network, with the head it came with."""

    def original(num_classes: int) -> Model:
        if not section.get('source'):
            raise UserError('config.model.source: is none, so that there is no head of a source to keep; name one')
        unlike = ('source', 'ignore', 'fresh', 'pick', 'head', 'peft', 'active')
        fields = {**{k: v for k, v in section.items() if k not in unlike}, 'num_classes': num_classes}
        build = lambda **bits: call(model_from, fields | bits, 'config.model', classes=classes, dtype=dtype, load=False)
        model, whole = build(), build(quantize=None)

        def init(key, inputs):
            variables = whole.init(key, inputs)
            if not load:
                return variables
            rules = {name: section.get(name, ()) for name in ('ignore', 'pick')}
            filled, account = pretrained.overlay(section['source'], variables, **rules)
            lost = next((path for path in account.fresh if path.startswith('params/head/')), None)
            if lost:
                raise UserError(
                    f"config.model.source: has no '{lost.removeprefix('params/')}' for {num_classes} classes; set source_classes "
                    'to the number that it tells apart'
                )
            return filled

        return model._replace(init=init)

    return original
