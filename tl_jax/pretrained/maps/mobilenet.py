"""MobileNets: the names of torchvision, timm and Keras, and the layers of TFLite files in their order."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tl_jax.models.mobilenet import MobileNetV2
from tl_jax.models.mobilenet_v1 import MobileNetV1
from tl_jax.models.mobilenet_v3 import LARGE, SMALL, MobileNetV3
from tl_jax.pretrained.catalogue import Entry, Preprocessing
from tl_jax.pretrained.maps.hub_config import timm_fields
from tl_jax.pretrained.names import (
    COUNTERS,
    O11I,
    OHWI,
    OI11,
    ONE_HWC,
    SAME,
    Family,
    Origin,
    Rule,
    conv,
    dense,
    norm,
    permuted,
    stem_fit,
)

HWIO_1 = permuted(0, 1, 3, 2)  # Depthwise convolutions of Keras [height, width, channels, 1].


# torchvision and timm.


def conv_norms(ours: str, **names: tuple[str, str]) -> list[Rule]:
    """Their convolution and batch norm of each of our parts, `{part}` and `{part}_norm` of the module `ours`."""
    rules: list[Rule] = []
    for part, (conv_name, norm_name) in names.items():
        rules += conv(conv_name, f'{ours}/{part}')
        rules += norm(norm_name, f'{ours}/{part}_norm')
    return rules


def layer(conv_name: str, norm_name: str, ours: str) -> list[Rule]:
    """A `ConvNorm`."""
    return [*conv(conv_name, f'{ours}/conv'), *norm(norm_name, f'{ours}/norm')]


def squeeze(ours: str, reduce: str, expand: str) -> list[Rule]:
    """The two convolutions of a squeeze-and-excitation."""
    return [*conv(reduce, f'{ours}/se/reduce'), *conv(expand, f'{ours}/se/expand')]


def timm_block(theirs: str, ours: str, expands: bool) -> list[Rule]:
    """An inverted residual of timm. One that does not expand has other names."""
    if expands:
        names = {'expand': ('conv_pw', 'bn1'), 'depthwise': ('conv_dw', 'bn2'), 'project': ('conv_pwl', 'bn3')}
    else:
        names = {'depthwise': ('conv_dw', 'bn1'), 'project': ('conv_pw', 'bn2')}
    rules = conv_norms(ours, **{part: (f'{theirs}.{c}', f'{theirs}.{n}') for part, (c, n) in names.items()})
    return rules + squeeze(ours, f'{theirs}.se.conv_reduce', f'{theirs}.se.conv_expand')


def torchvision_block(theirs: str, ours: str, expands: bool, squeezes: bool) -> list[Rule]:
    """An inverted residual of torchvision's MobileNetV3 and EfficientNet, where a number stands for each part it has."""
    parts = ['expand'] * expands + ['depthwise'] + ['se'] * squeezes + ['project']
    numbers = {part: f'{theirs}.block.{i}' for i, part in enumerate(parts)}
    rules = conv_norms(ours, **{part: (f'{n}.0', f'{n}.1') for part, n in numbers.items() if part != 'se'})
    return rules + squeeze(ours, f'{numbers["se"]}.fc1', f'{numbers["se"]}.fc2') if squeezes else rules


def _v1_timm(backbone: MobileNetV1 | None) -> list[Rule]:
    rules = layer('conv_stem', 'bn1', 'backbone/stem')
    places = [(s, j) for s, (_, size, _) in enumerate((backbone or MobileNetV1()).stages) for j in range(size)]
    for i, (stage, j) in enumerate(places, start=1):
        theirs = f'blocks.{stage}.{j}'
        names = {
            'depthwise': (f'{theirs}.conv_dw', f'{theirs}.bn1'),
            'pointwise': (f'{theirs}.conv_pw', f'{theirs}.bn2'),
        }
        rules += conv_norms(f'backbone/block{i}', **names)
    return [*rules, *dense('classifier', 'head')]


def _v2_blocks(backbone: MobileNetV2 | None) -> Iterator[tuple[int, int, bool]]:
    """Stage, number in it, and whether it expands, of each block."""
    for stage, (expansion, _, size, _) in enumerate((backbone or MobileNetV2()).stages):
        yield from ((stage, j, expansion > 1) for j in range(size))


def _v2_torchvision(backbone: MobileNetV2 | None) -> list[Rule]:
    rules, i = layer('features.0.0', 'features.0.1', 'backbone/stem'), 0
    for i, (_, _, expands) in enumerate(_v2_blocks(backbone), start=1):
        names = [('0.0', '0.1'), ('1.0', '1.1'), ('2', '3')] if expands else [('0.0', '0.1'), ('1', '2')]
        parts = ['expand', 'depthwise', 'project'][-len(names) :]
        theirs = f'features.{i}.conv'
        names = {part: (f'{theirs}.{c}', f'{theirs}.{n}') for part, (c, n) in zip(parts, names, strict=True)}
        rules += conv_norms(f'backbone/block{i}', **names)
    rules += layer(f'features.{i + 1}.0', f'features.{i + 1}.1', 'backbone/final')
    return [*rules, *dense('classifier.1', 'head')]


