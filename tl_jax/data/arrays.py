"""Sources that are one array in memory: scikit-learn's digits, npz files, MNIST's idx files."""

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tl_jax.data.base import MAX_BYTES, Source, check_size, existing, integer_labels, select, stratified_order
from tl_jax.errors import UserError, nearest

DIGITS_SPLITS = {'train': slice(0, 600), 'val': slice(600, 900), 'test': slice(900, None)}


def array_source(name: str, inputs: np.ndarray, labels: np.ndarray) -> Source:
    """A source of uint8 images [N, H, W] or [N, H, W, C], or of features [N, F] of any number type."""
    if not len(inputs):
        raise UserError(f'{name}: has no examples')
    labels = integer_labels(labels, len(inputs), name)
    if inputs.ndim == 2:
        _check_finite(inputs, name)
        return Source(
            name,
            len(inputs),
            lambda i: {'inputs': inputs[i].astype(np.float32), 'label': int(labels[i])},
            labels,
        )
    if inputs.ndim not in (3, 4) or inputs.dtype != np.uint8:
        raise UserError(
            f'{name}: inputs are {inputs.dtype} {list(inputs.shape)}; '
            'expected uint8 images [N, H, W] or [N, H, W, C] of 0 … 255, or features [N, F]'
        )
    images = inputs if inputs.ndim == 4 else inputs[..., None]
    images.flags.writeable = False
    return Source(name, len(images), lambda i: {'image': images[i], 'label': int(labels[i])}, labels)


def _check_finite(features: np.ndarray, name: str) -> None:
    if features.dtype.kind not in 'biuf':
        raise UserError(f'{name}: features are of type {features.dtype}; numbers are expected')
    wrong = np.argwhere(~np.isfinite(features))
    if len(wrong):
        raise UserError(f'{name}: example {wrong[0][0]}, feature {wrong[0][1]} is not finite')


def open_sklearn(path: str) -> Source:
    """`sklearn:digits` or `sklearn:digits/train|val|test`: 1797 handwritten digits, uint8 [8, 8, 1], embedded
    in scikit-learn (Alpaydin & Kaynak 1998, the test part of UCI's optdigits).

    The values 0 … 16 (ink of 4×4 binary pixels) are scaled to 0 … 255. The splits are ours: of one fixed
    stratified order the first 600 are `train` (a pool to draw shots from), the next 300 `val`, the last 897
    `test`.
    """
    dataset, _, split = path.partition('/')
    name = f'sklearn:{path}'
    if dataset != 'digits':
        raise UserError(f'{name}: no such data set; {nearest(dataset, ["digits"])}')
    if split and split not in DIGITS_SPLITS:
        raise UserError(f'{name}: no split {split!r}; {nearest(split, DIGITS_SPLITS)}')
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    source = array_source(name, images, digits.target)._replace(class_names=tuple('0123456789'))
    if not split:
        return source
    return select(source, np.sort(stratified_order(source.labels)[DIGITS_SPLITS[split]]))


def open_npz(path: str, *, image_key: str = '', label_key: str = '', max_bytes: int = MAX_BYTES) -> Source:
    """`npz:PATH.npz/SPLIT` reads `x_SPLIT` and `y_SPLIT` (MNIST as published by Keras); `image_key` and
    `label_key` name other arrays, then without a split."""
    name = f'npz:{path}'
    head, dot, split = path.rpartition('.npz')
    if not dot:
        raise UserError(f'{name}: expected npz:FILE.npz/SPLIT')
    file, split = existing(f'{head}.npz', name), split.strip('/')
    inputs, labels = read_npz(file, lambda keys: _npz_keys(name, split, keys, image_key, label_key), max_bytes)
    return array_source(name, inputs, labels)


def predicted_labels(source: Source, path: str) -> Source:
    """The same examples with the classes that a run predicted for them: `index` and `probabilities` of its npz."""
    file = existing(path, source.name)
    index, probabilities, names = read_npz(file, lambda keys: ('index', 'probabilities', 'class_names'))
    if not names.size or probabilities.shape != (*index.shape, *names.shape) or index.ndim != 1 or names.ndim != 1:
        raise UserError(
            f'{file}: index {list(index.shape)}, probabilities {list(probabilities.shape)} and class_names '
            f"{list(names.shape)} are no predictions; give a run's predictions/….npz of classes"
        )
    if not np.array_equal(index, np.arange(source.length)):
        raise UserError(f'{file}: predicts {len(index)} examples; {source.name} has {source.length}')
    labels, get = probabilities.argmax(1).astype(np.int32), source.get
    names = tuple(map(str, names))
    return source._replace(get=lambda i: {**get(i), 'label': int(labels[i])}, labels=labels, class_names=names)


