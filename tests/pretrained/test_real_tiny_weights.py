"""Real small networks, each file read whole: MLPerf Tiny's, the quantised MobileNets of TFLite, and DoodleNet."""

import io
import tarfile
import zipfile

import jax
import numpy as np
import pytest

from experiments import real_weights
from tl_jax.models import create_model
from tl_jax.pretrained import load_pretrained

pytestmark = pytest.mark.shared
MLPERF = 'weights/mlperf_tiny'
CIFAR10 = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
KERAS_V1 = dict(width=0.25, activation='relu', padding='same', norm='none')


def logits(name, source, inputs, **fields):
    variables = load_pretrained(name, source, **fields)
    classes = variables['params']['head']['bias'].shape[0]
    module = create_model(name, num_classes=classes, **fields)
    return np.asarray(jax.jit(lambda x: module.apply(variables, x)['logits'])(inputs))


@pytest.fixture(scope='module')
def cifar(shared):
    """The first 20 test images of every class, 0 … 255, and the classes."""
    from PIL import Image

    images = []
    with zipfile.ZipFile(shared('data/cifar10_test.zip')) as archive:
        for name in CIFAR10:
            mosaic = np.asarray(Image.open(io.BytesIO(archive.read(f'test/{name}.webp'))).convert('RGB'))
            images.append(mosaic[:32, : 20 * 32].reshape(32, 20, 32, 3).transpose(1, 0, 2, 3))
    return np.concatenate(images).astype(np.float32), np.repeat(np.arange(10), 20)


def test_resnet8(shared, cifar, capsys):
    """It takes raw pixels; 88.2 % on 1000 images (DATA.md). Its TFLite file is the same with the norms folded."""
    images, labels = cifar
    keras = logits('resnet8_keras', shared(f'{MLPERF}/pretrainedResnet.h5'), images)
    assert np.mean(keras.argmax(1) == labels) >= 0.84
    folded = logits('resnet8_keras', shared(f'{MLPERF}/pretrainedResnet.tflite'), images, norm='none')
    np.testing.assert_allclose(folded, keras, atol=1e-3)
    out = capsys.readouterr().out
    assert 'used     48 tensors' in out and 'used     20 tensors' in out


def test_person_detector(shared, capsys):
    """The Keras network, with its batch norms, and the same folded into TFLite's agree."""
    images = np.random.default_rng(0).random((2, 96, 96, 3), np.float32)
    keras = logits('mobilenet_v1_vww', shared(f'{MLPERF}/vww_96.h5'), images)
    folded = logits('mobilenet_v1', shared(f'{MLPERF}/vww_96_float.tflite'), images, **KERAS_V1)
    assert keras.shape == (2, 2)
    np.testing.assert_allclose(folded, keras, atol=1e-3)
    assert 'used     164 tensors' in capsys.readouterr().out


def test_keyword_spotter(shared, capsys):
    speech = np.random.default_rng(0).standard_normal((2, 49, 10, 1), np.float32)
    assert np.isfinite(logits('ds_cnn', shared(f'{MLPERF}/kws_ref_model_float32.tflite'), speech)).all()
    assert 'used     20 tensors' in capsys.readouterr().out


@pytest.fixture(scope='module')
def photos(shared):
    """size -> twelve photos each of ants and bees, centre squares of that size, −1 … 1."""
    from PIL import Image, ImageOps

    def read(size):
        images = []
        with tarfile.open(shared('data/hymenoptera.tar')) as archive:
            for kind in ('ants', 'bees'):
                names = sorted(name for name in archive.getnames() if name.startswith(f'val/{kind}/'))
                for name in names[:12]:
                    image = Image.open(archive.extractfile(name)).convert('RGB')
                    images.append(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
        return np.stack(images).astype(np.float32) / 127.5 - 1

    return read


@pytest.mark.parametrize(
    'name, file, fields, size, tensors, least',
    [
        ('mobilenet_v1', 'mobilenet_v1_0.25_128_quant.tflite', dict(width=0.25), 128, 56, 8),
        ('mobilenet_v2', 'mobilenet_v2_1.0_224_quant.tflite', {}, 224, 106, 16),
        ('mobilenet_v2', 'tf2_mobilenet_v2_1.0_224_ptq.tflite', {}, 224, 106, 16),
    ],
)
def test_imagenet_mobilenets(name, file, fields, size, tensors, least, shared, photos, capsys):
    """Among a thousand classes the five most likely hold ImageNet's bee (310, the background is 0) or ant (311)."""
    source = shared(f'weights/mobilenet_tflite/{file}')
    found = logits(name, source, photos(size), norm='none', padding='same', **fields)
    best = np.argsort(found)[:, -5:]
    assert np.isin(best, (310, 311)).any(1).sum() >= least, best
    assert f'used     {tensors} tensors' in capsys.readouterr().out


def test_doodlenet(shared, capsys):
    """It takes ink of 1 on paper of 0."""
    names = shared('weights/doodlenet_tfjs/class_names.txt').read_text().splitlines()
    sketches = real_weights.sketches()
    found = logits('doodlenet', shared('weights/doodlenet_tfjs/model.json'), np.stack(list(sketches.values())))
    assert [names[i] for i in found.argmax(1)] == list(sketches)
    assert 'used     16 tensors' in capsys.readouterr().out
