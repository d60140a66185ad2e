"""Name maps: which leaf of ours a foreign tensor is, and how its axes lie there. One map an origin, a list of rules.

A rule is `(regex, path, transform)`: the regex matches the whole foreign name, `path` names the leaf, collection
included, with the regex's groups in braces (`{block+1}` counts from one what the origin counts from zero), and
`transform` is a view of the tensor in our layout: kernels are [height, width, in, out] and [in, out].
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from tl_jax.errors import UserError
from tl_jax.pretrained.tensors import listed

# Wrappers put these before every name: DataParallel, torch.compile, Lightning.
PREFIXES = ('module.', '_orig_mod.', 'model.')

Transform = Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    regex: str
    path: str
    transform: Transform


class NameMap(NamedTuple):
    """The names of one origin.

    Attributes:
      origin: what to call it.
      mark: a regex; the map is taken for a file that has such a name.
      rules: of the tensors it knows; the first that matches counts.
      ignored: `(regex, why)` of tensors that have no place in an inference or fine-tuning model.
    """

    origin: str
    mark: str
    rules: tuple[Rule, ...]
    ignored: tuple[tuple[str, str], ...] = ()


class Target(NamedTuple):
    """Where a tensor goes: the leaf's path, collection included, and the view of the tensor that lies as ours."""

    path: str
    transform: Transform


def as_is(tensor: np.ndarray) -> np.ndarray:
    return tensor


def from_oihw(tensor: np.ndarray) -> np.ndarray:
    """Convolutions of torch [out, in, height, width], depthwise ones [channels, 1, height, width] among them."""
    return tensor.transpose(2, 3, 1, 0)


def from_ohwi(tensor: np.ndarray) -> np.ndarray:
    """Convolutions of TFLite [out, height, width, in]."""
    return tensor.transpose(1, 2, 3, 0)


def from_1hwc(tensor: np.ndarray) -> np.ndarray:
    """Depthwise convolutions of TFLite [1, height, width, channels]."""
    return tensor.transpose(1, 2, 0, 3)


def from_oi(tensor: np.ndarray) -> np.ndarray:
    """Dense layers of torch [out, in]."""
    return tensor.transpose(1, 0)


def from_o11i(tensor: np.ndarray) -> np.ndarray:
    """Dense layers that the origin wrote as 1×1 convolutions [out, 1, 1, in]."""
    return tensor.reshape(tensor.shape[0], tensor.shape[-1]).transpose(1, 0)


def _conv(name: str, module: str) -> tuple[Rule, ...]:
    return (
        Rule(rf'{name}\.weight', f'params/{module}/kernel', from_oihw),
        Rule(rf'{name}\.bias', f'params/{module}/bias', as_is),
    )


def _dense(name: str, module: str) -> tuple[Rule, ...]:
    return (
        Rule(rf'{name}\.weight', f'params/{module}/kernel', from_oi),
        Rule(rf'{name}\.bias', f'params/{module}/bias', as_is),
    )


def _norm(name: str, module: str) -> tuple[Rule, ...]:
    return (
        Rule(rf'{name}\.weight', f'params/{module}/scale', as_is),
        Rule(rf'{name}\.bias', f'params/{module}/bias', as_is),
        Rule(rf'{name}\.running_mean', f'batch_stats/{module}/mean', as_is),
        Rule(rf'{name}\.running_var', f'batch_stats/{module}/var', as_is),
    )


COUNTERS = ((r'(.*\.)?num_batches_tracked', 'a counter of torch, unused here'),)
_BLOCK = r'layer(?P<stage>\d)\.(?P<block>\d+)'
_OURS = 'backbone/stage{stage}/block{block+1}'

RESNET = NameMap(
    'resnet of torchvision, timm or akamaster',
    r'layer1\.0\.conv1\.weight',
    (
        *_conv('conv1', 'backbone/stem/conv'),
        *_norm('bn1', 'backbone/stem/norm'),
        *_conv(rf'{_BLOCK}\.conv(?P<i>\d)', f'{_OURS}/conv{{i}}'),
        *_norm(rf'{_BLOCK}\.bn(?P<i>\d)', f'{_OURS}/norm{{i}}'),
        *_conv(rf'{_BLOCK}\.(downsample|shortcut)\.0', f'{_OURS}/shortcut_conv'),
        *_norm(rf'{_BLOCK}\.(downsample|shortcut)\.1', f'{_OURS}/shortcut_norm'),
        *_dense('(fc|linear)', 'head'),
    ),
    COUNTERS,
)

