"""Colour jitter and RandAugment on uint8 images by Pillow, with torchvision's operations and ranges."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageOps

from tl_jax.errors import UserError

NEAREST = Image.Resampling.NEAREST


def on_pil(image: np.ndarray, function: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Applies a function of a Pillow image (L, RGB or RGBA) to a uint8 array [H, W, C]; other C go plane by
    plane."""
    if image.dtype != np.uint8:
        raise UserError('transforms: resampling and colours need a uint8 image; put to_float and normalize after them')
    channels = image.shape[-1]
    if channels == 1:
        return np.asarray(function(Image.fromarray(image[..., 0])))[..., None]
    if channels in (3, 4):
        return np.asarray(function(Image.fromarray(np.ascontiguousarray(image))))
    planes = [np.asarray(function(Image.fromarray(np.ascontiguousarray(image[..., c])))) for c in range(channels)]
    return np.stack(planes, axis=-1)


def fill_of(image: Image.Image, fill: int) -> int | tuple[int, ...]:
    bands = len(image.getbands())
    return fill if bands == 1 else (fill,) * bands


def affine(image: np.ndarray, matrix: Sequence[float], resample: Image.Resampling, fill: int = 0) -> np.ndarray:
    """Each output pixel (x, y) takes the input at (a x + b y + c, d x + e y + f) of matrix = (a, b, c, d, e,
    f)."""
    transform = Image.Transform.AFFINE
    return on_pil(
        image,
        lambda plane: plane.transform(plane.size, transform, matrix, resample, fillcolor=fill_of(plane, fill)),
    )


def luma(image: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma [H, W, 1] of [H, W, 3]: Pillow's integer arithmetic for uint8, the same weights for
    floats."""
    if image.shape[-1] != 3:
        raise UserError(f'transforms: grey is made of 3 channels, not of {image.shape[-1]}')
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(image)).convert('L'))[..., None]
    return image @ np.array([[0.299], [0.587], [0.114]], image.dtype)


def color_jitter(
    image: np.ndarray,
    rng: Generator,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> np.ndarray:
    """torchvision's ColorJitter: factors uniform in [max(0, 1 - x), 1 + x], hue shift in [-hue, hue] turns of
    the colour circle (at most 0.5), in random order. On grey images saturation and hue change nothing."""
    if not 0 <= hue <= 0.5:
        raise UserError(f'transforms: color_jitter hue={hue} must lie in 0 … 0.5')
    strengths = (
        (ImageEnhance.Brightness, brightness),
        (ImageEnhance.Contrast, contrast),
        (ImageEnhance.Color, saturation),
    )
    steps = [_enhancer(kind, rng.uniform(max(0, 1 - x), 1 + x)) for kind, x in strengths if x]
    if hue:
        shift = rng.uniform(-hue, hue)
        steps.append(lambda plane: shift_hue(plane, shift))
    for place in rng.permutation(len(steps)):
        image = on_pil(image, steps[place])
    return image


def _enhancer(kind: Callable, factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda plane: kind(plane).enhance(factor)


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Moves every pixel's hue by `turns` of the colour circle, in Pillow's HSV of 8 bits a channel."""
    if image.mode != 'RGB':
        return image
    hue, saturation, value = image.convert('HSV').split()
    moved = (np.asarray(hue).astype(np.int32) + int(turns * 255)) % 256
    return Image.merge('HSV', (Image.fromarray(moved.astype(np.uint8)), saturation, value)).convert('RGB')


def rand_augment(
    image: np.ndarray,
    rng: Generator,
    *,
    num_ops: int = 2,
    magnitude: int = 9,
    num_magnitude_bins: int = 31,
    fill: int = 0,
) -> np.ndarray:
    """RandAugment (Cubuk et al. 2020, arXiv:1909.13719): `num_ops` operations drawn with replacement, all at
    `magnitude`.

    Operations, ranges and signs are torchvision's: `magnitude` counts from 0 to num_magnitude_bins - 1.
    """
    if not 0 <= magnitude < num_magnitude_bins:
        raise UserError(f'transforms: rand_augment magnitude={magnitude} must lie in 0 … {num_magnitude_bins - 1}')
    strength = magnitude / (num_magnitude_bins - 1)
    names = list(OPERATIONS)
    for _ in range(num_ops):
        name = names[rng.integers(len(names))]
        sign = 1 if rng.random() < 0.5 else -1
        image = OPERATIONS[name](image, strength, sign, fill)
    return image


def _shear_x(image: np.ndarray, strength: float, sign: int, fill: int) -> np.ndarray:
    return affine(image, (1, sign * 0.3 * strength, 0, 0, 1, 0), NEAREST, fill)


def _shear_y(image: np.ndarray, strength: float, sign: int, fill: int) -> np.ndarray:
    return affine(image, (1, 0, 0, sign * 0.3 * strength, 1, 0), NEAREST, fill)


def _translate_x(image: np.ndarray, strength: float, sign: int, fill: int) -> np.ndarray:
    return affine(image, (1, 0, -sign * int(150 / 331 * image.shape[1] * strength), 0, 1, 0), NEAREST, fill)


def _translate_y(image: np.ndarray, strength: float, sign: int, fill: int) -> np.ndarray:
    return affine(image, (1, 0, 0, 0, 1, -sign * int(150 / 331 * image.shape[0] * strength)), NEAREST, fill)


def _rotate(image: np.ndarray, strength: float, sign: int, fill: int) -> np.ndarray:
    return on_pil(image, lambda plane: plane.rotate(sign * 30 * strength, NEAREST, fillcolor=fill_of(plane, fill)))


def _enhance(kind: Callable) -> Callable[[np.ndarray, float, int, int], np.ndarray]:
    return lambda image, strength, sign, fill: on_pil(image, _enhancer(kind, 1 + sign * 0.9 * strength))


def _posterize(image: np.ndarray, strength: float, sign: int, fill: int) -> np.ndarray:
    return on_pil(image, lambda plane: ImageOps.posterize(plane, 8 - round(4 * strength)))


def _solarize(image: np.ndarray, strength: float, sign: int, fill: int) -> np.ndarray:
    return on_pil(image, lambda plane: ImageOps.solarize(plane, 255 * (1 - strength)))


OPERATIONS: dict[str, Callable[[np.ndarray, float, int, int], np.ndarray]] = {
    'identity': lambda image, strength, sign, fill: image,
    'shear_x': _shear_x,
    'shear_y': _shear_y,
    'translate_x': _translate_x,
    'translate_y': _translate_y,
    'rotate': _rotate,
    'brightness': _enhance(ImageEnhance.Brightness),
    'color': _enhance(ImageEnhance.Color),
    'contrast': _enhance(ImageEnhance.Contrast),
    'sharpness': _enhance(ImageEnhance.Sharpness),
    'posterize': _posterize,
    'solarize': _solarize,
    'autocontrast': lambda image, strength, sign, fill: on_pil(image, ImageOps.autocontrast),
    'equalize': lambda image, strength, sign, fill: on_pil(image, ImageOps.equalize),
}
