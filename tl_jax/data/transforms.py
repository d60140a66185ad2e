"""Transforms of one example on the host: pure functions `(array, rng, *, options) -> array`.

An image is uint8 [H, W, C] of 0 … 255 until `to_float` or `normalize` make it float32; what resamples or
recolours wants uint8, so these two come last. Names and meanings follow
torchvision's transforms of PIL images, which resample with antialiasing; tests compare them with Pillow and
closed forms, not with torchvision itself. Colour operations and RandAugment are in `augment.py`.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from tl_jax.data import augment
from tl_jax.errors import UserError, nearest

INTERPOLATIONS = {
    'nearest': Image.Resampling.NEAREST,
    'bilinear': Image.Resampling.BILINEAR,
    'bicubic': Image.Resampling.BICUBIC,
    'lanczos': Image.Resampling.LANCZOS,
}
Size = int | Sequence[int]  # an int is both sides, except in `resize`
Range = float | Sequence[float]  # a number d is (-d, d)


def make_transform(items: Sequence[str | Mapping[str, Any]]) -> Callable[[dict, Generator], dict]:
    """One function `(example, rng) -> example` from a list of names or `dict(name=…, **options)`, applied in
    order.

    It changes the field `image`, or `inputs` where there is no image, and keeps the others. Without items it changes
    nothing, whatever the example holds.
    """
    functions = [_bind(item) for item in items]
    if not functions:
        return lambda example, rng: example

    def transform(example: dict, rng: Generator) -> dict:
        field = 'image' if 'image' in example else 'inputs'
        if field not in example:
            raise UserError(f'transforms act on the field image or inputs; these examples have {", ".join(example)}')
        array = example[field]
        for function in functions:
            array = function(array, rng)
        return {**example, field: array}

    return transform


def split_elementwise(items: Sequence[str | Mapping[str, Any]]) -> tuple[list, list]:
    """`items` as (first, last), where `last` treats every pixel by itself and may be applied to a whole batch
    at once.

    The values are the same; for small images it is about three times as fast.
    """
    items = list(items)
    cut = len(items)
    while cut and _name(items[cut - 1]) in ELEMENTWISE:
        cut -= 1
    return items[:cut], items[cut:]


def random_transforms(items: Sequence[str | Mapping[str, Any]]) -> list[str]:
    """The names of those that may give an example another look each time."""
    return [_name(item) for item in items if _name(item) not in STEADY]


def list_transforms() -> list[str]:
    return sorted(TRANSFORMS)


def _bind(item: str | Mapping[str, Any]) -> Callable[[np.ndarray, Generator], np.ndarray]:
    name = _name(item)
    options = {} if isinstance(item, str) else {key: value for key, value in item.items() if key != 'name'}
    if name not in TRANSFORMS:
        raise UserError(f'transforms: unknown transform {name!r}; {nearest(name, TRANSFORMS)}')
    function = TRANSFORMS[name]
    parameters = dict(list(inspect.signature(function).parameters.items())[2:])
    for option in options:
        if option not in parameters:
            raise UserError(f'transforms: {name} has no option {option!r}; {nearest(option, parameters)}')
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in options]
    if missing:
        raise UserError(f'transforms: {name} needs {", ".join(missing)}')
    return partial(function, **options)


def _name(item: str | Mapping[str, Any]) -> str:
    name = item if isinstance(item, str) else item.get('name') if isinstance(item, Mapping) else None
    if not isinstance(name, str):
        raise UserError(f'transforms: {item!r} is neither a name nor dict(name=…, options)')
    return name


# Sizes and crops


def resize(image: np.ndarray, rng: Generator, *, size: Size, interpolation: str = 'bilinear') -> np.ndarray:
    """To (height, width), or, for an int, so that the short side is `size` and the aspect stays."""
    del rng
    height, width = image.shape[:2]
    if isinstance(size, int):
        short = min(height, width)
        size = (int(size * height / short), int(size * width / short))
    return _resize(image, tuple(size), interpolation)


def center_crop(image: np.ndarray, rng: Generator, *, size: Size) -> np.ndarray:
    """The central `size`; a smaller image is padded with 0 first."""
    del rng
    height, width = _pair(size)
    image = _pad_to(image, height, width)
    top = round((image.shape[0] - height) / 2)
    left = round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]


def random_crop(
    image: np.ndarray, rng: Generator, *, size: Size, padding: int = 0, mode: str = 'constant', fill: int = 0
) -> np.ndarray:
    """A uniformly placed crop of `size` after padding every side; a crop larger than that is an error."""
    height, width = _pair(size)
    image = pad(image, rng, padding=padding, mode=mode, fill=fill)
    if height > image.shape[0] or width > image.shape[1]:
        has = f'{image.shape[0]}×{image.shape[1]}'
        raise UserError(f'transforms: random_crop of {height}×{width} from {has}; add a resize before it')
    top = rng.integers(image.shape[0] - height + 1)
    left = rng.integers(image.shape[1] - width + 1)
    return image[top : top + height, left : left + width]


def random_resized_crop(
    image: np.ndarray,
    rng: Generator,
    *,
    size: Size,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    interpolation: str = 'bilinear',
) -> np.ndarray:
    """Inception crop (Szegedy et al. 2015): a random share `scale` of the area at a random aspect `ratio`
    (log-uniform), resized to `size`. After 10 draws that do not fit, the largest central crop whose aspect
    lies in `ratio`."""
    top, left, height, width = _inception_box(image.shape[0], image.shape[1], rng, scale, ratio)
    return _resize(image[top : top + height, left : left + width], _pair(size), interpolation)


def _inception_box(
    height: int, width: int, rng: Generator, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def pad(
    image: np.ndarray, rng: Generator, *, padding: int | Sequence[int], mode: str = 'constant', fill: int = 0
) -> np.ndarray:
    """Pads by an int on every side, (vertical, horizontal) or (top, bottom, left, right); modes of
    `np.pad`."""
    del rng
    sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    top, bottom, left, right = sides if len(sides) == 4 else np.repeat(sides, 2)
    if not any((top, bottom, left, right)):
        return image
    if mode != 'constant':
        return np.pad(image, ((top, bottom), (left, right), (0, 0)), mode=mode)
    height, width, channels = image.shape
    padded = np.full((height + top + bottom, width + left + right, channels), fill, image.dtype)
    padded[top : top + height, left : left + width] = image  # np.pad takes ten times as long on small images
    return padded


# Geometry


def flip(image: np.ndarray, rng: Generator, *, probability: float = 0.5, axis: str = 'horizontal') -> np.ndarray:
    """Mirrors left-right (`horizontal`) or top-bottom (`vertical`) with `probability`."""
    if axis not in ('horizontal', 'vertical'):
        raise UserError(f"transforms: flip has no axis {axis!r}; known: 'horizontal', 'vertical'")
    if rng.random() >= probability:
        return image
    return image[:, ::-1] if axis == 'horizontal' else image[::-1]


def rotate(
    image: np.ndarray, rng: Generator, *, degrees: Range, interpolation: str = 'bilinear', fill: int = 0
) -> np.ndarray:
    """Counter-clockwise about the centre by a uniform angle of the range `degrees`; the size stays."""
    angle = rng.uniform(*_range(degrees))
    resample = _resampling(interpolation)
    return augment.on_pil(image, lambda plane: plane.rotate(angle, resample, fillcolor=augment.fill_of(plane, fill)))


def zoom(
    image: np.ndarray,
    rng: Generator,
    *,
    scale: Sequence[float] = (0.8, 1.2),
    interpolation: str = 'bilinear',
    fill: int = 0,
) -> np.ndarray:
    """Magnifies about the centre by a uniform factor of the range `scale` (2: a detail at twice its size);
    the size stays, and `fill` surrounds an image that shrinks."""
    factor = rng.uniform(*scale)
    height, width = image.shape[:2]
    matrix = (1 / factor, 0, width / 2 * (1 - 1 / factor), 0, 1 / factor, height / 2 * (1 - 1 / factor))
    return augment.affine(image, matrix, _resampling(interpolation), fill)


# Values


def to_float(image: np.ndarray, rng: Generator) -> np.ndarray:
    """uint8 0 … 255 to float32 0 … 1; a float image stays as it is."""
    del rng
    return np.divide(image, 255, dtype=np.float32) if image.dtype == np.uint8 else image


def multiply(image: np.ndarray, rng: Generator, *, factor: float) -> np.ndarray:
    """image · factor; a uint8 image is rounded and clipped. 255 for images that hold black and white as 0 and 1."""
    del rng
    scaled = image * np.float32(factor)
    return scaled if image.dtype != np.uint8 else np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def normalize(
    image: np.ndarray, rng: Generator, *, mean: Sequence[float], std: Sequence[float], max_value: float = 1.0
) -> np.ndarray:
    """(image - mean) / std by channel, float32. `mean` and `std` are in units of pixels of 0 … `max_value`.

    With max_value=1 these are torchvision's ImageNet figures (.485, …), with 255 Caffe's (104, 117, 123). The
    image is uint8 0 … 255 or float 0 … 1 (after `to_float`), and is scaled to 0 … max_value first either way.
    """
    channels = image.shape[-1]
    for name, values in (('mean', mean), ('std', std)):
        if np.size(values) not in (1, channels):
            raise UserError(f'transforms: normalize has {np.size(values)} values of {name} for {channels} channels')
    image = to_float(image, rng)
    if max_value != 1:
        image = image * np.float32(max_value)
    image = image - np.asarray(mean, np.float32)
    image /= np.asarray(std, np.float32)
    return image


def standardize(inputs: np.ndarray, rng: Generator, *, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(inputs - mean) / std, for the features of a table in their own units."""
    del rng
    return (inputs - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def noise(image: np.ndarray, rng: Generator, *, stddev: float) -> np.ndarray:
    """Adds Gaussian noise; `stddev` in units of the image's range of 1. A uint8 image is rounded and
    clipped."""
    drawn = rng.standard_normal(image.shape, np.float32) * np.float32(stddev)
    if image.dtype != np.uint8:
        return image + drawn
    return np.clip(np.rint(image + 255 * drawn), 0, 255).astype(np.uint8)


def cutout(image: np.ndarray, rng: Generator, *, length: int, fill: float = 0) -> np.ndarray:
    """Sets one square of side `length`, around a uniformly drawn pixel and clipped at the border, to `fill`
    (DeVries & Taylor 2017, arXiv:1708.04552; after `normalize` a fill of 0 is the mean colour, as in the
    paper)."""
    spans = []
    for size in image.shape[:2]:
        centre = int(rng.integers(size))
        spans.append(slice(max(centre - length // 2, 0), min(centre - length // 2 + length, size)))
    image = image.copy()
    image[tuple(spans)] = fill
    return image


# Channels


def grayscale(image: np.ndarray, rng: Generator, *, probability: float = 1.0) -> np.ndarray:
    """Luma (ITU-R 601) in every channel, with `probability`; the number of channels stays."""
    if image.shape[-1] == 1 or rng.random() >= probability:
        return image
    return np.repeat(augment.luma(image), image.shape[-1], axis=-1)


def to_gray(image: np.ndarray, rng: Generator) -> np.ndarray:
    """[H, W, 3] to its luma [H, W, 1]."""
    del rng
    return image if image.shape[-1] == 1 else augment.luma(image)


def to_rgb(image: np.ndarray, rng: Generator) -> np.ndarray:
    """[H, W, 1] to three equal channels; of [H, W, 4] the first three."""
    del rng
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]


def reverse_channels(image: np.ndarray, rng: Generator) -> np.ndarray:
    """RGB to BGR, for networks from Caffe and OpenCV."""
    del rng
    return image[..., ::-1]


TRANSFORMS: dict[str, Callable[..., np.ndarray]] = {
    function.__name__: function
    for function in (
        *(resize, center_crop, random_crop, random_resized_crop, pad, flip, rotate, zoom),
        *(to_float, multiply, normalize, standardize, noise, cutout, grayscale, to_gray, to_rgb, reverse_channels),
        *(augment.color_jitter, augment.rand_augment),
    )
}
ELEMENTWISE = {'to_float', 'normalize', 'standardize', 'to_rgb', 'reverse_channels'}
STEADY = {'resize', 'center_crop', 'pad', 'multiply', 'to_gray', *ELEMENTWISE}


def _resize(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    resample = _resampling(interpolation)
    return augment.on_pil(image, lambda plane: plane.resize(size[::-1], resample))


def _pad_to(image: np.ndarray, height: int, width: int) -> np.ndarray:
    down, right = max(0, height - image.shape[0]), max(0, width - image.shape[1])
    return pad(image, None, padding=(down // 2, down - down // 2, right // 2, right - right // 2))


def _resampling(interpolation: str) -> Image.Resampling:
    if interpolation not in INTERPOLATIONS:
        raise UserError(
            f'transforms: unknown interpolation {interpolation!r}; {nearest(interpolation, INTERPOLATIONS)}'
        )
    return INTERPOLATIONS[interpolation]


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _range(value: Range) -> tuple[float, float]:
    return (-value, value) if isinstance(value, int | float) else tuple(value)
