"""What the feature cache saves: seconds of a probe's epoch with the backbone run each time, and on its stored features.

    taskset -c 0 python benchmarks/features.py [--model=resnet18] [--size=96] [--examples=256] [--batch=32] [--json=FILE]

Both are whole runs of `train_and_evaluate`, loading, logging and all, on images of random bytes and weights as drawn, which cost
what any others do. An epoch is the examples by the median `examples_per_second` of the records after the first, which has
the compilation in it. After equal steps both heads must be the same; what they differ by is printed beside their size.

    run      forward of the backbone, step of the head
    cached   step of the head; target: ≥ 50 × as fast
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tl_jax.config import resolve
from tl_jax.train import train_and_evaluate

CLASSES, TARGET = 10, 50
EPOCHS = {'run': 4, 'cached': 40}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet18')
    parser.add_argument('--size', type=int, default=96, help='pixels')
    parser.add_argument('--examples', type=int, default=256)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--json', type=Path, help='also write the figures here')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / 'images.npz', options.examples, options.size)
        config = config_of(options, folder)
        epochs = {name: epoch_seconds(config, Path(folder), name, options.examples) for name in EPOCHS}
        apart, size = heads_apart(config, Path(folder))
    ratio = epochs['run'] / epochs['cached']
    print(f'{options.model}, {options.examples} examples of {options.size} pixels, batches of {options.batch}')
    for name, seconds in epochs.items():
        print(f'{name:7} {1e3 * seconds:9.1f} ms an epoch')
    print(f'run / cached {ratio:.0f} (target ≥ {TARGET}{"" if ratio >= TARGET else ", MISSED"})')
    print(f'heads after {EPOCHS["run"]} epochs: {apart:.1e} apart, the largest entry {size:.2f}')
    if options.json:
        found = {'epoch_seconds': epochs, 'run / cached': ratio, 'apart': apart, 'largest': size}
        options.json.write_text(json.dumps({**vars(options), **found}, indent=1, default=str) + '\n')


def write_images(path: Path, count: int, size: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    np.savez(path, x_train=images, y_train=np.arange(count) % CLASSES)


def config_of(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        'model': {'name': options.model},
        'data': {'train': f'npz:{folder}/images.npz/train', 'train_transform': ['to_float']},
        'batch_size': options.batch,
        'log_every': max(options.examples // options.batch, 1),
        'mesh': {'data': 1},
    }


def trained(config: dict[str, Any], workdir: Path, *, cache: bool, epochs: int) -> None:
    stages = [{'epochs': epochs, 'train': [('head/.*', {'name': 'adam', 'lr': 1e-3})]}]
    config = ml_collections.ConfigDict({**config, 'stages': stages, 'cache_features': cache})
    with contextlib.redirect_stdout(sys.stderr):
        train_and_evaluate(resolve(config), workdir)


def epoch_seconds(config: dict[str, Any], folder: Path, name: str, examples: int) -> float:
    trained(config, folder / name, cache=name == 'cached', epochs=EPOCHS[name])
    records = map(json.loads, (folder / name / 'metrics.jsonl').read_text().splitlines())
    rates = [record['examples_per_second'] for record in records if 'examples_per_second' in record]
    return examples / statistics.median(rates[1:])


def heads_apart(config: dict[str, Any], folder: Path) -> tuple[float, float]:
    """The largest difference between the heads after equal steps, and their largest entry."""
    trained(config, folder / 'equal', cache=True, epochs=EPOCHS['run'])
    kernels = [load_file(folder / name / 'model.safetensors')['params/head/kernel'] for name in ('run', 'equal')]
    return float(np.abs(kernels[0] - kernels[1]).max()), float(np.abs(kernels[0]).max())


if __name__ == '__main__':
    main()
