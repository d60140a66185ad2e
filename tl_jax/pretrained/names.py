"""Names of an origin and ours, side by side: a list of rules that loads when read left to right and exports right to left.

A rule pairs two templates. `{block}` stands for a number, on both sides the same one; `{block+1}` for that number and one
more (our blocks count from one); `{path*}` for anything at all. Our side names a leaf, collection included. A tensor that
the origin holds in one piece and we in several (its query, key and value) has a tuple of templates on our side.

    Rule('layer{stage}.{block}.conv{i}.weight', 'params/backbone/stage{stage}/block{block+1}/conv{i}/kernel', OIHW)

A layout says how the axes lie: kernels of ours are [height, width, in, out] and [in, out].
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

# Wrappers put these before every name: DataParallel, torch.compile, Lightning.
PREFIXES = ('module.', '_orig_mod.', 'model.')


class Layout(NamedTuple):
    """A tensor's two layouts: `read` takes the origin's to ours, and `write` back. Both give views where they can.

    Where a rule has several leaves, `read` returns as many arrays and `write` takes as many.
    """

    read: Callable[[np.ndarray], Any]
    write: Callable[..., np.ndarray]


class Rule(NamedTuple):
    """Their name, our path or paths, and the layout. No path at all: see `nowhere`."""

    theirs: str
    ours: str | tuple[str, ...]
    layout: Layout

    @property
    def paths(self) -> tuple[str, ...]:
        """Our templates, also where there is but one."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


class Origin(NamedTuple):
    """Where files of a family come from, and how they name things.

    Attributes:
      name: what to call it: 'torchvision', 'timm', 'transformers', 'google', 'keras', …
      mark: a regex; a file with such a name is taken for this origin's, the first of the family's that fits.
      rules: backbone module -> rules; the first that matches counts, in either direction.
      ignored: `(regex, why)` of tensors that have no place in our model.
      prefix: before the backbone's names in files of whole models, and not in files of the bare one (`bert.`).
      refuses: backbone module -> why the origin's network computes something else though its tensors have names there, such
        as another pooling; '' where it does not. Asked before an export.
      refuses_head: backbone module -> what of it has the origin's heads take other features than ours; '' if they do not.
        Its heads are read and never written.
      files_only: a regex of names, holes and all, that its files have and its modules in memory do not.
    """

    name: str
    mark: str
    rules: Callable[[nn.Module | None], Sequence[Rule]]
    ignored: tuple[tuple[str, str], ...] = ()
    prefix: str = ''
    refuses: Callable[[nn.Module], str] = lambda backbone: ''
    refuses_head: Callable[[nn.Module], str] = lambda backbone: ''
    files_only: str = ''


class Fit(NamedTuple):
    """What to do with a tensor whose shape is not the leaf's, such as position embeddings of another grid.

    Attributes:
      ours: template of the leaf.
      change: (tensor in our layout, the leaf's shape) -> values of that shape; a ValueError where that makes no sense.
      what: for the account: 'resized', 'summed over its input channels'.
    """

    ours: str
    change: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    what: str


class Family(NamedTuple):
    """What pretrained files there are of one kind of network.

    Attributes:
      module: class of the backbone.
      origins: the name maps, most likely first.
      fits: backbone module -> how leaves are filled from tensors of other shapes.
      fields: `config.json` of Hugging Face (`model_type`) or timm (`architecture`) -> fields of the module; None if it
        describes no network of this family.
    """

    module: type[nn.Module]
    origins: tuple[Origin, ...]
    fits: Callable[[nn.Module | None], Sequence[Fit]] = lambda backbone: ()
    fields: Callable[[Mapping[str, Any]], dict[str, Any] | None] = lambda config: None


class NameMap(NamedTuple):
    """An origin's names for one network."""

    origin: str
    rules: tuple[Rule, ...]
    ignored: tuple[tuple[str, str], ...] = ()
    prefix: str = ''
    fits: tuple[Fit, ...] = ()
    refuses_head: str = ''


class Target(NamedTuple):
    """The leaves that a tensor goes to, collection included, and how it lies there."""

    paths: tuple[str, ...]
    layout: Layout


def permuted(*axes: int) -> Layout:
    """The layout whose reader is `tensor.transpose(axes)`."""
    back = tuple(int(i) for i in np.argsort(axes))
    return Layout(lambda tensor: tensor.transpose(axes), lambda leaf: leaf.transpose(back))


def stacked(count: int, layout: Layout, axis: int = 0) -> Layout:
    """`count` leaves of equal size, which the origin holds as one tensor, side by side along `axis` of its layout."""
    return Layout(
        lambda tensor: tuple(layout.read(part) for part in np.split(tensor, count, axis)),
        lambda *leaves: np.concatenate([layout.write(leaf) for leaf in leaves], axis),
    )