def _v2_timm(backbone: MobileNetV2 | None) -> list[Rule]:
    rules = layer('conv_stem', 'bn1', 'backbone/stem')
    for i, (stage, j, expands) in enumerate(_v2_blocks(backbone), start=1):
        rules += timm_block(f'blocks.{stage}.{j}', f'backbone/block{i}', expands)
    return [*rules, *layer('conv_head', 'bn2', 'backbone/final'), *dense('classifier', 'head')]


def _v3_blocks(backbone: MobileNetV3 | None) -> Iterator[tuple[int, int, bool, bool]]:
    """Timm's stage (a run of blocks of equal width), number in it, whether it expands, and whether it squeezes."""
    before = 16
    for stage, (_, blocks) in enumerate(itertools.groupby((backbone or MobileNetV3()).blocks, lambda block: block[2])):
        for j, (_, wide, channels, squeezes, _, _) in enumerate(blocks):
            yield stage, j, wide != before, squeezes
            before = channels


def _v3_torchvision(backbone: MobileNetV3 | None) -> list[Rule]:
    rules, i = layer('features.0.0', 'features.0.1', 'backbone/stem'), 0
    for i, (_, _, expands, squeezes) in enumerate(_v3_blocks(backbone), start=1):
        rules += torchvision_block(f'features.{i}', f'backbone/block{i}', expands, squeezes)
    rules += layer(f'features.{i + 1}.0', f'features.{i + 1}.1', 'backbone/final')
    return [*rules, *dense('classifier.0', 'backbone/dense'), *dense('classifier.3', 'head')]


def _v3_timm(backbone: MobileNetV3 | None) -> list[Rule]:
    rules, stage = layer('conv_stem', 'bn1', 'backbone/stem'), 0
    for i, (stage, j, expands, _) in enumerate(_v3_blocks(backbone), start=1):
        rules += timm_block(f'blocks.{stage}.{j}', f'backbone/block{i}', expands)
    last = f'blocks.{stage + 1}.0'
    rules += layer(f'{last}.conv', f'{last}.bn1', 'backbone/final')
    rules += [
        Rule('conv_head.weight', 'params/backbone/dense/kernel', OI11),
        Rule('conv_head.bias', 'params/backbone/dense/bias', SAME),
    ]
    return [*rules, *dense('classifier', 'head')]


# TFLite and Keras.


def tflite(modules: Sequence[str], head_kinds: Sequence[str] = ('conv', 'fc')) -> list[Rule]:
    """The layers NN of a file, numbered in the order of computation: these modules of the backbone, then the head."""
    rules = []
    for number, module in enumerate(modules):
        kind, layout = ('dw', ONE_HWC) if 'depthwise' in module else ('conv', OHWI)
        rules += _tflite_layer(f'{number:02}_{kind}_{{rest*}}', f'backbone/{module}', layout)
    for kind in head_kinds:
        rules += _tflite_layer(f'{len(modules):02}_{kind}_{{rest*}}', 'head', O11I)
    return rules


def _tflite_layer(theirs: str, ours: str, layout) -> list[Rule]:
    return [
        Rule(f'{theirs}/weight', f'params/{ours}/kernel', layout),
        Rule(f'{theirs}/bias', f'params/{ours}/bias', SAME),
    ]


def _v1_modules(backbone: MobileNetV1 | None) -> list[str]:
    blocks = sum(size for _, size, _ in (backbone or MobileNetV1()).stages)
    return ['stem/conv', *(f'block{i}/{part}' for i in range(1, blocks + 1) for part in ('depthwise', 'pointwise'))]


def _v2_modules(backbone: MobileNetV2 | None) -> list[str]:
    modules = ['stem/conv']
    for i, (_, _, expands) in enumerate(_v2_blocks(backbone), start=1):
        modules += [f'block{i}/{part}' for part in ('expand', 'depthwise', 'project')[0 if expands else 1 :]]
    return [*modules, 'final/conv']


def numbered(kind: str, number: int) -> str:
    """The name that Keras gives to a model's layer of this kind: `conv2d`, `conv2d_1`, …"""
    return f'{kind}_{number}' if number else kind


