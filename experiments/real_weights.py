"""Every real file of weights at hand, read into its family and judged on the real data at hand: `docs/weights.md`.

    python -m experiments.real_weights

Files and data are those of ../shared (see DATA.md there). Where a file is a classifier of the data, it classifies them; where
it is an ImageNet network, it is judged by a linear probe of its features (multinomial logistic regression on standardised
features, L2 with C = 0.1, never tuned on the test images), and by its own five likeliest classes on the photos of ants and
bees, both of which ImageNet has. Writes `experiments/results/real_weights.json` and the table.
"""

import contextlib
import io
import os
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.cifar10 import read_cifar10
from tl_jax import models, pretrained, workdir

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'
WEIGHTS = SHARED / 'weights'
BEE, ANT = 309, 310  # of ImageNet's thousand
IMAGENET_MEAN, IMAGENET_STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
CAFFE_MEAN = np.float32([123, 117, 104])

Images = UInt8[np.ndarray, 'n height width 3']


class Split(NamedTuple):
    """Images and labels to learn from, and others to be judged by."""

    train: tuple[Images, Int[np.ndarray, 'n']]
    test: tuple[Images, Int[np.ndarray, 'n']]


class File(NamedTuple):
    """A file of weights.

    Attributes:
      path: below ../shared/weights.
      model: of ours, and its fields.
      fields: of the model.
      size: pixels of its input; 0 for CIFAR's own.
      prepare: images of 0 … 255 -> its input.
      background: classes before ImageNet's first.
    """

    path: str
    model: str
    fields: Mapping[str, Any] = {}
    size: int = 0
    prepare: Callable[[Any], Any] = lambda x: x
    background: int = 0


def _imagenet(x):
    return (x / 255 - IMAGENET_MEAN) / IMAGENET_STD


def _symmetric(x):
    return x / 127.5 - 1


_FOLDED = dict(norm='none', padding='same')
CLASSIFIERS = (  # of CIFAR-10, with the accuracy that DATA.md states
    (File('cifar10_resnet/resnet20-12fca82f.th', 'resnet20', {}, 0, _imagenet), 91.73),
    (File('cifar10_resnet/resnet56-4bfd9763.th', 'resnet56', {}, 0, _imagenet), 93.39),
    (File('mlperf_tiny/pretrainedResnet.h5', 'resnet8_keras'), 88.2),
    (File('mlperf_tiny/pretrainedResnet.tflite', 'resnet8_keras', dict(norm='none')), 88.2),
)
IMAGENET = (
    File('mobilenet_tflite/mobilenet_v2_1.0_224_quant.tflite', 'mobilenet_v2', _FOLDED, 224, _symmetric, 1),
    File('mobilenet_tflite/mobilenet_v2_1.0_224_quant.npz', 'mobilenet_v2', _FOLDED, 224, _symmetric, 1),
    File('mobilenet_tflite/tf2_mobilenet_v2_1.0_224_ptq.tflite', 'mobilenet_v2', _FOLDED, 224, _symmetric, 1),
    File(
        'mobilenet_tflite/mobilenet_v1_0.25_128_quant.tflite',
        'mobilenet_v1',
        dict(width=0.25, **_FOLDED),
        128,
        _symmetric,
        1,
    ),
    File('squeezenet/squeezenet_v1.1_fp16.npz', 'squeezenet1_1', dict(classes=1000), 227, lambda x: x - CAFFE_MEAN),
)
OTHERS = (  # opened and run: no labelled data for them here
    (File('mlperf_tiny/vww_96.h5', 'mobilenet_v1_vww', {}, 96, lambda x: x / 255), 'photos of ants and bees'),
    (
        File(
            'mlperf_tiny/vww_96_float.tflite',
            'mobilenet_v1',
            dict(width=0.25, activation='relu', **_FOLDED),
            96,
            lambda x: x / 255,
        ),
        'photos of ants and bees',
    ),
    (File('mlperf_tiny/kws_ref_model_float32.tflite', 'ds_cnn'), 'noise of 49 × 10'),
    (File('doodlenet_tfjs/model.json', 'doodlenet'), 'three sketches'),
)


