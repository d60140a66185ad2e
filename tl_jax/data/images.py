"""Image files: safe decoding, one folder per class, lists of files."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from tl_jax.data.base import Source, existing, select
from tl_jax.errors import UserError, nearest

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
MAX_PIXELS = 89_478_485  # Pillow's own warning limit: a quarter of a GiB as RGB
CACHE_BYTES = 256 * 2**20
SPLIT_NAMES = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}


@functools.cache
def raster_formats() -> dict[str, str]:
    """Pillow's readable formats by file extension, without EPS: to read that, Pillow starts Ghostscript."""
    Image.init()
    extensions = Image.registered_extensions()
    return {end: kind for end, kind in extensions.items() if kind in Image.OPEN and kind != 'EPS'}


def read_image(
    file: str | os.PathLike, *, channels: int = 3, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, 'height width channels']:
    """Decodes an image file as its viewer would show it: EXIF orientation applied, first frame.

    Colours are converted as by torchvision: transparency is dropped, not blended. 16-bit grey keeps its high
    byte. Raises UserError, naming the file, for anything that is not a readable image of at most
    `max_pixels`.
    """
    if channels not in MODES:
        raise UserError(f'channels={channels}: images are read with 1, 3 or 4 channels')
    try:
        with Image.open(file, formats=sorted(set(raster_formats().values()))) as image:
            if image.width * image.height > max_pixels:  # known from the header, nothing is decoded yet
                raise ValueError(f'{image.width}×{image.height} is more than max_pixels={max_pixels}')
            pixels = np.asarray(_convert(ImageOps.exif_transpose(image), MODES[channels]))
    except FileNotFoundError as error:
        raise UserError(f'{file}: no such image') from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(f'{file}: not a readable image ({reason})') from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith('I;16'):  # Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError(f'pixels of mode {image.mode} have no fixed range; save it with 8 bits a channel')
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    return image.convert(mode)


def open_folder(
    path: str,
    *,
    class_names: Sequence[str] | None = None,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    unreadable: str = 'error',
    cache_bytes: int = CACHE_BYTES,
) -> Source:
    """`folder:PATH`: one folder per class, searched to any depth; classes in sorted order, or as
    `class_names` says.

    `class_names` keeps the numbering of a training set where another split lacks a class. `folder:PATH.csv`
    is `csv:PATH.csv` with the image column `path`.
    """
    if path.endswith('.csv'):
        from tl_jax.data.tables import open_table

        return open_table(
            'csv',
            path,
            image='path',
            class_names=class_names,
            channels=channels,
            max_pixels=max_pixels,
            unreadable=unreadable,
            cache_bytes=cache_bytes,
        )
    name = f'folder:{path}'
    root = existing(path, name)
    if not root.is_dir():
        raise UserError(f'{name}: neither a folder nor a .csv')
    names = _class_folders(root, name, class_names)
    files = {folder: _image_files(root / folder) for folder in names if (root / folder).is_dir()}
    for folder, found in files.items():
        if not found:
            raise UserError(f'{name}: class folder {folder!r} holds no image; fill or remove it')
    return image_source(
        name,
        [file for found in files.values() for file in found],
        np.repeat([names.index(folder) for folder in files], [len(found) for found in files.values()]),
        tuple(names),
        channels=channels,
        max_pixels=max_pixels,
        unreadable=unreadable,
        cache_bytes=cache_bytes,
    )


def open_files(paths: Sequence[str | os.PathLike], *, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Source:
    """A source of the named image files, without labels, for prediction. A folder stands for all images below
    it."""
    files = []
    for path in paths:
        found = existing(path, 'files')
        files += _image_files(found) if found.is_dir() else [found]
        if found.is_dir() and not files:
            raise UserError(f'{path}: holds no image')
    return image_source('files', files, None, None, channels=channels, max_pixels=max_pixels, cache_bytes=0)


def image_source(
    name: str,
    files: Sequence[Path],
    labels: np.ndarray | None,
    class_names: tuple[str, ...] | None,
    *,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    unreadable: str = 'error',
    cache_bytes: int = CACHE_BYTES,
) -> Source:
    """A source of image files. `unreadable='skip'` decodes every file once now, leaves out those that fail
    and prints how many; `'error'` stops at the first such file when it is asked for. Up to `cache_bytes` of
    decoded images stay in memory, so that a small set is decoded once."""
    if unreadable not in ('error', 'skip'):
        raise UserError(f"{name}: unreadable={unreadable!r}; known: 'error', 'skip'")
    read = cached(lambda i: read_image(files[i], channels=channels, max_pixels=max_pixels), cache_bytes)
    if labels is not None:
        labels = np.asarray(labels, np.int32)

    def get(i: int) -> dict:
        label = {} if labels is None else {'label': int(labels[i])}
        return {'image': read(i), **label}

    source = Source(name, len(files), get, labels, class_names)
    return _readable_only(source) if unreadable == 'skip' else source


def _readable_only(source: Source) -> Source:
    kept, errors = [], []
    for i in range(source.length):
        try:
            source.get(i)
            kept.append(i)
        except UserError as error:
            errors.append(error)
    if not kept:
        raise UserError(f'{source.name}: none of the {source.length} images is readable; the first: {errors[0]}')
    if errors:
        print(f'{source.name}: skipped {len(errors)} of {source.length} images: {errors[0]}', file=sys.stderr)
    return select(source, np.array(kept))


def cached(read: Callable[[int], np.ndarray], max_bytes: int) -> Callable[[int], np.ndarray]:
    """Keeps what `read` returned, read-only, until `max_bytes` are kept; then reads the others anew each
    time.

    Threads may read the same image twice, which costs time but not correctness.
    """
    kept: dict[int, np.ndarray] = {}
    size = 0

    def get(i: int) -> np.ndarray:
        nonlocal size
        if (array := kept.get(i)) is not None:
            return array
        array = read(i)
        if size + array.nbytes <= max_bytes:
            array.flags.writeable = False
            kept[i] = array
            size += array.nbytes
        return array

    return get


def _class_folders(root: Path, name: str, class_names: Sequence[str] | None) -> list[str]:
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
    if not folders:
        loose = ' (it holds images itself)' if _image_files(root) else ''
        raise UserError(f'{name}: no class folders{loose}; make one folder per class, or list files in a csv')
    if set(folders) <= SPLIT_NAMES and not class_names:
        raise UserError(f'{name}: holds splits, not classes; use folder:{root / folders[0]}')
    for folder in folders if class_names else ():
        if folder not in class_names:
            raise UserError(f'{name}: folder {folder!r} is not in class_names; {nearest(folder, class_names)}')
    return list(class_names) if class_names else folders


def _image_files(folder: Path) -> list[Path]:
    files = []
    for directory, _, names in os.walk(folder):
        visible = [n for n in names if not n.startswith('.') and Path(n).suffix.lower() in raster_formats()]
        files += [Path(directory, n) for n in visible]
    return sorted(files)
