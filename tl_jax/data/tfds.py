"""TFDS sets that are prepared on disk, read without TensorFlow."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tl_jax.config import call
from tl_jax.data.base import Source, parse_labels
from tl_jax.data.images import CACHE_BYTES, cached
from tl_jax.errors import UserError, nearest

SCAN_LIMIT = 100_000  # examples whose labels are read at opening, at about 0.12 ms each: at most 12 s


def open_tfds(
    path: str,
    *,
    data_dir: str | None = None,
    image: str = 'image',
    label: str | Mapping[str, Any] = 'label',
    split: str | None = None,
    scan_labels: bool | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Source:
    """`tfds:NAME/SPLIT` (NAME may hold a config and a version: `name/config:1.0.0`) through `as_data_source`.

    The set must lie in `data_dir` (TFDS's default: `~/tensorflow_datasets`) in a random-access format;
    preparing it is done once, elsewhere, and needs TensorFlow for most sets. Labels are read for all
    examples at opening if there are at most 100,000 or `scan_labels` says so; class
    balance, shots and class weights need them.

    Args:
      path: NAME/SPLIT.
      data_dir: where the set lies.
      image: feature of the images.
      label: feature of the classes, or `dict(feature=…, bins=…)` of what they are made from; see `label_from`.
      split: TFDS's own expression in place of SPLIT, which is then left out: `'train[:800]+validation[:200]'`. Unlike the
        slices of a spec it goes by the order of the files, as the protocols of others do.
      scan_labels: whether to read all labels at opening.
      cache_bytes: of decoded images that are kept.
    """
    name = f'tfds:{path}'
    dataset, _, named = (path, '', '') if split else path.rpartition('/')
    if not dataset:
        raise UserError(f'{name}: expected tfds:NAME/SPLIT')
    builder = _prepared_builder(name, dataset, data_dir)
    info = builder.info
    if not split and named not in info.splits:
        raise UserError(f'{name}: no split {named!r}; {nearest(named, info.splits)}')
    chosen = {'feature': label} if isinstance(label, str) else dict(label)
    label_of, used, count = call(label_from, chosen, f'{name}: label')
    for feature in (image, *used):
        _feature(name, info.features, feature)
    examples = _data_source(name, builder, split or named, None)
    read_image = cached(lambda i: np.asarray(examples[i][image]), cache_bytes)
    length = len(examples)
    class_names = tuple(map(str, range(count))) if count else None
    class_names = class_names or tuple(getattr(_feature(name, info.features, used[0]), 'names', None) or ()) or None
    if scan_labels or (scan_labels is None and length <= SCAN_LIMIT):
        labels = _scan_labels(name, builder, split or named, label_of, {feature.partition('/')[0] for feature in used})

        def get(i: int) -> dict:
            return {'image': read_image(i), 'label': int(labels[i])}
    else:
        labels = None

        def get(i: int) -> dict:
            example = examples[i]
            return {'image': np.asarray(example[image]), 'label': int(label_of(example))}

    return Source(name, length, get, labels, class_names)


def label_from(
    *,
    feature: str,
    column: int | None = None,
    where: Mapping[str, Sequence[int]] | None = None,
    reduce: Literal['count', 'min', 'max'] | None = None,
    bins: Sequence[float] = (),
) -> tuple[Callable[[Mapping[str, Any]], Any], tuple[str, ...], int]:
    """Classes made from other features: `dict(feature='objects/location', column=2, reduce='min', bins=[8, 20])`.

    Args:
      feature: its name; `objects/location` is one of each object.
      column: of it, where it is a vector.
      where: `{feature: values}`, which of several count: `{'objects/type': [0, 1, 2]}`.
      reduce: what of several is told: how many there are, the least or the greatest. Of none, the least is ∞.
      bins: ascending numbers; the class of x is how many of them lie below x. Without them it is the feature's own.

    Returns:
      example -> class; the features that it looks at; the number of classes, 0 where the feature says it.
    """
    if list(bins) != sorted(set(bins)):
        raise UserError(f'label: bins must ascend, not {list(bins)}')
    nothing = {'min': np.inf, 'max': -np.inf}

    def label_of(example):
        values = np.asarray(_within(example, feature))
        values = values[..., column] if column is not None and values.size else values
        for other, wanted in (where or {}).items():
            values = values[np.isin(_within(example, other), wanted)]
        if reduce == 'count':
            values = len(values)
        elif reduce:
            values = getattr(np, reduce)(values, initial=nothing[reduce])
        return np.searchsorted(bins, values) if bins else values

    return label_of, (feature, *(where or ())), len(bins) + 1 if bins else 0


def _within(tree: Mapping[str, Any], path: str) -> Any:
    for key in path.split('/'):
        tree = tree[key]
    return tree


def _feature(name: str, features: Mapping[str, Any], path: str) -> Any:
    """The feature of a path; it must exist."""
    for key in path.split('/'):
        known = list(features.keys()) if hasattr(features, 'keys') else []
        if key not in known:
            raise UserError(f'{name}: no feature {path!r}; {nearest(key, known)}')
        features = features[key]
    return features


def _prepared_builder(name: str, dataset: str, data_dir: str | None):
    """The builder of a set that is on disk, made of its files alone: the code that prepares it is not loaded."""
    import tensorflow_datasets as tfds

    try:
        return tfds.core.read_only_builder.builder_from_files(dataset, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, FileNotFoundError) as error:
        where = data_dir or tfds.core.constants.DATA_DIR
        raise UserError(f'{name}: is not prepared in data_dir={where}; {_fix(dataset, where)}') from error


def _data_source(name: str, builder, split: str, decoders):
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except (NotImplementedError, ValueError) as error:
        if 'Unknown split' in str(error):
            raise UserError(f'{name}: {error}') from error
        fix = _fix(builder.info.name, 'ANOTHER')
        kind = builder.info.file_format.value
        raise UserError(f'{name}: is prepared as {kind} files, without random access; {fix}') from error


def _fix(dataset: str, data_dir: str) -> str:
    # The command `tfds build` is not named because it starts only where apache_beam is installed.
    call = f"builder('{dataset}', data_dir='{data_dir}', file_format='array_record').download_and_prepare()"
    return f'once, where tensorflow-cpu is installed, run in python: import tensorflow_datasets as t; t.{call}'


def _scan_labels(name: str, builder, split: str, label_of: Callable, needed: set[str]) -> np.ndarray:
    from tensorflow_datasets import decode

    # What holds features of its own cannot be skipped whole.
    idle = {key for key, feature in builder.info.features.items() if not hasattr(feature, 'keys')} - needed
    source = _data_source(name, builder, split, dict.fromkeys(idle, decode.SkipDecoding()))
    return parse_labels([label_of(example) for example in source], lambda i: f'{name}, example {i}')[0]
