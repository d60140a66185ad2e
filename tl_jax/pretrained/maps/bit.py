"""BiT: Google's npz files and timm's `resnetv2_…_bit`."""

from collections.abc import Mapping
from typing import Any

from tl_jax.models.bit import MODELS, BiT
from tl_jax.pretrained.catalogue import Entry, Preprocessing
from tl_jax.pretrained.maps.hub_config import timm_architectures, timm_fields
from tl_jax.pretrained.names import OI11, SAME, Family, Layout, Origin, Rule, conv, norm, stem_fit

# Google's norms, [channels] in what timm reads, or [1, 1, 1, channels]; and its head [1, 1, in, out].
_ROW = Layout(lambda t: t.reshape(-1), lambda leaf: leaf)
_HEAD = Layout(lambda t: t.reshape(t.shape[-2:]), lambda leaf: leaf[None, None])
_BLOCK = 'backbone/stage{stage}/block'


def _google() -> tuple[Rule, ...]:
    # Units have two digits there: 01 … 36.
    units = [(f'resnet/block{{stage}}/unit0{n}', f'{_BLOCK}{n}') for n in range(1, 10)]
    units.append(('resnet/block{stage}/unit{unit}', f'{_BLOCK}{{unit}}'))
    return (
        _kernel('resnet/root_block', 'backbone/stem/conv'),
        *_group_norm('resnet', 'backbone/norm'),
        Rule('resnet/head/conv2d/kernel', 'params/head/kernel', _HEAD),
        Rule('resnet/head/conv2d/bias', 'params/head/bias', SAME),
        *(rule for theirs, ours in units for rule in _unit(theirs, ours)),
    )


def _unit(theirs: str, ours: str) -> tuple[Rule, ...]:
    rules = [_kernel(f'{theirs}/a/proj', f'{ours}/shortcut_conv')]
    for i, letter in enumerate('abc', start=1):
        rules += [_kernel(f'{theirs}/{letter}', f'{ours}/conv{i}')]
        rules += _group_norm(f'{theirs}/{letter}', f'{ours}/norm{i}')
    return tuple(rules)


def _kernel(theirs: str, ours: str) -> Rule:
    return Rule(f'{theirs}/standardized_conv2d/kernel', f'params/{ours}/kernel', SAME)


def _group_norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return (
        Rule(f'{theirs}/group_norm/gamma', f'params/{ours}/scale', _ROW),
        Rule(f'{theirs}/group_norm/beta', f'params/{ours}/bias', _ROW),
    )


_THEIRS, _OURS = 'stages.{stage}.blocks.{block}', 'backbone/stage{stage+1}/block{block+1}'
_TIMM = (
    *conv('stem.conv', 'backbone/stem/conv'),
    *norm('norm', 'backbone/norm'),
    *conv(f'{_THEIRS}.conv{{i}}', f'{_OURS}/conv{{i}}'),
    *norm(f'{_THEIRS}.norm{{i}}', f'{_OURS}/norm{{i}}'),
    *conv(f'{_THEIRS}.downsample.conv', f'{_OURS}/shortcut_conv'),
    Rule('head.fc.weight', 'params/head/kernel', OI11),
    Rule('head.fc.bias', 'params/head/bias', SAME),
)


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of an architecture of timm."""
    return timm_fields(config, timm_architectures(MODELS, CATALOGUE))


FAMILIES = (
    Family(
        BiT,
        (
            Origin('google', r'resnet/root_block/standardized_conv2d/kernel', lambda _: _google()),
            Origin('timm', r'stages\.0\.blocks\.0\.downsample\.conv\.weight', lambda _: _TIMM),
        ),
        fits=lambda _: (stem_fit('backbone/stem/conv'),),
        fields=_fields,
    ),
)

_HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_BICUBIC = Preprocessing(224, crop=0.875, interpolation='bicubic', **_HALF)


def _entry(model: str, tag: str, preprocessing: Preprocessing) -> tuple[str, Entry]:
    name = f'timm/{model.replace("bit_", "resnetv2_")}_bit.{tag}'
    return name, Entry(model, f'hf://{name}', 'apache-2.0', preprocessing)


_ALL = ('bit_50x1', 'bit_50x3', 'bit_101x1', 'bit_101x3', 'bit_152x2', 'bit_152x4')
CATALOGUE = dict(
    (
        *(_entry(model, 'goog_in21k', Preprocessing(224, crop=0.875, **_HALF)) for model in _ALL),
        *(_entry(model, 'goog_in21k_ft_in1k', Preprocessing(448, crop=1.0, **_HALF)) for model in _ALL[:-1]),
        _entry('bit_152x4', 'goog_in21k_ft_in1k', Preprocessing(480, crop=1.0, **_HALF)),
        _entry('bit_50x1', 'goog_distilled_in1k', _BICUBIC),
        _entry('bit_152x2', 'goog_teacher_in21k_ft_in1k', _BICUBIC),
        _entry(
            'bit_152x2',
            'goog_teacher_in21k_ft_in1k_384',
            Preprocessing(384, crop=1.0, interpolation='bicubic', **_HALF),
        ),
    )
)
