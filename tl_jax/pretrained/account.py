"""The total account: every tensor of a file is used or ignored, every leaf of a model filled or fresh, by name.

`fill` plans before it copies: names, then shapes and dtypes of everything, and only then the bytes. What it cannot
account for it refuses, with the names.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import linen as nn

from tl_jax.errors import UserError, nearest
from tl_jax.pretrained import maps, names
from tl_jax.pretrained.names import NameMap, Target
from tl_jax.pretrained.picked import picked
from tl_jax.pretrained.tensors import Contents, Tensor, listed
from tl_jax.trees import flatten, match, unflatten

CASTABLE = {np.dtype(t) for t in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)}
HEAD = 'head/.*'


class Account(NamedTuple):
    """What became of every tensor of a file and every leaf of a model.

    Attributes:
      source: where the tensors came from.
      origin: the name map that read them.
      sha256: of the file, hexadecimal; empty if there is none.
      used: `{leaf: tensor}`.
      ignored: `{tensor: rule}`.
      fresh: `{leaf: rule}`, the leaves that keep their initial value.
      cast: `{leaf: 'float16 to float32'}`, of the leaves whose dtype is not the file's.
      fitted: `{leaf: how}`, of the leaves whose shape is not the tensor's, such as 'resized from [197, 192]'.
      size: bytes of the tensors used, as the file holds them.
      notes: what the reader chose and left aside.
    """

    source: str
    origin: str
    sha256: str
    used: Mapping[str, str]
    ignored: Mapping[str, str]
    fresh: Mapping[str, str]
    cast: Mapping[str, str]
    fitted: Mapping[str, str]
    size: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        digest = f', sha256 {self.sha256[:12]}' if self.sha256 else ''
        lines = [
            f'loaded {self.source} ({self.origin}{digest})',
            f'  used     {len(set(self.used.values()))} tensors, {self.size:,} bytes' + _cast_clause(self.cast),
        ]
        lines += (
            [f'  fitted   {"; ".join(f"{path} {how}" for path, how in self.fitted.items())}'] if self.fitted else []
        )
        lines += [f'  ignored  {_by_rule(self.ignored, "tensors")}'] if self.ignored else []
        lines += [f'  fresh    {_by_rule(self.fresh, "leaves")}'] if self.fresh else []
        lines += [f'  note     {"; ".join(self.notes)}'] if self.notes else []
        return '\n'.join(lines)


class _Fill(NamedTuple):
    """One planned copy: of the tensor, or of that part of it which is this leaf."""

    name: str
    tensor: Tensor
    target: Target
    part: int
    fit: names.Fit | None

    def view(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The array in our layout, fitted where a leaf of this shape needs it; a ValueError if it cannot be read so."""
        read = self.target.layout.read(array)
        view = read if len(self.target.paths) == 1 else read[self.part]
        return self.fit.change(view, shape) if self.fit and view.shape != shape else view


