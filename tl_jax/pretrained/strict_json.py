"""JSON from files that we do not trust: UTF-8, no name twice, no nesting that exhausts the stack."""

import json
from typing import Any


def parse(text: bytes) -> Any:
    """Returns the value. Raises ValueError, whose message is one short line, where `json` raises several types."""
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError('nested too deeply') from None
    except UnicodeDecodeError:
        raise ValueError('not UTF-8') from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the name {twice!r:.80} is there twice')
    return table