def _npz_keys(name: str, split: str, keys: list[str], image_key: str, label_key: str) -> tuple[str, str]:
    if bool(image_key) != bool(label_key):
        raise UserError(f'{name}: give both image_key and label_key')
    if image_key:
        return image_key, label_key
    splits = [key.removeprefix('x_') for key in keys if key.startswith('x_')]
    if f'x_{split}' not in keys or f'y_{split}' not in keys:
        if not splits:
            raise UserError(f'{name}: no arrays x_SPLIT and y_SPLIT; name them by image_key and label_key: {keys}')
        raise UserError(f'{name}: no split {split!r}; {nearest(split, splits)}')
    return f'x_{split}', f'y_{split}'


def read_npz(file: Path, choose: Callable[[list[str]], Sequence[str]], max_bytes: int = MAX_BYTES) -> list[np.ndarray]:
    """The arrays of an npz file that `choose` takes by their names, each of at most `max_bytes`."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = {item.filename.removesuffix('.npy'): item for item in archive.infolist()}
            wanted = choose(list(members))
            missing = next((key for key in wanted if key not in members), None)
            if missing is not None:
                raise UserError(f'{file}: no array {missing!r}; {nearest(missing, members)}')
            return [_read_member(archive, members[key], f'{file}: array {key!r}', max_bytes) for key in wanted]
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        raise UserError(f'{file}: not a readable npz file ({error})') from error


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, max_bytes: int) -> np.ndarray:
    """One array of an npz, after its header has shown that it is plain numbers and fits."""
    with archive.open(member) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, _, dtype = read_header[version](stream)
        except (ValueError, KeyError) as error:
            raise UserError(f'{name} has no valid header ({error})') from error
    if dtype.hasobject:
        raise UserError(f'{name} holds pickled objects, which are never read; save it as numbers')
    nbytes = math.prod(shape) * dtype.itemsize
    check_size(nbytes, name, max_bytes)
    if not nbytes <= member.file_size <= nbytes + 2**16:
        raise UserError(f'{name} declares {nbytes} bytes and holds {member.file_size}')
    with archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def open_idx(path: str, *, max_bytes: int = MAX_BYTES) -> Source:
    """`idx:DIR/train` or `idx:DIR/test`: MNIST's idx files, gzipped or not, as published (also EMNIST,
    Fashion, …)."""
    name = f'idx:{path}'
    folder, _, split = path.rstrip('/').rpartition('/')
    prefix = {'train': 'train', 'test': 't10k'}.get(split)
    if prefix is None:
        raise UserError(f'{name}: no split {split!r}; {nearest(split, ["train", "test"])}')
    root = existing(folder or '.', name)
    images = _find_idx(root, [prefix, split], 'images', name)
    labels = _find_idx(root, [prefix, split], 'labels', name)
    return array_source(name, _read_idx(images, max_bytes), _read_idx(labels, max_bytes))


def _find_idx(root: Path, prefixes: list[str], part: str, name: str) -> Path:
    for prefix in prefixes:
        found = sorted(root.glob(f'*{prefix}-{part}[-.]idx[13]-ubyte*'))
        if len({file.name.removesuffix('.gz') for file in found}) > 1:
            raise UserError(f'{name}: both {found[0].name} and {found[1].name} fit; keep one set per folder')
        if found:
            return found[0]
    raise UserError(f'{name}: no {prefixes[0]}-{part}-idx*-ubyte(.gz) in {root}')


def _read_idx(file: Path, max_bytes: int) -> np.ndarray:
    """The idx format: two zero bytes, a type byte (8: uint8), the rank, big-endian uint32 sizes, the data."""
    try:
        with (gzip.open if file.suffix == '.gz' else open)(file, 'rb') as stream:
            zeros, kind, rank = struct.unpack('>HBB', stream.read(4))
            if zeros or kind != 8 or not 1 <= rank <= 4:
                raise UserError(f'{file}: not an idx file of unsigned bytes')
            shape = struct.unpack(f'>{rank}I', stream.read(4 * rank))
            nbytes = math.prod(shape)
            check_size(nbytes, str(file), max_bytes)
            data = stream.read(nbytes + 1)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise UserError(f'{file}: not a readable idx file ({error})') from error
    if len(data) != nbytes:
        raise UserError(f'{file}: declares {nbytes} bytes and holds {"fewer" if len(data) < nbytes else "more"}')
    return np.frombuffer(data, np.uint8).reshape(shape)
