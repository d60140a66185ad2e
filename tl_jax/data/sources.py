"""`open_source`: from a spec string to a `Source`.

    KIND:PATH[SLICE]        sklearn:digits/train   folder:PATH   npz:FILE.npz/SPLIT   idx:DIR/SPLIT
                            csv:FILE   jsonl:FILE   tfds:NAME/SPLIT

A slice, as in TFDS, takes part of any source: `[:80%]`, `[80%:]`, `[100:200]`. It cuts one fixed permutation
of the examples, so that parts are disjoint, mix the classes, and are the same for everyone.
"""

import inspect
import re
from collections.abc import Callable

import numpy as np

from tl_jax.data.arrays import open_idx, open_npz, open_sklearn
from tl_jax.data.base import Source, check_labels, few_shots, fixed_permutation, select, without_labels
from tl_jax.data.images import open_folder
from tl_jax.data.tables import open_table
from tl_jax.data.tfds import open_tfds
from tl_jax.errors import UserError, nearest

KINDS: dict[str, Callable[..., Source]] = {
    'sklearn': open_sklearn,
    'folder': open_folder,
    'npz': open_npz,
    'idx': open_idx,
    'csv': open_table,
    'jsonl': open_table,
    'tfds': open_tfds,
}
COMMON_OPTIONS = ('num_classes', 'shots', 'shots_seed', 'unlabelled')


def open_source(
    spec: str,
    *,
    num_classes: int | None = None,
    shots: int | None = None,
    shots_seed: int = 0,
    unlabelled: bool = False,
    **options,
) -> Source:
    """Opens `spec`; `options` are those of its kind (see `open_folder`, `open_table`, `open_npz`, … of this
    package).

    Labels must lie in 0 … `num_classes` - 1 where that is given. `shots=k` keeps k labelled examples of every
    class, drawn by `shots_seed` after the slice. `unlabelled` hides the labels: no method can look at them. Anything amiss is a UserError of one line.
    """
    kind, colon, rest = spec.partition(':')
    if not colon or kind not in KINDS:
        raise UserError(f'{spec}: unknown kind of data {kind!r}; {nearest(kind, KINDS)}')
    path, part = _split_slice(rest)
    if not path:
        raise UserError(f'{spec}: names no data after {kind!r}')
    known = [*list(inspect.signature(KINDS[kind]).parameters)[1:], *COMMON_OPTIONS]
    for option in options:
        if option not in known:
            raise UserError(f'{spec}: unknown option {option!r}; {nearest(option, known)}')
    source = KINDS[kind](path, **options)._replace(name=spec)
    check_labels(source, num_classes)
    if part is not None:
        source = select(source, _slice_indices(part, source.length, spec))
    if shots is not None:
        source = few_shots(source, shots, shots_seed)
    return without_labels(source) if unlabelled else source


def _split_slice(rest: str) -> tuple[str, str | None]:
    match = re.fullmatch(r'(.*?)\[([^\[\]]*:[^\[\]]*)\]', rest)
    return (match[1], match[2]) if match else (rest, None)


def _slice_indices(part: str, length: int, spec: str) -> np.ndarray:
    match = re.fullmatch(r'\s*(\d+%?)?\s*:\s*(\d+%?)?\s*', part)
    if not match:
        raise UserError(f'{spec}: [{part}] is no slice; write [:80%], [80%:] or [100:200]')
    start = _bound(match[1] or '0', length, spec)
    stop = _bound(match[2] or str(length), length, spec)
    if start >= stop:
        raise UserError(f'{spec}: [{part}] of {length} examples is empty')
    return np.sort(fixed_permutation(length)[start:stop])


def _bound(text: str, length: int, spec: str) -> int:
    bound = int(text[:-1]) * length // 100 if text.endswith('%') else int(text)
    if bound > length:
        raise UserError(f'{spec}: {text} reaches beyond the {length} examples')
    return bound