def main() -> int:
    results = []
    cifar = Split(*(read_cifar10(parts) for parts in (('train_a', 'train_b'), ('test',))))
    photos = Split(read_photos('train'), read_photos('val'))
    for file, published in CLASSIFIERS:
        with row(results, file) as (run, figures):
            found = run(cifar.test[0], 'logits').argmax(1)
            figures['CIFAR-10 accuracy'] = 100 * float(np.mean(found == cifar.test[1]))
            figures['published'] = published
    some = Split(subset(*cifar.train, 300), subset(*cifar.test, 200))
    for file in IMAGENET:
        with row(results, file) as (run, figures):
            figures['ants and bees, probe'] = probe(run, photos)
            figures['ants and bees, among its own top 5'] = top5(run, photos.test, file.background)
            figures['CIFAR-10, probe of 3000'] = probe(run, some)
    for file, data in OTHERS:
        with row(results, file) as (run, figures):
            figures['run on'] = data
            figures['largest class'] = described(run, file, photos.test[0])
    record = {'command': 'python -m experiments.real_weights', 'environment': workdir.environment(), 'results': results}
    workdir.write_json(ROOT / 'experiments/results/real_weights.json', record)
    workdir.write_atomically(ROOT / 'docs/weights.md', table(record))
    print(table(record))
    return 0


@contextlib.contextmanager
def row(results: list[dict[str, Any]], file: File) -> Iterator[tuple[Callable, dict[str, Any]]]:
    """Opens a file; gives its network as (images, endpoint) -> array, and the figures to fill in."""
    began = time.monotonic()
    account = io.StringIO()
    with contextlib.redirect_stdout(account):
        variables = pretrained.load_pretrained(file.model, WEIGHTS / file.path, **file.fields)
    head = variables['params'].get('head')
    module = models.create_model(file.model, num_classes=head and len(head['bias']), **file.fields)
    apply = jax.jit(lambda v, x: module.apply(v, x))

    def run(images: Images, endpoint: str, batch: int = 100) -> Float[np.ndarray, 'n dim']:
        size = file.size and min(
            file.size, 3 * images.shape[1]
        )  # CIFAR's 32 pixels enlarged to 96, photos to the file's own
        parts = []
        for start in range(0, len(images), batch):
            part = file.prepare(scaled(images[start : start + batch], size).astype(np.float32))
            short = batch - len(part)  # one shape, one compilation
            whole = np.concatenate([part, np.zeros((short, *part.shape[1:]), np.float32)])
            parts.append(np.asarray(apply(variables, whole)[endpoint])[: batch - short])
        return np.concatenate(parts)

    figures: dict[str, Any] = {}
    yield run, figures
    tensors = account.getvalue().split('used')[1].split('tensors')[0].strip()
    seconds = round(time.monotonic() - began, 1)
    results.append({'file': file.path, 'model': file.model, 'tensors': int(tensors), **figures, 'seconds': seconds})
    print(results[-1], flush=True)


def probe(run: Callable, data: Split) -> float:
    """Test accuracy, in per cent, of a linear probe of the features."""
    (train, labels), (test, truth) = data
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    with warnings.catch_warnings():
        warnings.simplefilter('error', ConvergenceWarning)
        classifier.fit(run(train, 'features'), labels)
    return 100 * float(np.mean(classifier.predict(run(test, 'features')) == truth))


def top5(run: Callable, data: tuple[Images, Int[np.ndarray, 'n']], background: int) -> float:
    """Share of photos, in per cent, whose own class is among the network's five likeliest of a thousand."""
    images, labels = data
    best = np.argsort(run(images, 'logits'), 1)[:, -5:] - background
    return 100 * float(np.mean((best == np.where(labels == 0, ANT, BEE)[:, None]).any(1)))


