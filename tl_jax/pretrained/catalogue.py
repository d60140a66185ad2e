"""Well-known checkpoints by the name that their origin gives them, with what one must know to use them right."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Preprocessing(NamedTuple):
    """How an image becomes the network's input: resize, centre crop, `(x / 255 - mean) / std`.

    Attributes:
      size: side of the square input, in pixels.
      mean: of each channel, 0 … 1.
      std: of each channel.
      crop: share of the resized image's short side that the crop keeps (timm's crop_pct).
      interpolation: of the resize, 'bilinear', 'bicubic' or 'nearest'.
    """

    size: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 0.875
    interpolation: str = 'bilinear'


class Entry(NamedTuple):
    """One checkpoint.

    Attributes:
      model: its architecture, of `list_models()`.
      source: where the weights are, as `load_pretrained` takes it.
      licence: as its card states it; '' where it states none.
      preprocessing: of images; None for other inputs.
      fields: of the model, where they are not the architecture's own.
    """

    model: str
    source: str
    licence: str
    preprocessing: Preprocessing | None = None
    fields: Mapping[str, Any] = {}


def evaluation_transforms(preprocessing: Preprocessing) -> list[Any]:
    """The transforms (`tl_jax.data.make_transform`) with which the checkpoint was evaluated."""
    size, how = preprocessing.size, preprocessing.interpolation
    resized = math.floor(size / preprocessing.crop)
    return [
        dict(name='resize', size=resized, interpolation=how),
        dict(name='center_crop', size=size),
        *_normalised(preprocessing),
    ]


def training_transforms(preprocessing: Preprocessing) -> list[Any]:
    """The usual random crop and flip, at the checkpoint's size and normalisation."""
    size, how = preprocessing.size, preprocessing.interpolation
    return [
        dict(name='random_resized_crop', size=size, interpolation=how),
        'flip',
        *_normalised(preprocessing),
    ]


def _normalised(preprocessing: Preprocessing) -> list[Any]:
    return ['to_float', dict(name='normalize', mean=list(preprocessing.mean), std=list(preprocessing.std))]
