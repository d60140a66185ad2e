"""MultiMNIST: two overlaid digits, one up and left, one down and right; a task for each."""

import numpy as np
from jaxtyping import Int, UInt8

from tl_jax.data.arrays import open_npz
from tl_jax.data.base import MAX_BYTES, Source, need_labels
from tl_jax.errors import UserError

CANVAS, SHIFT = 36, 6


def open_multimnist(path: str, *, seed: int = 0, max_bytes: int = MAX_BYTES) -> Source:
    """`multimnist:PATH.npz/SPLIT`: every digit of the npz file's split, as `npz:` reads it, with a partner drawn by `seed`.

    Examples: `image` uint8 [28, 28, 1], `label_left` and `label_right` int32, the digit up and left and the one down and
    right. No `label`: it is for objectives that name their tasks.
    """
    digits = open_npz(path, max_bytes=max_bytes)
    images = np.stack([digits.get(i)['image'] for i in range(digits.length)])
    if images.shape[1:] != (28, 28, 1):
        raise UserError(f'multimnist:{path}: images are {list(images.shape[1:])}; expected digits of 28 × 28 × 1')
    left = need_labels(digits, 'multimnist')
    partner = partners(digits.length, seed)
    images = overlaid(images[..., 0], images[partner, ..., 0])[..., None]
    images.flags.writeable = False
    right = left[partner]

    def get(i: int) -> dict:
        return {'image': images[i], 'label_left': left[i], 'label_right': right[i]}

    return Source(f'multimnist:{path}', len(images), get, class_names=tuple(map(str, range(10))))


def partners(length: int, seed: int) -> Int[np.ndarray, ' examples']:
    """The digit that is laid over each; drawn with replacement. RandomState's streams are frozen (NEP 19)."""
    return np.random.RandomState(seed).randint(length, size=length)


def overlaid(
    left: UInt8[np.ndarray, 'examples 28 28'], right: UInt8[np.ndarray, 'examples 28 28']
) -> UInt8[np.ndarray, 'examples 28 28']:
    """The pixelwise maximum of `left` at (0, 0) and `right` at (6, 6) of 36 × 36, then each 28 × 28 by nearest neighbour.

    As in Sener & Koltun's code (isl-org/MultiObjectiveOptimization, multi_mnist_loader.py), save that scipy's `imresize` also
    stretched each image to the full 0 … 255.
    """
    canvas = np.zeros((len(left), CANVAS, CANVAS), np.uint8)
    canvas[:, :28, :28] = left
    np.maximum(
        canvas[:, SHIFT : SHIFT + 28, SHIFT : SHIFT + 28], right, out=canvas[:, SHIFT : SHIFT + 28, SHIFT : SHIFT + 28]
    )
    kept = ((np.arange(28) + 0.5) * CANVAS / 28).astype(int)
    return canvas[:, kept[:, None], kept]