def described(run: Callable, file: File, photos: Images) -> str:
    """What the network says most of its inputs are."""
    if file.model == 'ds_cnn':
        noise = np.random.default_rng(0).standard_normal((100, 49, 10, 1), np.float32)
        return f'class {np.bincount(run(noise, "logits").argmax(1)).argmax()} of 12'
    if file.model == 'doodlenet':
        names = (WEIGHTS / 'doodlenet_tfjs/class_names.txt').read_text().splitlines()
        drawn = sketches()
        said = [names[i] for i in run(np.stack(list(drawn.values())), 'logits').argmax(1)]
        return ', '.join(f'{shown}: {name}' for shown, name in zip(drawn, said, strict=True))
    return f'person in {100 * float(np.mean(run(photos, "logits").argmax(1) == 1)):.0f} % of them'


def sketches() -> dict[str, Float[np.ndarray, '28 28 1']]:
    """Ink of 1 on paper of 0, by the name of what is drawn."""
    y, x = np.mgrid[:28, :28].astype(np.float32)
    across, up = abs(x - 13.5), abs(y - 13.5)
    sides = np.minimum(26.5 - y, abs((y - 1) / 2 - across))
    distance = {
        'circle': abs(np.hypot(across, up) - 11.5),
        'square': abs(np.maximum(across, up) - 12.5),
        'triangle': np.where(across <= y / 2 + 1, abs(sides), 9),
    }
    return {name: np.clip(1.5 - d, 0, 1)[..., None].astype(np.float32) for name, d in distance.items()}


def scaled(images: Images, size: int) -> Images:
    """Centre squares of `size` pixels; the images themselves for 0."""
    if not size or images.shape[1:3] == (size, size):
        return images
    fitted = [ImageOps.fit(Image.fromarray(image), (size, size), Image.Resampling.BILINEAR) for image in images]
    return np.stack(fitted)


def subset(images: Images, labels: Int[np.ndarray, 'n'], each: int) -> tuple[Images, Int[np.ndarray, 'n']]:
    """The first `each` images of every class."""
    chosen = np.concatenate([np.flatnonzero(labels == label)[:each] for label in np.unique(labels)])
    return images[chosen], labels[chosen]


def read_photos(split: str) -> tuple[Images, Int[np.ndarray, 'n']]:
    """Photos of ants (0) and bees (1), centre squares of 256 pixels."""
    images, labels = [], []
    with tarfile.open(SHARED / 'data/hymenoptera.tar') as archive:
        for label, kind in enumerate(('ants', 'bees')):
            for name in sorted(n for n in archive.getnames() if n.startswith(f'{split}/{kind}/')):
                image = Image.open(archive.extractfile(name)).convert('RGB')
                images.append(np.asarray(ImageOps.fit(image, (256, 256), Image.Resampling.BILINEAR)))
                labels.append(label)
    return np.stack(images), np.asarray(labels)


def table(record: Mapping[str, Any]) -> str:
    """The page: one row a file."""
    lines = [
        '# Real weights on real data',
        '',
        'Every file of `../shared/weights`, read into its family without the library that wrote it, and judged on the data of',
        f'`../shared/data`. Made by `{record["command"]}`; figures and machine in `experiments/results/real_weights.json`.',
        '',
        '| file | model | tensors | judged by | % |',
        '|---|---|---:|---|---:|',
    ]
    for result in record['results']:
        fixed = ('file', 'model', 'tensors', 'seconds', 'published')
        shown = [(name, value) for name, value in result.items() if name not in fixed]
        where = [result['file'], f'`{result["model"]}`', str(result['tensors'])]
        for name, value in shown:
            if name == 'run on':
                continue
            if name == 'largest class':
                name, value = f'{result["run on"]}: {value}', ''
            value = f'{value:.2f}' if isinstance(value, float) else value
            if 'published' in result:
                value += f' (published: {result["published"]})'
            lines.append(f'| {" | ".join(where)} | {name} | {value} |')
            where = ['', '', '']
    lines += [
        '',
        'A probe is a logistic regression on standardised features of the training photos (244) or of 300 training images a',
        'class of CIFAR-10 at 96 pixels, judged on 153 photos or 200 test images a class. "Its own top 5" asks the network',
        'itself, among ImageNet’s thousand classes, for ant or bee. The published figures are those of an independent forward',
        'pass (`../shared/DATA.md`; ResNet-8 there on 1000 images).',
    ]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    sys.exit(main())