SAME = Layout(lambda tensor: tensor, lambda leaf: leaf)
OIHW = permuted(2, 3, 1, 0)  # Convolutions of torch, depthwise ones [channels, 1, height, width] among them.
OHWI = permuted(1, 2, 3, 0)  # Convolutions of TFLite.
ONE_HWC = permuted(1, 2, 0, 3)  # Depthwise convolutions of TFLite [1, height, width, channels].
OI = permuted(1, 0)  # Dense layers of torch.
# Dense layers that the origin wrote as 1×1 convolutions [out, 1, 1, in] and [out, in, 1, 1].
O11I = Layout(lambda t: t.reshape(t.shape[0], t.shape[-1]).T, lambda leaf: leaf.T[:, None, None, :])
OI11 = Layout(lambda t: t.reshape(t.shape[0], t.shape[1]).T, lambda leaf: leaf.T[:, :, None, None])


def conv(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A convolution of torch, with or without a bias. `ours` is the module, role included."""
    return (
        Rule(f'{theirs}.weight', f'params/{ours}/kernel', OIHW),
        Rule(f'{theirs}.bias', f'params/{ours}/bias', SAME),
    )


def dense(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A linear layer of torch."""
    return (
        Rule(f'{theirs}.weight', f'params/{ours}/kernel', OI),
        Rule(f'{theirs}.bias', f'params/{ours}/bias', SAME),
    )


def norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A normalisation of torch: with statistics if it is a batch norm."""
    return (
        Rule(f'{theirs}.weight', f'params/{ours}/scale', SAME),
        Rule(f'{theirs}.bias', f'params/{ours}/bias', SAME),
        Rule(f'{theirs}.running_mean', f'batch_stats/{ours}/mean', SAME),
        Rule(f'{theirs}.running_var', f'batch_stats/{ours}/var', SAME),
    )


def embed(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A table of embeddings [number, width], as torch and we have it."""
    return (Rule(f'{theirs}.weight', f'params/{ours}/embedding', SAME),)


def nowhere(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules of a part that this network is without: the account lists its tensors as ignored."""
    return tuple(rule._replace(ours=()) for rule in rules)


COUNTERS = ((r'(.*\.)?num_batches_tracked', 'a counter of torch, unused here'),)


def input_channels(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A first kernel [height, width, in, out] for other input channels, by timm's rule.

    One channel: the sum over the old ones. Others: the old ones in turn, scaled by old / new, so that an image whose
    channels are all alike gives what it gave.

    Raises:
      ValueError: the shapes differ in more than the input channels.
    """
    old, new = kernel.shape[2], shape[2]
    if kernel.ndim != 4 or (*kernel.shape[:2], new, kernel.shape[3]) != tuple(shape):
        raise ValueError(f'{kernel.shape} is not {shape} with other input channels')
    kernel = kernel.astype(np.float32)
    if new == 1:
        return kernel.sum(2, keepdims=True)
    return kernel[:, :, np.arange(new) % old] * (old / new)


def stem_fit(module: str) -> Fit:
    """The fit of a first convolution, `backbone/…`, whose images have other channels than the origin's."""
    return Fit(f'params/{module}/kernel', input_channels, 'adapted to the number of input channels')


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
        if (numbers := _matched(rule.theirs, name.removeprefix(name_map.prefix))) is not None:
            return Target(tuple(_filled(path, numbers) for path in rule.paths), rule.layout)
    return None


def foreign(name_map: NameMap, path: str) -> tuple[str, Target] | None:
    """The tensor that holds a leaf at the origin, with all leaves it holds; None if no rule matches."""
    for rule in name_map.rules:
        for ours in rule.paths:
            if (numbers := _matched(ours, path)) is not None:
                name = _filled(rule.theirs, numbers)
                prefix = name_map.prefix if path.split('/')[1] == 'backbone' else ''
                return prefix + name, Target(tuple(_filled(p, numbers) for p in rule.paths), rule.layout)
    return None


def fit(name_map: NameMap, path: str) -> Fit | None:
    """How a leaf is filled from a tensor of another shape; None if it is not."""
    return next((each for each in name_map.fits if _matched(each.ours, path) is not None), None)


_HOLE = re.compile(r'\{(\w+)(\*|\+1)?\}')


@functools.cache
def _pattern(template: str) -> re.Pattern:
    literal, pattern, seen = 0, '', set()
    for hole in _HOLE.finditer(template):
        pattern += re.escape(template[literal : hole.start()])
        group = hole[1]
        pattern += f'(?P={group})' if group in seen else f'(?P<{group}>{".+" if hole[2] == "*" else "[0-9]{1,9}"})'
        seen.add(group)
        literal = hole.end()
    return re.compile(pattern + re.escape(template[literal:]))


def _matched(template: str, name: str) -> dict[str, str] | None:
    """What the holes of a template stand for in a name, `{block+1}` counted back; None if the name is another."""
    found = _pattern(template).fullmatch(name)
    if not found:
        return None
    values = found.groupdict()
    for group, how in _HOLE.findall(template):
        if how == '+1':
            if values[group] == '0':
                return None
            values[group] = str(int(values[group]) - 1)
    return values


def _filled(template: str, values: Mapping[str, str]) -> str:
    return _HOLE.sub(lambda m: str(int(values[m[1]]) + 1) if m[2] == '+1' else values[m[1]], template)
