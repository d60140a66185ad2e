"""Named partitions: what a stage trains, as rules made from the network's own order of layers.

    train = dict(name='layerwise_decay', decay=0.75, optimizer=dict(name='adamw', lr=1e-3, weight_decay=0.05))

stands for a list of `(regex, optimizer)` pairs; `--dry_run` prints them. Such sections may also stand among pairs. The head is
the layer after the last.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tl_jax.config import call
from tl_jax.errors import UserError, nearest
from tl_jax.optimizers import scaled

Pairs = list[tuple[str, Any]]
# Leaves of one axis by nature: a Linen attention keeps its biases as [heads, dim].
BIAS = 'bias'


class Network(NamedTuple):
    """What rules are made for.

    Attributes:
      layers: regexes of leaf paths below `role`, from input to output.
      leaves: `{path: shape and dtype}` of all parameters.
      role: whose rules are made, the first part of their paths.
      field: of the rules in the config, for error messages.
      history: for each stage before with rules of this kind, `{rule: size of its gradient}`; see `unconverged`.
    """

    layers: Sequence[str]
    leaves: Mapping[str, Any]
    role: str = 'backbone'
    field: str = 'train'
    history: Sequence[Mapping[str, float]] = ()

    def below(self, regex: str) -> str:
        """The rule over whole paths for a regex of paths below the role."""
        outside = regex
        while '(' in outside:
            outside = re.sub(r'\([^()]*\)', '', outside)
        return f'{self.role}/(?:{regex})' if '|' in outside else f'{self.role}/{regex}'

    def matched(self, rule: str) -> list[str]:
        """The leaves that a rule matches."""
        return [path for path in self.leaves if re.fullmatch(rule, path)]


def layers_of(order: Sequence[str]) -> tuple[str, ...]:
    """The layers of an order: its entries, one of nothing but a final norm joined to the entry before, as timm joins them."""
    layers: list[str] = []
    for regex in order:
        if layers and re.fullmatch(r'(\w+/)*\(?(\w+_)?norm\)?/\.\*', regex):
            layers[-1] = f'{layers[-1]}|{regex}'
        else:
            layers.append(regex)
    return tuple(layers)


def expanded(
    train: Sequence[Any] | Mapping[str, Any],
    order: Sequence[str],
    leaves: Mapping[str, Any],
    *,
    field: str = 'train',
    history: Sequence[Mapping[str, float]] = (),
) -> Pairs:
    """Turns a stage's `train` into plain pairs.

    Args:
      train: a named partition, or a list in which such stand among pairs.
      order: `layer_order` of the backbone.
      leaves: `{path: shape and dtype}` of the parameters.
      field: name of `train` in the config, for error messages.
      history: see `Network`.

    Raises:
      UserError: a name or field is unknown, or a partition has nothing to train.
    """
    pairs: Pairs = []
    for item, where in _items(train, field):
        if isinstance(item, Mapping):
            network = Network(layers_of(order), leaves, field=where, history=history)
            pairs += call(_partition, item, where, network)
        else:
            pairs.append((item[0], item[1]))
    return pairs


def check(train: Sequence[Any] | Mapping[str, Any], field: str) -> None:
    """Refuses what is neither a pair nor a named partition."""
    for item, where in _items(train, field):
        pair = isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str)
        if not pair and not isinstance(item, Mapping):
            raise UserError(f"{where}: must be a pair ('regex', optimizer) or dict(name='head', …), not {item!r}")


def history_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The sizes of gradients that stages have logged last, `{rule: size}` of each."""
    prefix, found = 'gradient/', {}
    for record in records:
        sizes = {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}
        found |= {record['stage']: sizes} if sizes else {}
    return list(found.values())


def follows_history(train: Sequence[Any] | Mapping[str, Any]) -> bool:
    """Whether what the stages before have logged decides what is trained."""
    return any(isinstance(item, Mapping) and item.get('name') == 'unconverged' for item, _ in _items(train, ''))


def is_plain(train: Sequence[Any] | Mapping[str, Any]) -> bool:
    """Whether there are pairs alone."""
    return not any(isinstance(item, Mapping) for item, _ in _items(train, ''))


def _items(train: Sequence[Any] | Mapping[str, Any], field: str) -> list[tuple[Any, str]]:
    return [(train, field)] if isinstance(train, Mapping) else [(x, f'{field}[{i}]') for i, x in enumerate(train)]


