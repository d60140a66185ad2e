"""`open_source`: from a spec string to a `Source`.

    KIND:PATH[SLICE]        sklearn:digits/train   folder:PATH   npz:FILE.npz/SPLIT   idx:DIR/SPLIT
                            csv:FILE   tsv:FILE   jsonl:FILE   tfds:NAME/SPLIT

A slice, as in TFDS, takes part of any source: `[:80%]`, `[80%:]`, `[100:200]`, or a fold of a cross-validation: `[3/10]`
is the third tenth, `[^3/10]` all the rest. It cuts one fixed permutation of the examples, so that parts are disjoint, mix the
classes, and are the same for everyone. Slices follow one another: `[^3/10][:90%]`.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax.config import call
from tl_jax.data.arrays import open_idx, open_npz, open_sklearn, predicted_labels
from tl_jax.data.base import (
    Source,
    check_labels,
    few_shots,
    fixed_permutation,
    select,
    without_classes,
    without_labels,
)
from tl_jax.data.buckets import in_buckets
from tl_jax.data.conll import open_conll
from tl_jax.data.episodes import episodes as draw_episodes
from tl_jax.data.images import open_folder
from tl_jax.data.language import open_lines, open_packed
from tl_jax.data.multimnist import open_multimnist
from tl_jax.data.omniglot import open_omniglot
from tl_jax.data.pairs import open_bitext, open_pairs
from tl_jax.data.sinusoid import open_sinusoid
from tl_jax.data.svmlight import open_svmlight
from tl_jax.data.tables import open_table
from tl_jax.data.tfds import open_tfds
from tl_jax.errors import UserError, nearest

KINDS: dict[str, Callable[..., Source]] = {
    'sklearn': open_sklearn,
    'folder': open_folder,
    'npz': open_npz,
    'idx': open_idx,
    **{kind: functools.partial(open_table, kind) for kind in ('csv', 'tsv', 'jsonl')},
    'svmlight': open_svmlight,
    'tfds': open_tfds,
    'pairs': open_pairs,
    'multimnist': open_multimnist,
    'bitext': open_bitext,
    'omniglot': open_omniglot,
    'sinusoid': open_sinusoid,
    'lines': open_lines,
    'packed': open_packed,
    'conll': open_conll,
}
COMMON_OPTIONS = ('num_classes', 'omit', 'shots', 'shots_seed', 'labels', 'unlabelled', 'episodes', 'buckets')


def open_source(
    spec: str,
    *,
    num_classes: int | None = None,
    omit: Sequence[int] = (),
    shots: int | None = None,
    shots_seed: int = 0,
    labels: str | None = None,
    unlabelled: bool = False,
    episodes: Mapping[str, Any] | None = None,
    buckets: Sequence[int] | None = None,
    **options,
) -> Source:
    """Opens `spec`; `options` are those of its kind (see `open_folder`, `open_table`, `open_npz`, … of this
    package).

    Labels must lie in 0 … `num_classes` - 1 where that is given. `omit=[3]` leaves out the examples of a class, which stays
    one. `shots=k` keeps k labelled examples of every class, drawn by `shots_seed` after the slice. `labels` names a run's
    `predictions/….npz` whose classes take the place of the labels; `unlabelled` hides them: no method can look at them.
    `episodes` makes each example a few-shot task of what is left (see `tl_jax.data.episodes`). `buckets=[16, 32, 64]` makes
    batches of texts of like length and pads each to the first of these that holds it (see `tl_jax.data.buckets`). Anything
    amiss is a UserError of one line.
    """
    kind, colon, rest = spec.partition(':')
    if not colon or kind not in KINDS:
        raise UserError(f'{spec}: unknown kind of data {kind!r}; {nearest(kind, KINDS)}')
    path, parts = _split_slices(rest)
    if not path:
        raise UserError(f'{spec}: names no data after {kind!r}')
    known = [*list(inspect.signature(KINDS[kind]).parameters)[1:], *COMMON_OPTIONS]
    for option in options:
        if option not in known:
            raise UserError(f'{spec}: unknown option {option!r}; {nearest(option, known)}')
    source = KINDS[kind](path, **options)._replace(name=spec)
    check_labels(source, num_classes)
    for part in parts:
        source = select(source, _slice_indices(part, source.length, spec))
    if omit:
        source = without_classes(source, omit)
    if shots is not None:
        source = few_shots(source, shots, shots_seed)
    if labels is not None:
        source = predicted_labels(source, labels)
    if episodes is not None:
        if unlabelled:
            raise UserError(f'{spec}: episodes are made of labels; take away `unlabelled`')
        source = call(draw_episodes, episodes, f'{spec}: episodes', source)
    source = without_labels(source) if unlabelled else source
    return source if buckets is None else in_buckets(source, buckets)


def _split_slices(rest: str) -> tuple[str, list[str]]:
    parts = []
    while match := re.fullmatch(r'(.*?)\[([^\[\]]*[:/][^\[\]]*)\]', rest):
        rest, parts = match[1], [match[2], *parts]
    return rest, parts


def _slice_indices(part: str, length: int, spec: str) -> np.ndarray:
    if fold := re.fullmatch(r'(\^?)(\d+)/(\d+)', part):
        return _fold_indices(bool(fold[1]), int(fold[2]), int(fold[3]), length, spec)
    match = re.fullmatch(r'\s*(\d+%?)?\s*:\s*(\d+%?)?\s*', part)
    if not match:
        raise UserError(f'{spec}: [{part}] is no slice; write [:80%], [80%:], [100:200], [3/10] or [^3/10]')
    start = _bound(match[1] or '0', length, spec)
    stop = _bound(match[2] or str(length), length, spec)
    if start >= stop:
        raise UserError(f'{spec}: [{part}] of {length} examples is empty')
    return np.sort(fixed_permutation(length)[start:stop])


def _fold_indices(others: bool, fold: int, folds: int, length: int, spec: str) -> np.ndarray:
    if not 1 <= fold <= folds or folds > length or folds < 2:
        raise UserError(f'{spec}: there is no fold {fold} of {folds} of {length} examples; count from 1')
    mine = np.arange(length) * folds // length == fold - 1
    return np.sort(fixed_permutation(length)[mine != others])


def _bound(text: str, length: int, spec: str) -> int:
    bound = int(text[:-1]) * length // 100 if text.endswith('%') else int(text)
    if bound > length:
        raise UserError(f'{spec}: {text} reaches beyond the {length} examples')
    return bound