_FEATURE = r'features\.(?P<block>\d+)\.conv'
MOBILENET_V2 = NameMap(
    'mobilenet_v2 of torchvision',
    r'features\.0\.0\.weight',
    (
        *_conv(r'features\.0\.0', 'backbone/stem/conv'),
        *_norm(r'features\.0\.1', 'backbone/stem/norm'),
        # The first block does not expand, so its parts have other numbers.
        *_conv(r'features\.1\.conv\.0\.0', 'backbone/block1/depthwise'),
        *_norm(r'features\.1\.conv\.0\.1', 'backbone/block1/depthwise_norm'),
        *_conv(r'features\.1\.conv\.1', 'backbone/block1/project'),
        *_norm(r'features\.1\.conv\.2', 'backbone/block1/project_norm'),
        *_conv(r'features\.18\.0', 'backbone/final/conv'),
        *_norm(r'features\.18\.1', 'backbone/final/norm'),
        *_conv(rf'{_FEATURE}\.0\.0', 'backbone/block{block}/expand'),
        *_norm(rf'{_FEATURE}\.0\.1', 'backbone/block{block}/expand_norm'),
        *_conv(rf'{_FEATURE}\.1\.0', 'backbone/block{block}/depthwise'),
        *_norm(rf'{_FEATURE}\.1\.1', 'backbone/block{block}/depthwise_norm'),
        *_conv(rf'{_FEATURE}\.2', 'backbone/block{block}/project'),
        *_norm(rf'{_FEATURE}\.3', 'backbone/block{block}/project_norm'),
        *_dense(r'classifier\.1', 'head'),
    ),
    COUNTERS,
)

OURS = NameMap(
    'tl_jax',
    r'params/.+',
    (Rule(r'(?P<path>\w+/.+)', '{path}', as_is),),
)


def _mobilenet_v2_tflite() -> tuple[Rule, ...]:
    """Layer NN of the file in the order of computation: stem, depthwise and project of block 1, then three a block."""
    modules = ['stem/conv', 'block1/depthwise', 'block1/project']
    modules += [f'block{n}/{part}' for n in range(2, 18) for part in ('expand', 'depthwise', 'project')]
    modules += ['final/conv']
    rules = []
    for number, module in enumerate(modules):
        layer, transform = (
            (f'{number:02}_dw_.*', from_1hwc) if 'depthwise' in module else (f'{number:02}_conv_.*', from_ohwi)
        )
        rules += [
            Rule(f'{layer}/weight', f'params/backbone/{module}/kernel', transform),
            Rule(f'{layer}/bias', f'params/backbone/{module}/bias', as_is),
        ]
    head = f'{len(modules):02}_(conv|fc)_.*'
    return (
        *rules,
        Rule(f'{head}/weight', 'params/head/kernel', from_o11i),
        Rule(f'{head}/bias', 'params/head/bias', as_is),
    )


MOBILENET_V2_TFLITE = NameMap(
    'mobilenet_v2 of TFLite, batch norm folded', r'51_conv_s1_act3/weight', _mobilenet_v2_tflite()
)

MAPS = (OURS, RESNET, MOBILENET_V2, MOBILENET_V2_TFLITE)


def choose(names: Iterable[str], source: str) -> NameMap:
    """Returns the map of the origin whose mark is among the names, which carry no prefix any more."""
    names = list(names)
    for each in MAPS:
        if any(re.fullmatch(each.mark, name) for name in names):
            return each
    known = '; '.join(each.origin for each in MAPS)
    raise UserError(
        f'{source}: no name map knows its tensors ({listed(names)}); known origins: {known}; '
        'or save it in our own format with save_variables'
    )


def without_prefix(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """Returns `{name: name without the prefixes that all of them share}` and those prefixes."""
    short = {name: name for name in names}
    prefix = ''
    while common := next((p for p in PREFIXES if short and all(s.startswith(p) for s in short.values())), ''):
        short = {name: s.removeprefix(common) for name, s in short.items()}
        prefix += common
    return short, prefix


def target(name_map: NameMap, name: str) -> Target | None:
    """Where the map's first matching rule sends a tensor; None if no rule matches."""
    for rule in name_map.rules:
        if match := re.fullmatch(rule.regex, name):
            return Target(_expand(rule.path, match), rule.transform)
    return None


def _expand(template: str, match: re.Match) -> str:
    """Fills `{group}` and `{group+1}`."""
    return re.sub(r'\{(\w+)(\+1)?\}', lambda m: str(int(match[m[1]]) + 1) if m[2] else match[m[1]], template)
