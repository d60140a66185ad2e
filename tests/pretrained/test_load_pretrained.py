"""Whole models from files: torchvision's names on our models, heads that change, our own format, real weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import mesh as meshes
from tl_jax import models
from tl_jax.errors import UserError
from tl_jax.pretrained import Contents, Tensor, fill, fill_model, load_pretrained, read, save_variables
from tl_jax.pretrained.sources import SHIPPED
from tl_jax.trees import flatten

TORCHVISION = json.loads((Path(__file__).parent / 'files' / 'torchvision_names.json').read_text())
CIFAR = 'weights/cifar10_resnet/resnet20-12fca82f.th'
MOBILENET = 'weights/mobilenet_tflite/mobilenet_v2_1.0_224_quant.npz'


def shapes(name, **overrides):
    module = models.create_model(name, **overrides)
    return jax.eval_shape(lambda key: module.init(key, jnp.zeros((1, 32, 32, 3))), jax.random.key(0))


@pytest.mark.parametrize('name', TORCHVISION)
def test_our_models_are_the_ones_of_torchvision(name):
    """Every tensor of torchvision has a leaf of ours, of its shape, and every leaf its tensor."""
    dtypes = {key: np.int64 if key.endswith('num_batches_tracked') else np.float32 for key in TORCHVISION[name]}
    tensors = {
        key: Tensor(tuple(shape), np.dtype(dtypes[key]), lambda s=shape: np.broadcast_to(np.float32(1), s))
        for key, shape in TORCHVISION[name].items()
    }
    variables, account = fill(shapes(name, num_classes=1000), Contents(tensors))
    assert len(account.used) == len(flatten(variables)) and not account.fresh


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """A small network in our own format, and its variables."""
    path = tmp_path_factory.mktemp('own') / 'net.safetensors'
    module = models.create_model('convnet', num_classes=3, widths=(4,), norm='batch')
    variables = jax.jit(module.init)(jax.random.key(7), jnp.zeros((1, 8, 8, 1)))
    save_variables(path, variables, {'model': 'convnet', 'image_shape': (8, 8, 1)})
    return path, variables


def test_loads_our_own_format(own, capsys):
    path, variables = own
    loaded = load_pretrained('convnet', path, widths=(4,), norm='batch')
    assert jax.tree.structure(loaded) == jax.tree.structure(dict(variables))
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(variables))
    assert capsys.readouterr().out.startswith(f'convnet: loaded {path} (tl_jax, sha256 ')


def test_a_new_head_starts_from_the_key(own, capsys):
    path, variables = own
    first, again, other = (
        load_pretrained('convnet', path, 5, widths=(4,), norm='batch', key=jax.random.key(seed)) for seed in (1, 1, 2)
    )
    assert first['params']['head']['kernel'].shape == (64, 5)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first['params']['head']['kernel'], other['params']['head']['kernel'])
    jax.tree.map(np.testing.assert_array_equal, first['params']['backbone'], variables['params']['backbone'])
    module = models.create_model('convnet', num_classes=5, widths=(4,), norm='batch')
    initial = module.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))
    np.testing.assert_allclose(first['params']['head']['kernel'], initial['params']['head']['kernel'], rtol=1e-6)
    account = capsys.readouterr().out
    assert "ignored  2 tensors by head/.* (the file's head/bias is (3,), the model's (5,))" in account
    assert 'fresh    2 leaves by head/.*' in account


def test_fill_model_keeps_what_is_fresh(own):
    path, variables = own
    given = jax.tree.map(jnp.zeros_like, dict(variables))
    filled = fill_model('convnet', path, given, fresh=['head/bias', 'backbone/conv1/.*'])
    assert not filled['params']['backbone']['conv1']['kernel'].any()
    np.testing.assert_array_equal(filled['params']['head']['kernel'], variables['params']['head']['kernel'])


@pytest.mark.parametrize(
    ('name', 'overrides', 'message'),
    [
        (
            'convnet',
            {'widths': (8,), 'norm': 'batch'},
            r'\(4,\) does not fit backbone/norm1/mean \(8,\); .*norm1/scale \(8,\); is it the right',
        ),
        ('convnet', {'widths': (4,)}, "tensors have no leaf .*'params/backbone/norm1/.*leaves have no tensor"),
        ('lenet', {}, 'have no tensor in the file'),
    ],
)
def test_refuses_another_model(own, name, overrides, message):
    with pytest.raises(UserError, match=message):
        load_pretrained(name, own[0], **{'image_shape': (28, 28, 1), **overrides})


@pytest.mark.parametrize('path', sorted(SHIPPED.glob('*.safetensors')), ids=lambda path: path.stem)
def test_shipped_weights_are_small_and_sound(path):
    contents = read(path)
    assert path.stat().st_size <= 4e6
    assert all(np.isfinite(tensor.array()).all() for tensor in contents.tensors.values())


@pytest.mark.shared
def test_cifar_resnet20_scores_its_published_error(shared, capsys):
    """8.27 % on the 10,000 test images, over eight devices. Every file: `experiments/real_weights.py`."""
    from experiments.cifar10 import read_cifar10
    from experiments.real_weights import IMAGENET_MEAN, IMAGENET_STD

    shared('data/cifar10_test.zip')
    images, labels = read_cifar10(('test',))
    variables = load_pretrained('resnet20', shared(CIFAR))
    model = models.create_model('resnet20', num_classes=10)
    mesh = meshes.create_mesh(data=8)
    variables = jax.device_put(variables, meshes.replicated(mesh))

    @jax.jit
    def mistakes(variables, images, labels):
        logits = model.apply(variables, (images / 255.0 - IMAGENET_MEAN) / IMAGENET_STD)['logits']
        return jnp.sum(jnp.argmax(logits, -1) != labels)

    wrong = 0
    for start in range(0, len(images), 1000):
        batch = images[start : start + 1000].astype(np.float32), labels[start : start + 1000]
        wrong += int(mistakes(variables, *jax.device_put(batch, meshes.over_batch(mesh))))
    assert abs(100 * wrong / len(images) - 8.27) <= 0.05
    assert 'used     97 tensors' in capsys.readouterr().out


@pytest.mark.shared
def test_cifar_resnet_with_a_new_head(shared):
    variables = load_pretrained('resnet20', shared(CIFAR), num_classes=7)
    assert variables['params']['head']['kernel'].shape == (64, 7)


@pytest.mark.shared
def test_mobilenet_of_tflite_dequantised(shared, capsys):
    variables = load_pretrained('mobilenet_v2', shared(MOBILENET), norm='none', padding='same')
    assert variables['params']['head']['kernel'].shape == (1280, 1001)
    kernel = variables['params']['backbone']['stem']['conv']['kernel']
    with np.load(shared(MOBILENET)) as file:
        layer = {part: file[f'00_conv_s2_act3/{part}'] for part in ('q', 'scale', 'zero')}
    expected = (layer['q'].astype(np.float32) - layer['zero']) * layer['scale']
    np.testing.assert_allclose(kernel, expected.transpose(1, 2, 3, 0), rtol=1e-6)
    account = capsys.readouterr().out
    assert 'used     106 tensors' in account and 'dequantised 53 weights' in account
