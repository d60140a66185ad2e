"""DenseNets: torchvision's and timm's names, which agree. torchvision still serves files with `norm.1` for `norm1`."""

from collections.abc import Mapping
from typing import Any

from tl_jax.models.densenet import MODELS, DenseNet
from tl_jax.pretrained.catalogue import Entry, Preprocessing
from tl_jax.pretrained.maps.hub_config import timm_architectures, timm_fields
from tl_jax.pretrained.names import COUNTERS, Family, Origin, conv, dense, norm, stem_fit

_LAYER = 'features.denseblock{block}.denselayer{layer}'
_OURS = 'backbone/block{block}/layer{layer}'
_RULES = (
    *conv('features.conv0', 'backbone/stem/conv'),
    *norm('features.norm0', 'backbone/stem/norm'),
    *norm(f'{_LAYER}.norm{{i}}', f'{_OURS}/norm{{i}}'),
    *conv(f'{_LAYER}.conv{{i}}', f'{_OURS}/conv{{i}}'),
    *norm('features.transition{block}.norm', 'backbone/transition{block}/norm'),
    *conv('features.transition{block}.conv', 'backbone/transition{block}/conv'),
    *norm('features.norm5', 'backbone/final_norm'),
    *dense('classifier', 'head'),
    # The first files' names. Exports take the rules above, as the first that match count.
    *norm(f'{_LAYER}.norm.{{i}}', f'{_OURS}/norm{{i}}'),
    *conv(f'{_LAYER}.conv.{{i}}', f'{_OURS}/conv{{i}}'),
)


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of an architecture of timm."""
    return timm_fields(config, timm_architectures(MODELS, CATALOGUE))


FAMILIES = (
    Family(
        DenseNet,
        (Origin('torchvision', r'features\.denseblock1\.denselayer1\.norm\.?1\.weight', lambda _: _RULES, COUNTERS),),
        fits=lambda _: (stem_fit('backbone/stem/conv'),),
        fields=_fields,
    ),
)


def _entry(model: str, tag: str) -> Entry:
    return Entry(model, f'hf://timm/{model}.{tag}', 'apache-2.0', Preprocessing(224, interpolation='bicubic'))


CATALOGUE = {
    'timm/densenet121.ra_in1k': _entry('densenet121', 'ra_in1k'),
    **{f'timm/densenet{depth}.tv_in1k': _entry(f'densenet{depth}', 'tv_in1k') for depth in (121, 161, 169, 201)},
}