def _partition(
    network: Network,
    /,
    *,
    name: str,
    optimizer: Mapping[str, Any],
    head: Mapping[str, Any] | bool = True,
    role: str = 'backbone',
    decay_vectors: bool = True,
    **options: Any,
) -> Pairs:
    """The fields that every named partition has.

    Args:
      network: what it is for.
      name: of `PARTITIONS`.
      optimizer: of the layer nearest to the output.
      head: the head's own optimizer; True for the same one, False for a head that stays as it is.
      role: the network whose layers these are, where an objective has several.
      decay_vectors: whether weight decay acts on biases, norms and other leaves of one axis too; timm leaves them out.
      **options: the partition's own fields.
    """
    if name not in PARTITIONS:
        raise UserError(f'{network.field}.name: there is no partition {name!r}; {nearest(name, PARTITIONS)}')
    network = network._replace(role=role)
    if not network.matched(f'{role}/.*'):
        raise UserError(f"{network.field}.role: there is no '{role}'; {nearest(role, _roles(network.leaves))}")
    pairs = call(PARTITIONS[name], options, network.field, network, optimizer=optimizer)
    heads = [('head/.*', optimizer if head is True else head)] if head and network.matched('head/.*') else []
    pairs = [*heads, *pairs]
    if not any(network.matched(rule) for rule, _ in pairs):
        raise UserError(f"{network.field}: '{name}' finds nothing to train in '{role}'; choose another partition")
    return pairs if decay_vectors else [part for pair in pairs for part in _without_decay(network, *pair)]


def all_layers(network: Network, /, *, optimizer: Mapping[str, Any]) -> Pairs:
    """Everything, alike."""
    return [(f'{network.role}/.*', optimizer)]


def head_only(network: Network, /, *, optimizer: Mapping[str, Any]) -> Pairs:
    """A linear probe, where the head is linear."""
    del network, optimizer
    return []


def last_k(network: Network, /, *, optimizer: Mapping[str, Any], k: int) -> Pairs:
    """The last k layers, and the head (Yosinski et al. 2014, arXiv:1411.1792)."""
    return layerwise_decay(network, optimizer=optimizer, decay=1.0, k=k)


def surgical(network: Network, /, *, optimizer: Mapping[str, Any], layers: Sequence[int | str]) -> Pairs:
    """Chosen layers alone (Lee et al. 2022, arXiv:2210.11466).

    Args:
      network: what it is for.
      optimizer: of all of them.
      layers: numbers, from 0 at the input or from -1 at the output, or names of modules: 2, 'block3', 'stage1'. With
        `head=False` it is the paper's, where source and target share their classes.
    """
    chosen = sorted({i for layer in layers for i in _numbers(network, layer)}, reverse=True)
    return [(network.below(network.layers[i]), optimizer) for i in chosen]


def layerwise_decay(
    network: Network, /, *, optimizer: Mapping[str, Any], decay: float = 0.75, k: int | None = None, floor: float = 0.0
) -> Pairs:
    """lr_i = lr · max(decay^(L - i), floor) for layers i = 0 … L - 1, and lr for the head, the layer L.

    As BEiT (Bao et al. 2021, arXiv:2106.08254) and timm have it; ELECTRA (Clark et al. 2020, arXiv:2003.10555) decays once
    more below the head.

    Args:
      network: what it is for.
      optimizer: of the head.
      decay: of the learning rate from each layer to the one before.
      k: how many of the last layers learn; all unless given.
      floor: the least share of the learning rate (timm's `min_scale`).
    """
    count = len(network.layers)
    k = count if k is None else k
    if not 0 <= k <= count:
        raise UserError(f'{network.field}.k: {k}, and the backbone has {count} layers; choose 0 to {count}')
    if decay <= 0:
        raise UserError(f'{network.field}.decay: must be above 0, not {decay}')
    return [
        (network.below(network.layers[i]), scaled(optimizer, max(decay ** (count - i), floor)))
        for i in range(count - 1, count - k - 1, -1)
    ]


def discriminative(
    network: Network, /, *, optimizer: Mapping[str, Any], factor: float = 2.6, k: int | None = None
) -> Pairs:
    """lr_(l-1) = lr_l / 2.6 from the head down (ULMFiT, Howard & Ruder 2018, arXiv:1801.06146, sec. 3.2)."""
    if factor <= 0:
        raise UserError(f'{network.field}.factor: must be above 0, not {factor}')
    return layerwise_decay(network, optimizer=optimizer, decay=1 / factor, k=k)


def bias_only(network: Network, /, *, optimizer: Mapping[str, Any]) -> Pairs:
    """BitFit: the biases, those of norms among them, and the head (Ben Zaken et al. 2021, arXiv:2106.10199, sec. 3)."""
    return _found(network, [(f'{network.role}/(?:.*/)?{BIAS}', optimizer)], 'biases')


def norm_only(network: Network, /, *, optimizer: Mapping[str, Any]) -> Pairs:
    """Scales and offsets of the norms, and the head (Frankle et al. 2020, arXiv:2003.00152, for batch norm)."""
    return _found(network, [(rf'{network.role}/(?:.*/)?\w*norm\d*/(?:scale|bias)', optimizer)], 'norms with parameters')


