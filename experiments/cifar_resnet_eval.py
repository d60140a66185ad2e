"""Published CIFAR-10 ResNets, read from their torch checkpoints, on the real CIFAR-10 test set.

    python -m experiments.cifar_resnet_eval

The weights are those of akamaster/pytorch_resnet_cifar10 (He et al. 2015, arXiv:1512.03385, section 4.2). Their test
errors, as measured by an independent forward pass (../shared/DATA.md): 8.27 % (ResNet-20) and 6.61 % (ResNet-56). Each
is evaluated on one device and on eight virtual ones. Writes `experiments/results/cifar_resnet_eval.json`.
"""

import io
import json
import sys
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from tl_jax import mesh as meshes
from tl_jax import models, pretrained, workdir

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'
PUBLISHED = {'resnet20': ('resnet20-12fca82f.th', 8.27), 'resnet56': ('resnet56-4bfd9763.th', 6.61)}
TOLERANCE = 0.05  # Five images: another order of summation may move a tie.
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def read_cifar10(path: Path) -> tuple[UInt8[np.ndarray, 'n 32 32 3'], Int[np.ndarray, 'n']]:
    """Images and labels from one lossless mosaic of 32-pixel tiles a class; the classes are in their usual order."""
    images, labels = [], []
    with zipfile.ZipFile(path) as archive:
        (index_name,) = [name for name in archive.namelist() if name.endswith('INDEX.json')]
        index = json.loads(archive.read(index_name))
        for label, name in enumerate(index['classes']):
            (file,) = [member for member in archive.namelist() if member.endswith(f'/{name}.webp')]
            mosaic = np.asarray(Image.open(io.BytesIO(archive.read(file))).convert('RGB'))
            tiles = mosaic.reshape(mosaic.shape[0] // 32, 32, index['cols'], 32, 3).transpose(0, 2, 1, 3, 4)
            images.append(tiles.reshape(-1, 32, 32, 3)[: index['per_class']])
            labels.append(np.full(len(images[-1]), label))
    return np.concatenate(images), np.concatenate(labels)


def error_percent(
    model,
    variables,
    images: UInt8[np.ndarray, 'n 32 32 3'],
    labels: Int[np.ndarray, 'n'],
    *,
    devices: int,
    batch: int = 1000,
) -> float:
    """Returns the percentage of images whose largest logit is not their label's; `batch` divides n."""
    mesh = meshes.create_mesh(data=devices)

    @jax.jit
    def mistakes(variables, images: Float[Array, 'b 32 32 3'], labels):
        logits = model.apply(variables, (images / 255.0 - MEAN) / STD, train=False)['logits']
        return jnp.sum(jnp.argmax(logits, -1) != labels)

    variables = jax.device_put(variables, meshes.replicated(mesh))
    wrong = 0
    for start in range(0, len(images), batch):
        inputs = images[start : start + batch].astype(np.float32), labels[start : start + batch]
        wrong += int(mistakes(variables, *jax.device_put(inputs, meshes.over_batch(mesh))))
    return 100 * wrong / len(images)


def main() -> int:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', 8)
    images, labels = read_cifar10(SHARED / 'data/cifar10_test.zip')
    results = []
    for name, (file, published) in PUBLISHED.items():
        variables = pretrained.load_pretrained(name, SHARED / 'weights/cifar10_resnet' / file)
        model = models.create_model(name, num_classes=10)
        for devices in (1, 8):
            began = time.monotonic()
            error = error_percent(model, variables, images, labels, devices=devices)
            seconds = round(time.monotonic() - began, 1)
            print(f'{name}, {devices} devices: test error {error:.2f} %, published {published} % ({seconds} s)')
            results.append(
                {'model': name, 'devices': devices, 'error': error, 'published': published, 'seconds': seconds}
            )
    target = ROOT / 'experiments/results/cifar_resnet_eval.json'
    record = {'environment': workdir.environment(), 'seed': None, 'tolerance': TOLERANCE, 'results': results}
    workdir.write_json(target, record)
    print(f'wrote {target}')
    return int(any(abs(result['error'] - result['published']) > TOLERANCE for result in results))


if __name__ == '__main__':
    sys.exit(main())
