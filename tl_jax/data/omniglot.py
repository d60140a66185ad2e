"""Omniglot (Lake et al. 2015, Science 350, 1332) in the split of the few-shot papers, its rotations as classes."""

import re
from typing import Literal

import numpy as np
from PIL import Image

from tl_jax.data.arrays import read_npz
from tl_jax.data.base import Source, existing
from tl_jax.errors import UserError, nearest

SPLITS = ('train', 'val', 'trainval', 'test')
SIDE = 105
RESAMPLING = {'nearest': Image.Resampling.NEAREST, 'lanczos': Image.Resampling.LANCZOS}


def open_omniglot(path: str, *, size: int = 28, interpolation: Literal['nearest', 'lanczos'] = 'nearest') -> Source:
    """`omniglot:DIR/train|val|trainval|test`: 20 drawings of every character, each of its four rotations a class.

    `DIR/omniglot.npz` holds `strokes` uint8 [32460, 1379] (the bits of 105×105, ink 1), `character` [32460] and `names`
    [1623]; `DIR/omniglot_splits/SPLIT.txt` a class a line, `Alphabet/characterNN/rotDDD`: the split of Vinyals et al.
    2016 (arXiv:1606.04080), 4112, 688, 4800 and 1692 classes. Images are uint8 [size, size, 1], ink 255.

    They are made as in the code of Snell et al. 2017 (jakesnell/prototypical-networks): counter-clockwise turns and, as
    Pillow has it for an image of bits, 'nearest' sampling; theirs are also transposed. Finn et al. 2017 resample by
    'lanczos'.
    """
    name = f'omniglot:{path}'
    folder, _, split = path.rpartition('/')
    if split not in SPLITS:
        raise UserError(f'{name}: no split {split!r}; {nearest(split, SPLITS)}')
    if size < 1:
        raise UserError(f'{name}: size={size} must be at least 1')
    file = existing(f'{folder}/omniglot.npz', name)
    class_names = tuple(existing(f'{folder}/omniglot_splits/{split}.txt', name).read_text().split())
    strokes, character, names = read_npz(file, lambda keys: ('strokes', 'character', 'names'))
    number = {str(drawn): i for i, drawn in enumerate(names)}
    where = [_parse(line, number, f'{folder}/omniglot_splits/{split}.txt') for line in class_names]
    drawings = {k: _drawings(strokes[character == k], size, RESAMPLING[interpolation]) for k in {k for k, _ in where}}
    images = np.concatenate([np.rot90(drawings[k], turns, (1, 2)) for k, turns in where])
    images.flags.writeable = False
    labels = np.repeat(np.arange(len(where), dtype=np.int32), [len(drawings[k]) for k, _ in where])
    return Source(name, len(images), lambda i: {'image': images[i], 'label': int(labels[i])}, labels, class_names)


def _parse(line: str, number: dict[str, int], file: str) -> tuple[int, int]:
    """Returns a class's character and its number of quarter turns."""
    match = re.fullmatch(r'(.+)/rot(000|090|180|270)', line)
    if not match or match[1] not in number:
        raise UserError(
            f'{file}: {line!r} is no character and rotation; {nearest(match[1] if match else line, number)}'
        )
    return number[match[1]], int(match[2]) // 90


def _drawings(strokes: np.ndarray, size: int, resample: Image.Resampling) -> np.ndarray:
    """The packed bits [n, 1379] as images uint8 [n, size, size, 1]. They may be turned before or after."""
    bitmaps = np.unpackbits(strokes, axis=1, count=SIDE * SIDE).reshape(-1, SIDE, SIDE) * np.uint8(255)
    return np.stack([np.asarray(Image.fromarray(b).resize((size, size), resample)) for b in bitmaps])[..., None]