def adapters(network: Network, /, *, optimizer: Mapping[str, Any], lora_plus: float = 1.0) -> Pairs:
    """The adapters of `config.model.peft`, and the head.

    Args:
      network: what it is for.
      optimizer: of all of them.
      lora_plus: learning rate of LoRA's B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354; they advise 16).
    """
    if not network.matched('adapters/.*'):
        raise UserError(f"{network.field}: there are no adapters; add model.peft=dict(name='lora', rank=8)")
    faster = [('adapters/.*/lora_b', scaled(optimizer, lora_plus))] if lora_plus != 1 else []
    return [*_found(network, faster, 'adapters with a lora_b'), ('adapters/.*', optimizer)]


def unconverged(network: Network, /, *, optimizer: Mapping[str, Any], percentile: float = 50.0) -> Pairs:
    """The layers that have not converged, and the head (AutoFreeze, Liu et al. 2021, arXiv:2102.01386, sec. 3.1).

    η_l = |g_l(T-1) - g_l(T)| / g_l(T-1), with g_l(T) the L1 norm of layer l's gradients summed over stage T. Of the layers
    that learned in stage T, the first whose η reaches the given percentile of them learns on, and all above it; those below
    stay frozen. Decided at the start of the stage from the stages before, so that frozen layers cost nothing.

    Args:
      network: what it is for; its history is that of the earlier stages with this partition.
      optimizer: of all of them.
      percentile: of η; 0 never freezes.
    """
    check_percentile(percentile, f'{network.field}.percentile')
    names = [network.below(layer) for layer in network.layers]
    sizes = [[sum(v for rule, v in stage.items() if name in rule) for name in names] for stage in network.history]
    first = 0
    for before, now in itertools.pairwise(sizes):
        first = first_unconverged(before, now, first, percentile)
    measured = {**optimizer, 'measured': True}
    return [(name, measured) for name in reversed(names[first:])]


def check_percentile(percentile: float, field: str) -> None:
    """Refuses one outside 0 … 100."""
    if not 0 <= percentile <= 100:
        raise UserError(f'{field}: must lie in 0 … 100, not {percentile}')


def first_unconverged(before: Sequence[float], now: Sequence[float], first: int, percentile: float) -> int:
    """The first layer, from `first` on, whose relative change reaches the percentile of those changes."""
    before, now = np.asarray(before[first:], float), np.asarray(now[first:], float)
    # A layer without a gradient has nothing to learn from.
    change = np.divide(np.abs(before - now), before, out=np.zeros_like(now), where=before > 0)
    return first + int(np.argmax(change >= np.percentile(change, percentile)))


PARTITIONS: Mapping[str, Callable[..., Pairs]] = {
    'all': all_layers,
    'head': head_only,
    'last_k': last_k,
    'surgical': surgical,
    'layerwise_decay': layerwise_decay,
    'discriminative': discriminative,
    'bias_only': bias_only,
    'norm_only': norm_only,
    'adapters': adapters,
    'unconverged': unconverged,
}


def _found(network: Network, pairs: Pairs, what: str) -> Pairs:
    for rule, _ in pairs:
        if not network.matched(rule):
            raise UserError(f'{network.field}: the network has no {what}; choose another partition')
    return pairs


def _numbers(network: Network, layer: int | str) -> list[int]:
    """The numbers of the layers that a number or a module's name stands for."""
    count, field = len(network.layers), f'{network.field}.layers'
    if isinstance(layer, int):
        if not -count <= layer < count:
            raise UserError(f'{field}: {layer}, and the backbone has {count} layers; choose 0 to {count - 1}')
        return [layer % count]
    start = f'{network.role}/{layer}'
    inside = [path for path in network.leaves if path == start or path.startswith(f'{start}/')]
    rules = [network.below(regex) for regex in network.layers]
    found = [i for i, rule in enumerate(rules) if any(re.fullmatch(rule, path) for path in inside)]
    if not found:
        modules = {'/'.join(p.split('/')[1:n]) for p in network.matched(f'{network.role}/.*') for n in (2, 3)} - {''}
        raise UserError(f"{field}: there is no '{layer}' in '{network.role}'; {nearest(layer, modules)}")
    return found


def _without_decay(network: Network, rule: str, optimizer: Any) -> Pairs:
    """A rule in two: without weight decay for leaves of one axis, as it was for the others."""
    matched = network.matched(rule)
    vectors = {path for path in matched if path.endswith(f'/{BIAS}') or len(network.leaves[path].shape) < 2}
    free = {**optimizer, 'weight_decay': 0.0} if isinstance(optimizer, Mapping) else optimizer
    if not vectors or free == optimizer:
        return [(rule, optimizer)]
    if len(vectors) == len(matched):
        return [(rule, free)]
    names = sorted({path.rpartition('/')[2] for path in vectors})
    regex = f'(?=.*/({"|".join(names)})$)(?:{rule})'
    if set(network.matched(regex)) & (set(matched) - vectors):
        regex = '|'.join(map(re.escape, sorted(vectors)))
    return [(regex, free), (rule, optimizer)]


def _roles(leaves: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(path.partition('/')[0] for path in leaves))
