"""Paths, rules and partitions: how every part of the library addresses a tree of variables.

A tree is nested dicts of leaves. A leaf is named by its path, `role/module/…/leaf`. A rule is `(regex, value)`; a list of
rules gives each leaf the value of the first rule whose regex matches the whole path (`re.fullmatch`). Freezing, learning
rates, weight decay, sharding and weight loading are all such lists.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tl_jax.errors import UserError, nearest

Tree = Mapping[str, Any]
Rules = Sequence[tuple[str, Any]]
REQUIRED = object()


def flatten(tree: Tree, prefix: str = '') -> dict[str, Any]:
    """Returns `{path: leaf}` in the tree's own order. Empty dicts vanish."""
    flat = {}
    for name, node in tree.items():
        path = f'{prefix}/{name}' if prefix else name
        if isinstance(node, Mapping):
            flat.update(flatten(node, path))
        else:
            flat[path] = node
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *modules, name = path.split('/')
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = leaf
    return tree


def match(rules: Rules, paths: Iterable[str], *, field: str, default: Any = REQUIRED) -> dict[str, Any]:
    """Returns `{path: value of the first rule that matches it}`, and refuses silent no-ops.

    Args:
      rules: `(regex, value)` pairs.
      paths: the leaves to address.
      field: what the rules are called in the config, for the error message.
      default: value of the leaves that no rule matches; without it such a leaf is an error.

    Raises:
      UserError: a regex is malformed, a rule wins no leaf, or a leaf has no rule.
    """
    paths = list(paths)
    patterns = [compiled(regex, f'{field}[{i}]') for i, (regex, _) in enumerate(rules)]
    winners = {path: next((i for i, p in enumerate(patterns) if p.fullmatch(path)), None) for path in paths}
    for i, pattern in enumerate(patterns):
        if i not in winners.values():
            shadowed = [path for path in paths if pattern.fullmatch(path)]
            why = (
                f"every leaf it matches, such as '{shadowed[0]}', is taken by an earlier rule; reorder or remove it"
                if shadowed
                else f'it matches no leaf; {nearest_paths(pattern.pattern, paths)}'
            )
            raise UserError(f"{field}[{i}]: the rule '{pattern.pattern}' does nothing: {why}")
    orphan = next((path for path, winner in winners.items() if winner is None), None)
    if orphan and default is REQUIRED:
        raise UserError(f"{field}: no rule matches the leaf '{orphan}'; add one, such as ('.*', …) at the end")
    return {path: default if winner is None else rules[winner][1] for path, winner in winners.items()}


def split(tree: Tree, chosen: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree into the leaves whose path is `chosen` and the rest; each part keeps only its own branches."""
    flat = flatten(tree)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if chosen(path)}),
        unflatten({path: leaf for path, leaf in flat.items() if not chosen(path)}),
    )


def merge(*parts: Tree) -> dict[str, Any]:
    """Joins the parts of a split tree; where two name the same leaf the later one wins."""
    merged: dict[str, Any] = {}
    for part in parts:
        for name, node in part.items():
            both = isinstance(node, Mapping) and isinstance(merged.get(name), Mapping)
            merged[name] = merge(merged[name], node) if both else (merge(node) if isinstance(node, Mapping) else node)
    return merged


def compiled(regex: str, field: str) -> re.Pattern:
    """The pattern; `field` is what the regex is called in the config, for the error message."""
    try:
        return re.compile(regex)
    except re.error as error:
        raise UserError(f"{field}: '{regex}' is not a regular expression: {error}") from None


def nearest_paths(regex: str, paths: Sequence[str]) -> str:
    """Suggests what to write for a regex that matched no leaf: a leaf that has its words, else a module like it."""
    words = [word for word in re.split(r'[^A-Za-z0-9_]+', regex) if len(word) > 1]
    hits = [path for path in paths if words and all(word in path for word in words)]
    if hits:
        return f"it must match the whole path, such as '{hits[0]}'"
    modules = {'/'.join(path.split('/')[:depth]) + '/.*' for path in paths for depth in range(1, path.count('/') + 1)}
    return nearest(regex, modules | set(paths))
