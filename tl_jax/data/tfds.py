"""TFDS sets that are prepared on disk, read without TensorFlow."""

import numpy as np

from tl_jax.data.base import Source, parse_labels
from tl_jax.data.images import CACHE_BYTES, cached
from tl_jax.errors import UserError, nearest

SCAN_LIMIT = 100_000  # examples whose labels are read at opening, at about 0.12 ms each: at most 12 s


def open_tfds(
    path: str,
    *,
    data_dir: str | None = None,
    image: str = 'image',
    label: str = 'label',
    scan_labels: bool | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Source:
    """`tfds:NAME/SPLIT` (NAME may hold a config and a version: `name/config:1.0.0`) through `as_data_source`.

    The set must lie in `data_dir` (TFDS's default: `~/tensorflow_datasets`) in a random-access format;
    preparing it is done once, elsewhere, and needs TensorFlow for most sets. Labels are read for all
    examples at opening if there are at most 100,000 or `scan_labels` says so; class
    balance, shots and class weights need them.
    """
    name = f'tfds:{path}'
    dataset, _, split = path.rpartition('/')
    if not dataset:
        raise UserError(f'{name}: expected tfds:NAME/SPLIT')
    builder = _prepared_builder(name, dataset, data_dir)
    info = builder.info
    if split not in info.splits:
        raise UserError(f'{name}: no split {split!r}; {nearest(split, info.splits)}')
    for feature in (image, label):
        if feature not in info.features:
            raise UserError(f'{name}: no feature {feature!r}; {nearest(feature, info.features)}')
    examples = _data_source(name, builder, split, None)
    read_image = cached(lambda i: np.asarray(examples[i][image]), cache_bytes)
    length = len(examples)
    class_names = tuple(getattr(info.features[label], 'names', None) or ()) or None
    if scan_labels or (scan_labels is None and length <= SCAN_LIMIT):
        labels = _scan_labels(name, builder, split, label)

        def get(i: int) -> dict:
            return {'image': read_image(i), 'label': int(labels[i])}
    else:
        labels = None

        def get(i: int) -> dict:
            example = examples[i]
            return {'image': np.asarray(example[image]), 'label': int(example[label])}

    return Source(name, length, get, labels, class_names)


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
        fix = _fix(builder.info.name, 'ANOTHER')
        kind = builder.info.file_format.value
        raise UserError(f'{name}: is prepared as {kind} files, without random access; {fix}') from error


def _fix(dataset: str, data_dir: str) -> str:
    # The command `tfds build` is not named because it starts only where apache_beam is installed.
    call = f"builder('{dataset}', data_dir='{data_dir}', file_format='array_record').download_and_prepare()"
    return f'once, where tensorflow-cpu is installed, run in python: import tensorflow_datasets as t; t.{call}'


def _scan_labels(name: str, builder, split: str, label: str) -> np.ndarray:
    from tensorflow_datasets import decode

    skipped = {feature: decode.SkipDecoding() for feature in builder.info.features if feature != label}
    values = [example[label] for example in _data_source(name, builder, split, skipped)]
    return parse_labels(values, lambda i: f'{name}, example {i}')[0]
