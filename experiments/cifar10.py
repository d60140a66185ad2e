"""CIFAR-10 as one npz, from the lossless mosaics in ../shared/data: `python -m experiments.cifar10`, or `make cifar10`.

Writes `runs/cifar10.npz` (184 MB; 50,000 / 10,000 images of 32×32) with the arrays x_train, y_train, x_test, y_test, which
configs read as `npz:runs/cifar10.npz/train`. Images stand by class; streams and slices permute them.
"""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'


def read_cifar10(parts: tuple[str, ...]) -> tuple[UInt8[np.ndarray, 'n 32 32 3'], Int[np.ndarray, 'n']]:
    """Images and labels of lossless mosaics of 32-pixel tiles, one a class; the classes are in their usual order."""
    images, labels = [], []
    for part in parts:
        with zipfile.ZipFile(SHARED / f'data/cifar10_{part}.zip') as archive:
            (index_name,) = [name for name in archive.namelist() if name.endswith('INDEX.json')]
            index = json.loads(archive.read(index_name))
            for label, name in enumerate(index['classes']):
                files = [member for member in archive.namelist() if member.endswith(f'/{name}.webp')]
                if not files:
                    continue  # the training classes are spread over two archives
                mosaic = np.asarray(Image.open(io.BytesIO(archive.read(files[0]))).convert('RGB'))
                tiles = mosaic.reshape(mosaic.shape[0] // 32, 32, index['cols'], 32, 3).transpose(0, 2, 1, 3, 4)
                images.append(tiles.reshape(-1, 32, 32, 3)[: index['per_class']])
                labels.append(np.full(len(images[-1]), label))
    return np.concatenate(images), np.concatenate(labels)


def main() -> None:
    """Writes the npz, whole or not at all."""
    path = ROOT / 'runs' / 'cifar10.npz'
    path.parent.mkdir(exist_ok=True)
    arrays = {}
    for split, parts in {'train': ('train_a', 'train_b'), 'test': ('test',)}.items():
        arrays[f'x_{split}'], arrays[f'y_{split}'] = read_cifar10(parts)
    partial = path.with_name('.cifar10.partial.npz')
    np.savez(partial, **arrays)
    os.replace(partial, path)
    print(f'{path}: {len(arrays["x_train"]):,} / {len(arrays["x_test"]):,} images')


if __name__ == '__main__':
    main()
