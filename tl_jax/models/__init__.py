"""Linen models by name: a backbone and, where a number of classes is given, a head.

model = create_model('resnet18', num_classes=10)
variables = model.init(key, image, train=False)       # {'params': {'backbone': …, 'head': …}, 'batch_stats': …}
endpoints = model.apply(variables, image, train=False)  # every stage by name, 'features', 'logits'
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.config import call
from tl_jax.errors import UserError, nearest
from tl_jax.models import (
    bert,
    bit,
    clip,
    convnet,
    convnext,
    deberta,
    densenet,
    efficientnet,
    gpt2,
    inception,
    llama,
    lstm,
    mobilenet,
    mobilenet_v1,
    mobilenet_v3,
    resnet,
    squeezenet,
    swin,
    t5,
    text,
    tiny,
    vgg,
    vit,
    wide_resnet,
)
from tl_jax.models.heads import HEADS, Distilled

FAMILIES = (
    bert,
    bit,
    clip,
    convnet,
    convnext,
    deberta,
    densenet,
    efficientnet,
    gpt2,
    inception,
    llama,
    lstm,
    mobilenet,
    mobilenet_v1,
    mobilenet_v3,
    resnet,
    squeezenet,
    swin,
    t5,
    text,
    tiny,
    vgg,
    vit,
    wide_resnet,
)
MODELS = {name: constructor for family in FAMILIES for name, constructor in family.MODELS.items()}


class Classifier(nn.Module):
    """A backbone and a head, as the roles `backbone` and `head` of the parameters."""

    backbone: nn.Module
    head: nn.Module | None = None

    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        """Returns the backbone's endpoints, with `logits` [batch, classes] where there is a head, and with each of two heads'."""
        endpoints = self.backbone(image, train)
        if self.head is None:
            return endpoints
        if isinstance(self.head, Distilled):
            return {**endpoints, **self.head.endpoints(endpoints['features'])}
        return {**endpoints, 'logits': self.classify(endpoints['features'], train)}

    def classify(self, features: Float[Array, 'batch dim'], train: bool = False) -> Float[Array, 'batch classes']:
        """The head alone."""
        return self.head(features, train)


def list_models() -> list[str]:
    """Returns the name of every model, sorted."""
    return sorted(MODELS)


def create_model(
    name: str, *, num_classes: int | None = None, head: str | Mapping[str, Any] | None = None, **overrides: Any
) -> Classifier:
    """Builds a model.

    Args:
      name: one of `list_models()`.
      num_classes: width of the logits; None for no head.
      head: 'linear', 'mlp', 'cosine', 'weight_norm' or 'distilled', or with its fields:
        `dict(name='mlp', widths=[512], dropout=0.5)`; what the backbone was made for unless given, mostly 'linear'.
      **overrides: the backbone's own fields (see the module of its family), such as `dtype` and `width`.

    Raises:
      UserError: a name is unknown, or a field is, its value has the wrong type, or the head does not fit.
    """
    if name not in MODELS:
        raise UserError(f"model.name: there is no model '{name}'; {nearest(name, MODELS)}")
    if num_classes is not None and num_classes < 1:
        raise UserError(f'model.num_classes: must be at least 1, not {num_classes}; leave it out for no head')
    if 'dtype' in overrides:
        overrides['dtype'] = _dtype(overrides['dtype'])
    backbone = _construct(MODELS[name], overrides, 'model')
    if num_classes is None:
        if head is not None:
            raise UserError('model.head: without num_classes there is no head; give num_classes, or leave head out')
        return Classifier(backbone)
    fields = {'name': head} if isinstance(head, str) else dict(head or {})
    kind = fields.pop('name', getattr(backbone, 'head_kind', 'linear'))
    if kind not in HEADS:
        raise UserError(f"model.head: there is no head '{kind}'; {nearest(kind, HEADS)}")
    if kind == 'distilled' and getattr(backbone, 'head_kind', '') != 'distilled':
        raise UserError("model.head: 'distilled' is for the two tokens of a distilled transformer; choose 'linear'")
    return Classifier(backbone, _construct(HEADS[kind], fields, 'model.head', num_classes=num_classes))


def _construct(constructor, fields: Mapping[str, Any], where: str, **extra: Any) -> nn.Module:
    """Constructs a module from a config's fields. Lists become tuples, since Linen modules are hashed."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    # Linen's own two fields are not a config's.
    return call(constructor, fields, where, parent=None, name=None, **extra)


def _dtype(name: Any) -> jnp.dtype:
    known = ('float32', 'bfloat16', 'float16')
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        raise UserError(f"model.dtype: '{name}' is no type; {nearest(str(name), known)}") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"model.dtype: '{name}' is not a floating type; {nearest(str(name), known)}")
    return dtype
