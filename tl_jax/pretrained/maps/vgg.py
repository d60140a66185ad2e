"""VGG: torchvision's names, and timm's, which differ after the convolutions."""

from collections.abc import Mapping
from typing import Any

from tl_jax.models.vgg import GRID, MODELS, VGG
from tl_jax.pretrained.catalogue import Entry, Preprocessing
from tl_jax.pretrained.maps.hub_config import timm_architectures, timm_fields
from tl_jax.pretrained.names import COUNTERS, SAME, Family, Layout, Origin, Rule, conv, dense, norm, stem_fit

# torchvision's linear layers, as convolutions: fc6 [out, channels · 7 · 7] over the 7×7 map, channels first.
_OVER_GRID = Layout(
    lambda t: t.reshape(t.shape[0], -1, GRID, GRID).transpose(2, 3, 1, 0),
    lambda leaf: leaf.transpose(3, 2, 0, 1).reshape(leaf.shape[-1], -1),
)
_AT_POSITION = Layout(lambda t: t.T[None, None], lambda leaf: leaf[0, 0].T)


def _features(backbone: VGG | None) -> list[Rule]:
    """The stages. Theirs is one list of layers, activations and pools counted."""
    backbone = backbone or VGG(stage_sizes=(2, 2, 3, 3, 3))
    rules, place, per_conv = [], 0, 3 if backbone.norm == 'batch' else 2
    for i, size in enumerate(backbone.stage_sizes, start=1):
        for j in range(1, size + 1):
            rules += conv(f'features.{place}', f'backbone/stage{i}/conv{j}')
            rules += norm(f'features.{place + 1}', f'backbone/stage{i}/norm{j}') if backbone.norm == 'batch' else ()
            place += per_conv
        place += 1
    return rules


def _linear_as_conv(theirs: str, ours: str, layout: Layout) -> tuple[Rule, ...]:
    return Rule(f'{theirs}.weight', f'params/{ours}/kernel', layout), Rule(
        f'{theirs}.bias', f'params/{ours}/bias', SAME
    )


def _torchvision(backbone: VGG | None) -> tuple[Rule, ...]:
    return (
        *_features(backbone),
        *_linear_as_conv('classifier.0', 'backbone/fc6', _OVER_GRID),
        *_linear_as_conv('classifier.3', 'backbone/fc7', _AT_POSITION),
        *dense('classifier.6', 'head'),
    )


def _timm(backbone: VGG | None) -> tuple[Rule, ...]:
    return (
        *_features(backbone),
        *conv('pre_logits.fc1', 'backbone/fc6'),
        *conv('pre_logits.fc2', 'backbone/fc7'),
        *dense('head.fc', 'head'),
    )


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of an architecture of timm."""
    return timm_fields(config, timm_architectures(MODELS, CATALOGUE))


FAMILIES = (
    Family(
        VGG,
        (
            Origin('timm', r'pre_logits\.fc1\.weight', _timm, COUNTERS),
            # MobileNetV3 has this `classifier`, too, but no convolution that is an item of `features`.
            Origin('torchvision', r'features\.[1-9]\d*\.weight', _torchvision, COUNTERS),
        ),
        fits=lambda _: (stem_fit('backbone/stage1/conv1'),),
        fields=_fields,
    ),
)
CATALOGUE = {
    f'timm/vgg{depth}{suffix}.tv_in1k': Entry(
        f'vgg{depth}{suffix}',
        f'hf://timm/vgg{depth}{suffix}.tv_in1k',
        'bsd-3-clause',
        Preprocessing(224),
        {'grid': 'slide'},
    )
    for depth in (11, 13, 16, 19)
    for suffix in ('', '_bn')
}