def fill(
    variables: Mapping[str, Any],
    contents: Contents,
    name_map: NameMap | None = None,
    *,
    ignore: Sequence[str] = (),
    fresh: Sequence[str] = (),
    pick: Sequence[int] = (),
    backbone: nn.Module | None = None,
    source: str = 'the checkpoint',
    sha256: str = '',
) -> tuple[dict[str, Any], Account]:
    """Fills a model's variables from a file's tensors.

    Where the file's head has another shape than the model's, or one of the two has none, the head is fresh and the file's
    is ignored, by the rule `head/.*`, which the account shows.

    Args:
      variables: `{'params': {role: …}, 'batch_stats': {role: …}}` of arrays or `jax.ShapeDtypeStruct`s.
      contents: of the file.
      name_map: of its origin; found by the names, among those of the backbone's family, unless given.
      ignore: regexes of tensors, by the file's names, that are not wanted.
      fresh: regexes of leaves, `role/module/…/leaf`, that keep the value they have; tensors for them are ignored.
      pick: blocks of the file's network that become the model's, in that order; all unless given.
      backbone: the module that the variables of that role are of.
      source: what to call the file.
      sha256: of the file, for the account.

    Returns:
      The variables, filled leaves being arrays of the leaf's dtype, and the account.

    Raises:
      UserError: a tensor or leaf is unaccounted for, a rule does nothing, a shape or dtype does not fit (all before any
        copy), or a value is not finite.
    """
    leaves = flatten(variables)
    short, prefix = names.without_prefix(contents.tensors)
    name_map = name_map or maps.choose(short.values(), source, backbone)
    ignored = _ignored(short, ignore, name_map)
    fills, unknown = _targets(contents.tensors, short, ignored, name_map, source)
    if pick:
        places = picked(fills, pick, source)
        ignored |= {fills[path].name: f'pick {list(pick)}' for path, ours in places.items() if ours is None}
        fills = {ours: fills[path] for path, ours in places.items() if ours is not None}
    rules, kept = _fresh(fresh, fills, leaves)
    for path in list(fills):
        if rule := next((rule for regex, rule in rules if re.fullmatch(regex, _named(path))), None):
            ignored[fills.pop(path).name] = rule
    _check_names(fills, unknown, leaves, kept, source)
    _check_arrays(fills, leaves, source)
    filled = {path: _copied(one, leaves[path], path, source) for path, one in fills.items()}
    changed = [path for path, one in fills.items() if one.tensor.dtype != leaves[path].dtype]
    fitted = [path for path, one in fills.items() if one.fit and _shape(one) != leaves[path].shape]
    account = Account(
        source=source,
        origin=name_map.origin,
        sha256=sha256,
        used={path: one.name for path, one in fills.items()},
        ignored=ignored,
        fresh=kept,
        cast={path: f'{fills[path].tensor.dtype} to {leaves[path].dtype}' for path in changed},
        fitted={path: f'{fills[path].fit.what} from {list(_shape(fills[path]))}' for path in fitted},
        size=sum(
            math.prod(t.shape) * t.dtype.itemsize for t in {one.name: one.tensor for one in fills.values()}.values()
        ),
        notes=contents.notes + ((f"names without their '{prefix}'",) if prefix else ()),
    )
    return unflatten({path: filled.get(path, leaf) for path, leaf in leaves.items()}), account


def _ignored(short: Mapping[str, str], ignore: Sequence[str], name_map: NameMap) -> dict[str, str]:
    """Returns `{tensor: rule}` of those that the caller's or the map's rules ignore."""
    asked = match([(regex, regex) for regex in ignore], short, field='ignore', default=None)
    ignored = {name: rule for name, rule in asked.items() if rule}
    for name in short:
        for regex, why in name_map.ignored:
            if name not in ignored and re.fullmatch(regex, short[name]):
                ignored[name] = f'{regex} ({why})'
        found = names.target(name_map, short[name])
        if name not in ignored and found and not found.paths:
            ignored[name] = 'the name map (parts that this network is without)'
    return ignored


def _targets(
    tensors: Mapping[str, Tensor], short: Mapping[str, str], ignored: Mapping[str, str], name_map: NameMap, source: str
) -> tuple[dict[str, _Fill], list[str]]:
    """Returns `{leaf: planned copy}` and the names that no rule of the map knows."""
    fills: dict[str, _Fill] = {}
    unknown = []
    for name, tensor in tensors.items():
        if name in ignored:
            continue
        target = names.target(name_map, short[name])
        if target is None:
            unknown.append(name)
            continue
        for part, path in enumerate(target.paths):
            if path in fills:
                raise UserError(f'{source}: {listed([fills[path].name, name])} are both {path!r}; ignore one')
            fills[path] = _Fill(name, tensor, target, part, names.fit(name_map, path))
    return fills, unknown


