"""Inception v3: torchvision's and timm's names, which agree. Loading ours there needs their `aux_logits=False`."""

from collections.abc import Mapping
from typing import Any

from tl_jax.models.inception import MODELS, InceptionV3
from tl_jax.pretrained.catalogue import Entry, Preprocessing
from tl_jax.pretrained.maps.hub_config import timm_architectures, timm_fields
from tl_jax.pretrained.names import COUNTERS, Family, Origin, conv, dense, norm, stem_fit

_RULES = (
    *conv('Conv2d_{layer*}.conv', 'backbone/conv2d_{layer*}/conv'),
    *norm('Conv2d_{layer*}.bn', 'backbone/conv2d_{layer*}/norm'),
    *conv('Mixed_{block*}.branch{branch*}.conv', 'backbone/mixed_{block*}/branch{branch*}/conv'),
    *norm('Mixed_{block*}.branch{branch*}.bn', 'backbone/mixed_{block*}/branch{branch*}/norm'),
    *dense('fc', 'head'),
)
_IGNORED = (*COUNTERS, (r'AuxLogits\..*', 'the auxiliary head, of use in training from scratch only'))


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of an architecture of timm."""
    return timm_fields(config, timm_architectures(MODELS, CATALOGUE))


FAMILIES = (
    Family(
        InceptionV3,
        (Origin('torchvision', r'Mixed_5b\.branch1x1\.conv\.weight', lambda _: _RULES, _IGNORED),),
        fits=lambda _: (stem_fit('backbone/conv2d_1a_3x3/conv'),),
        fields=_fields,
    ),
)
_HALVES = Preprocessing(299, (0.5,) * 3, (0.5,) * 3, interpolation='bicubic')
CATALOGUE = {
    f'timm/inception_v3.{tag}': Entry('inception_v3', f'hf://timm/inception_v3.{tag}', 'apache-2.0', preprocessing)
    for tag, preprocessing in (
        ('tv_in1k', _HALVES),
        ('tf_in1k', _HALVES),
        ('tf_adv_in1k', _HALVES),
        ('gluon_in1k', Preprocessing(299, interpolation='bicubic')),
    )
}
