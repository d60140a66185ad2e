"""EfficientNets: the names of torchvision and of timm."""

from collections.abc import Iterator, Mapping
from typing import Any

from tl_jax.models.efficientnet import SIZES, EfficientNet
from tl_jax.pretrained.catalogue import Entry, Preprocessing
from tl_jax.pretrained.maps.hub_config import timm_fields
from tl_jax.pretrained.maps.mobilenet import layer, timm_block, torchvision_block
from tl_jax.pretrained.names import COUNTERS, Family, Origin, Rule, dense, stem_fit


def _stages(backbone: EfficientNet | None) -> Iterator[tuple[int, bool]]:
    """Number of each stage, from 1, and whether its blocks expand."""
    for i, (expansion, *_) in enumerate((backbone or EfficientNet()).stages, start=1):
        yield i, expansion > 1


def _torchvision(backbone: EfficientNet | None) -> list[Rule]:
    rules, i = layer('features.0.0', 'features.0.1', 'backbone/stem'), 0
    for i, expands in _stages(backbone):
        rules += torchvision_block(f'features.{i}.{{block}}', f'backbone/stage{i}/block{{block+1}}', expands, True)
    rules += layer(f'features.{i + 1}.0', f'features.{i + 1}.1', 'backbone/final')
    return [*rules, *dense('classifier.1', 'head')]


def _timm(backbone: EfficientNet | None) -> list[Rule]:
    rules = layer('conv_stem', 'bn1', 'backbone/stem')
    for i, expands in _stages(backbone):
        rules += timm_block(f'blocks.{i - 1}.{{block}}', f'backbone/stage{i}/block{{block+1}}', expands)
    return [*rules, *layer('conv_head', 'bn2', 'backbone/final'), *dense('classifier', 'head')]


# What timm's own and its TensorFlow weights have, as fields of ours.
_TIMM, _TF = dict(epsilon=1e-5, momentum=0.9), dict(epsilon=1e-3, momentum=0.9, padding='same')
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    f'{prefix}efficientnet_{size}': dict(width=width, depth=depth, **details)
    for size, (width, depth) in SIZES.items()
    for prefix, details in (('', _TIMM), ('tf_', _TF))
}


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    return timm_fields(config, _ARCHITECTURES)


FAMILIES = (
    Family(
        EfficientNet,
        (
            Origin('torchvision', r'features\.1\.0\.block\.0\.0\.weight', _torchvision, COUNTERS),
            Origin('timm', r'blocks\.0\.0\.se\.conv_reduce\.weight', _timm, COUNTERS),
        ),
        fits=lambda _: (stem_fit('backbone/stem/conv'),),
        fields=_fields,
    ),
)


def _entry(architecture: str, tag: str, size: int, crop: float = 0.875, **fields: Any) -> dict[str, Entry]:
    """An entry by timm's name. Every one of them was trained with bicubic resizing."""
    preprocessing = Preprocessing(size, crop=crop, interpolation='bicubic', **fields)
    model, name = architecture.removeprefix('tf_'), f'{architecture}.{tag}'
    details = {k: v for k, v in _ARCHITECTURES[architecture].items() if k not in ('width', 'depth')}
    return {f'timm/{name}': Entry(model, f'hf://timm/{name}', 'apache-2.0', preprocessing, details)}


_HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_CROPS = (0.875, 0.882, 0.89, 0.904, 0.922, 0.934, 0.942, 0.949)
_TF_SIZES = (224, 240, 260, 300, 380, 456, 528, 600)
_WITHOUT = {('in1k', 6), ('in1k', 7)}  # The plain weights end at b5.
CATALOGUE = {
    **_entry('efficientnet_b0', 'ra_in1k', 224),
    **_entry('efficientnet_b0', 'ra4_e3600_r224_in1k', 224, 0.9, **_HALF),
    **_entry('efficientnet_b1', 'ft_in1k', 224),
    **_entry('efficientnet_b1', 'ra4_e3600_r240_in1k', 240, 0.9, **_HALF),
    **_entry('efficientnet_b2', 'ra_in1k', 256),
    **_entry('efficientnet_b3', 'ra2_in1k', 288),
    **_entry('efficientnet_b4', 'ra2_in1k', 320),
    **{
        name: entry
        for tag in ('in1k', 'aa_in1k', 'ap_in1k', 'ns_jft_in1k')
        for i, (size, crop) in enumerate(zip(_TF_SIZES, _CROPS, strict=True))
        if (tag, i) not in _WITHOUT
        for name, entry in _entry(
            f'tf_efficientnet_b{i}', tag, size, crop, **(_HALF if tag == 'ap_in1k' else {})
        ).items()
    },
}