def keras_layer(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """A convolution or dense layer of Keras."""
    return (
        Rule(f'{theirs}/kernel', f'params/{ours}/kernel', SAME),
        Rule(f'{theirs}/bias', f'params/{ours}/bias', SAME),
    )


def keras_norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A batch norm of Keras."""
    return (
        Rule(f'{theirs}/gamma', f'params/{ours}/scale', SAME),
        Rule(f'{theirs}/beta', f'params/{ours}/bias', SAME),
        Rule(f'{theirs}/moving_mean', f'batch_stats/{ours}/mean', SAME),
        Rule(f'{theirs}/moving_variance', f'batch_stats/{ours}/var', SAME),
    )


def _v1_keras(backbone: MobileNetV1 | None) -> list[Rule]:
    """MLPerf Tiny's: convolutions, depthwise ones and norms each numbered from the first."""
    rules: list[Rule] = []
    for i, module in enumerate(_v1_modules(backbone)):
        ours = f'backbone/{module}'
        theirs = numbered('depthwise_conv2d' if i % 2 else 'conv2d', i // 2)
        if i % 2:
            rules += [
                Rule(f'{theirs}/depthwise_kernel', f'params/{ours}/kernel', HWIO_1),
                Rule(f'{theirs}/bias', f'params/{ours}/bias', SAME),
            ]
        else:
            rules += keras_layer(theirs, ours)
        rules += keras_norm(numbered('batch_normalization', i), f'{ours}_norm' if i else 'backbone/stem/norm')
    return [*rules, *keras_layer('dense', 'head')]


# Sizes that timm's architectures have, as fields of ours.
_TIMM, _TF = dict(epsilon=1e-5, momentum=0.9), dict(epsilon=1e-3, momentum=0.9, padding='same')
_TIMM_V1 = {'mobilenetv1_100': dict(width=1.0), 'mobilenetv1_125': dict(width=1.25)}
_TIMM_V2 = {'mobilenetv2_050': dict(width=0.5), 'mobilenetv2_100': dict(width=1.0), 'mobilenetv2_140': dict(width=1.4)}
_TIMM_V3 = {
    f'{prefix}mobilenetv3_{size}_100': dict(blocks=blocks, dense_width=dense_width, **details)
    for size, blocks, dense_width in (('large', LARGE, 1280), ('small', SMALL, 1024))
    for prefix, details in (('', _TIMM), ('tf_', _TF))
}


_STEM_FIT = (stem_fit('backbone/stem/conv'),)
FAMILIES = (
    Family(
        MobileNetV2,
        (
            Origin('torchvision', r'features\.1\.conv\.0\.0\.weight', _v2_torchvision, COUNTERS),
            Origin('timm', r'blocks\.1\.0\.conv_pwl\.weight', _v2_timm, COUNTERS),
            Origin('tflite', r'51_conv_s1_act3/weight', lambda backbone: tflite(_v2_modules(backbone))),
        ),
        fits=lambda _: _STEM_FIT,
        fields=lambda config: timm_fields(config, _TIMM_V2),
    ),
    Family(
        MobileNetV1,
        (
            Origin('timm', r'blocks\.1\.0\.conv_pw\.weight', _v1_timm, COUNTERS),
            Origin('tflite', r'27_(conv|fc)_s1_act0/weight', lambda backbone: tflite(_v1_modules(backbone))),
            Origin('keras', r'depthwise_conv2d/depthwise_kernel', _v1_keras),
        ),
        fits=lambda _: _STEM_FIT,
        fields=lambda config: timm_fields(config, _TIMM_V1),
    ),
    Family(
        MobileNetV3,
        (
            Origin('torchvision', r'features\.1\.block\.0\.0\.weight', _v3_torchvision, COUNTERS),
            Origin('timm', r'conv_head\.bias', _v3_timm, COUNTERS),
        ),
        fits=lambda _: _STEM_FIT,
        fields=lambda config: timm_fields(config, _TIMM_V3),
    ),
)


def _entry(model: str, name: str, fields: Mapping[str, Any] = {}, **preprocessing: Any) -> dict[str, Entry]:
    """An entry by timm's name; bicubic resizing unless told otherwise."""
    preprocessing = dict(size=224, interpolation='bicubic') | preprocessing
    return {f'timm/{name}': Entry(model, f'hf://timm/{name}', 'apache-2.0', Preprocessing(**preprocessing), fields)}


_HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_PLAIN = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation='bilinear')
CATALOGUE = {
    **_entry('mobilenet_v1', 'mobilenetv1_100.ra4_e3600_r224_in1k', **_HALF),
    **_entry('mobilenet_v1', 'mobilenetv1_125.ra4_e3600_r224_in1k', dict(width=1.25), crop=0.9, **_HALF),
    **_entry('mobilenet_v2', 'mobilenetv2_050.lamb_in1k', dict(width=0.5)),
    **_entry('mobilenet_v2', 'mobilenetv2_100.ra_in1k'),
    **_entry('mobilenet_v2', 'mobilenetv2_140.ra_in1k', dict(width=1.4)),
    **_entry('mobilenet_v3_large', 'mobilenetv3_large_100.ra_in1k', _TIMM),
    **_entry('mobilenet_v3_large', 'mobilenetv3_large_100.ra4_e3600_r224_in1k', _TIMM, crop=0.95, **_HALF),
    **_entry('mobilenet_v3_large', 'mobilenetv3_large_100.miil_in21k_ft_in1k', _TIMM, **_PLAIN),
    **_entry('mobilenet_v3_small', 'mobilenetv3_small_100.lamb_in1k', _TIMM),
    **_entry('mobilenet_v3_large', 'tf_mobilenetv3_large_100.in1k', _TF, interpolation='bilinear', **_HALF),
    **_entry('mobilenet_v3_small', 'tf_mobilenetv3_small_100.in1k', _TF, interpolation='bilinear', **_HALF),
}