def _fresh(
    fresh: Sequence[str], fills: Mapping[str, _Fill], leaves: Mapping[str, Any]
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Returns the fresh rules, with `head/.*` where the heads differ, and `{leaf: rule}` of the leaves they keep."""
    rules = [(regex, regex) for regex in fresh]
    by_name = match(rules, map(_named, leaves), field='fresh', default='')
    kept = {path: by_name[_named(path)] for path in leaves if by_name[_named(path)]}
    if conflict := _head_conflict(fills, leaves, kept):
        rules.append((HEAD, f'{HEAD} ({conflict})'))
        kept |= {path: rules[-1][1] for path in leaves if path not in kept and re.fullmatch(HEAD, _named(path))}
    return rules, kept


def _named(path: str) -> str:
    """A leaf's name in rules, `role/module/…/leaf`: its path without the collection."""
    return path.partition('/')[2]


def _head_conflict(fills: Mapping[str, _Fill], leaves: Mapping[str, Any], kept: Mapping[str, str]) -> str:
    """Why the file's head cannot be the model's: another shape, or none there or here; empty where it can."""
    theirs = {path: one for path, one in fills.items() if re.fullmatch(HEAD, _named(path)) and path not in kept}
    ours = [path for path in leaves if re.fullmatch(HEAD, _named(path)) and path not in kept]
    if theirs and not ours:
        return 'the model has no head'
    if ours and not theirs:
        return 'the file has no head'
    for path, one in theirs.items():
        if path in leaves and _shape(one) != leaves[path].shape:
            return f"the file's {_named(path)} is {_shape(one)}, the model's {leaves[path].shape}"
    return ''


def _check_names(
    fills: Mapping[str, _Fill], unknown: Sequence[str], leaves: Mapping[str, Any], kept: Mapping[str, str], source: str
) -> None:
    """Every tensor has a leaf and every leaf a tensor or a rule, or the load fails and lists what has none."""
    homeless = [*unknown, *(one.name for path, one in fills.items() if path not in leaves)]
    missing = [path for path in leaves if path not in fills and path not in kept]
    complaints = []
    if homeless:
        complaints.append(
            f'{len(homeless)} tensors have no leaf in the model: {listed(homeless)}; '
            f'{_nearest_leaf(homeless[0], fills, leaves)}, or name them in ignore'
        )
    if missing:
        complaints.append(
            f'{len(missing)} leaves have no tensor in the file: {listed(map(_named, missing))}; is it the right model? '
            'Otherwise name them in fresh'
        )
    if complaints:
        raise UserError(f'{source}: {". ".join(complaints)}')


def _nearest_leaf(name: str, fills: Mapping[str, _Fill], leaves: Mapping[str, Any]) -> str:
    """A suggestion for a tensor without a leaf: leaves like the one it was meant for."""
    wanted = next((path for path, one in fills.items() if one.name == name), name)
    return nearest(wanted, leaves)


def _check_arrays(fills: Mapping[str, _Fill], leaves: Mapping[str, Any], source: str) -> None:
    """Every shape and dtype fits, or the load fails before it copies."""
    for path, one in fills.items():
        if one.tensor.dtype not in CASTABLE:
            raise UserError(
                f'{source}: {one.name!r:.80} is {one.tensor.dtype}, and {_named(path)} takes floats only; '
                'convert it, or name it in ignore and the leaf in fresh'
            )
    wrong = [path for path, one in fills.items() if _shape(one, leaves[path].shape) != leaves[path].shape]
    if wrong:
        shown = '; '.join(
            f'{fills[path].name!r:.80} {fills[path].tensor.shape} does not fit {_named(path)} {leaves[path].shape}'
            for path in wrong[:10]
        )
        more = f'; and {len(wrong) - 10} more leaves' if len(wrong) > 10 else ''
        raise UserError(f'{source}: {shown}{more}; is it the right model? Otherwise name them in fresh')


def _shape(one: _Fill, wanted: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The tensor's shape in our layout, fitted if `wanted` is given; its own if it cannot be read so.

    Found on an array of that shape that has no memory of its own.
    """
    one = one._replace(fit=None) if wanted is None else one
    try:
        return one.view(np.broadcast_to(np.zeros((), one.tensor.dtype), one.tensor.shape), wanted or ()).shape
    except (ValueError, IndexError):  # Another rank than the layout has, or sizes beyond what numpy can count.
        return one.tensor.shape


def _copied(one: _Fill, leaf: Any, path: str, source: str) -> jax.Array:
    """The tensor in our layout and the leaf's dtype, in memory of its own."""
    with np.errstate(over='ignore', invalid='ignore'):  # What overflows is infinite, and refused below.
        values = np.array(one.view(one.tensor.array(), leaf.shape), dtype=leaf.dtype, order='C')
    if not np.isfinite(values).all():
        kind = 'NaN' if np.isnan(values).any() else 'infinite'
        raise UserError(f'{source}: {one.name!r:.80}, for {path}, has values that are {kind}; the file is damaged')
    return jax.device_put(values)  # takes the array as it is where `jnp.asarray` would copy it once more


def _by_rule(rules: Mapping[str, str], noun: str) -> str:
    return '; '.join(f'{count} {noun} by {rule}' for rule, count in Counter(rules.values()).items())


def _cast_clause(cast: Mapping[str, str]) -> str:
    return ''.join(f', {count} of them cast from {dtypes}' for dtypes, count in Counter(cast.values()).items())
