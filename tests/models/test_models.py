"""Every model by name: shapes and parameter counts without running it, names of its parts, and what it refuses."""

import io
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tl_jax import models
from tl_jax.errors import UserError
from tl_jax.models import create_model, list_models
from tl_jax.models.heads import Cosine
from tl_jax.pretrained import load_pretrained
from tl_jax.trees import flatten

# With 1000 classes (10 for CIFAR's and 28×28×1 for LeNet's): torchvision's, and akamaster/pytorch_resnet_cifar10's.
PARAMETERS = {
    'resnet18': 11_689_512,
    'resnet34': 21_797_672,
    'resnet50': 25_557_032,
    'resnet101': 44_549_160,
    'resnet152': 60_192_808,
    'mobilenet_v2': 3_504_872,
    'resnet20': 269_722,
    'resnet32': 464_154,
    'resnet44': 658_586,
    'resnet56': 853_018,
    'resnet110': 1_727_962,
    'lenet': 20 * 26 + 50 * (20 * 25 + 1) + 500 * (50 * 16 + 1) + 10 * 501,
    'convnet': 32 * 10 + 64 * (32 * 9 + 1) + 10 * (64 * 49 + 1),
    'mlp': 256 * (784 + 1) + 256 * 257 + 10 * 257,
}
SMALL = ('lenet', 'convnet', 'mlp')
CIFAR = ('resnet20', 'resnet32', 'resnet44', 'resnet56', 'resnet110')


def shapes_of(model, image_shape, train=False):
    image = jnp.zeros(image_shape)
    variables = jax.eval_shape(lambda key: model.init(key, image), jax.random.key(0))
    rngs = {'dropout': jax.random.key(1)}
    endpoints, updates = jax.eval_shape(
        lambda v: model.apply(v, image, train=train, mutable=['batch_stats'], rngs=rngs), variables
    )
    return variables, endpoints, updates


def test_no_family_takes_another_s_names():
    by_family = [name for family in models.FAMILIES for name in family.MODELS]
    assert sorted(by_family) == list_models() and set(PARAMETERS) <= set(by_family)


@pytest.mark.parametrize('name', PARAMETERS)
def test_shapes_and_parameter_count(name):
    classes = 10 if name in CIFAR + SMALL else 1000
    image_shape = (2, 28, 28, 1) if name in SMALL else (2, 32, 32, 3)
    model = create_model(name, num_classes=classes)
    variables, endpoints, updates = shapes_of(model, image_shape, train=True)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == PARAMETERS[name]
    assert set(variables['params']) == {'backbone', 'head'}
    assert endpoints['logits'].shape == (2, classes)
    assert endpoints['features'].ndim == 2
    assert all(e.dtype == jnp.float32 for e in endpoints.values())
    assert jax.tree.structure(updates.get('batch_stats', {})) == jax.tree.structure(variables.get('batch_stats', {}))


def test_without_classes_there_is_no_head():
    variables, endpoints, _ = shapes_of(create_model('lenet'), (2, 28, 28, 1))
    assert set(variables['params']) == {'backbone'} and 'logits' not in endpoints


def test_stages_of_a_224_pixel_resnet():
    """Strides as torchvision's v1.5."""
    _, endpoints, _ = shapes_of(create_model('resnet50'), (1, 224, 224, 3))
    shapes = {name: e.shape[1:] for name, e in endpoints.items()}
    assert shapes == {
        'stem': (112, 112, 64),
        'stage1': (56, 56, 256),
        'stage2': (28, 28, 512),
        'stage3': (14, 14, 1024),
        'stage4': (7, 7, 2048),
        'features': (2048,),
    }


def test_small_stem_keeps_the_map():
    _, endpoints, _ = shapes_of(create_model('resnet18', stem='small'), (1, 32, 32, 3))
    assert endpoints['stage1'].shape == (1, 32, 32, 64)
    assert endpoints['stage4'].shape == (1, 4, 4, 512)


def test_names_of_a_residual_block():
    params = flatten(shapes_of(create_model('resnet50', num_classes=3), (1, 32, 32, 3))[0])
    block = {path.split('block1/')[1] for path in params if path.startswith('params/backbone/stage2/block1/')}
    convs = {f'{name}/kernel' for name in ('conv1', 'conv2', 'conv3', 'shortcut_conv')}
    norms = {f'{name}/{leaf}' for name in ('norm1', 'norm2', 'norm3', 'shortcut_norm') for leaf in ('scale', 'bias')}
    assert block == convs | norms
    assert {'params/head/kernel', 'params/head/bias', 'batch_stats/backbone/stem/norm/var'} <= set(params)
    # Option A has no parameters in its shortcuts.
    assert not any('shortcut' in path for path in flatten(shapes_of(create_model('resnet20'), (1, 32, 32, 3))[0]))


def test_mobilenet_variants():
    width = shapes_of(create_model('mobilenet_v2', width=0.35), (1, 32, 32, 3))[1]
    assert width['stem'].shape[-1] == 16 and width['block17'].shape[-1] == 112 and width['features'].shape == (1, 1280)
    assert shapes_of(create_model('mobilenet_v2', width=1.4), (1, 32, 32, 3))[1]['features'].shape == (1, 1792)
    folded, endpoints, _ = shapes_of(
        create_model('mobilenet_v2', num_classes=1001, norm='none', padding='same'), (1, 224, 224, 3)
    )
    assert 'batch_stats' not in folded
    assert set(folded['params']['backbone']['block2']) == {'expand', 'depthwise', 'project'}
    assert set(folded['params']['backbone']['block1']) == {'depthwise', 'project'}
    assert folded['params']['backbone']['stem']['conv']['bias'].shape == (32,)
    assert endpoints['final'].shape == (1, 7, 7, 1280)


@pytest.mark.parametrize('head', ['linear', 'mlp', {'name': 'mlp', 'widths': [7], 'dropout': 0.5}, 'cosine'])
def test_heads(head):
    model = create_model('mlp', num_classes=3, dense=[5], head=head)
    x = np.random.default_rng(0).standard_normal((4, 6), np.float32)
    key = jax.random.key(0)

    @jax.jit
    def run(key):
        variables = model.init(key, x)
        return variables, model.apply(variables, x), model.apply(variables, x, train=True, rngs={'dropout': key})

    variables, endpoints, _ = run(key)
    logits, params = endpoints['logits'], variables['params']['head']
    if head == 'linear':
        np.testing.assert_allclose(logits, endpoints['features'] @ params['kernel'] + params['bias'], rtol=1e-5)
    if head == 'cosine':
        assert np.all(np.abs(logits) <= params['scale'] * (1 + 1e-6))
        kernel = params['kernel'] / np.linalg.norm(params['kernel'], axis=0)
        features = endpoints['features'] / np.linalg.norm(endpoints['features'], axis=1, keepdims=True)
        np.testing.assert_allclose(logits, params['scale'] * features @ kernel, rtol=1e-4, atol=1e-5)
    if isinstance(head, dict):
        assert params['hidden1']['kernel'].shape == (5, 7)


def test_cosine_head_has_a_gradient_at_zero_features():
    head = Cosine(3)
    variables = head.init(jax.random.key(0), jnp.ones((1, 4)))
    gradient = jax.grad(lambda x: head.apply(variables, x).sum())(jnp.zeros((1, 4)))
    assert np.all(np.isfinite(gradient))


def test_convnet_options():
    model = create_model(
        'convnet', num_classes=3, widths=[4, 6, 8], norm='batch', reduce='mean', dense=[5], dropout=0.5
    )
    variables, endpoints, _ = shapes_of(model, (2, 16, 16, 3), train=True)
    assert endpoints['conv3'].shape == (2, 2, 2, 8) and endpoints['dense1'].shape == (2, 5)
    assert set(variables['params']['backbone']) == {'conv1', 'norm1', 'conv2', 'norm2', 'conv3', 'norm3', 'dense1'}
    assert set(variables['params']['backbone']['conv1']) == {'kernel'}


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'name': 'resnet19'}, "model.name: there is no model 'resnet19'; did you mean 'resnet18'"),
        ({'name': 'resnet18', 'wdths': [1]}, "model.wdths: unknown field; did you mean 'widths'"),
        ({'name': 'resnet18', 'parent': 1}, 'model.parent: unknown field'),
        ({'name': 'resnet18', 'stem': 'smal'}, "model.stem: must be 'imagenet' or 'deep'"),
        (
            {'name': 'mlp', 'num_classes': 3, 'head': 'liner'},
            "model.head: there is no head 'liner'; did you mean 'linear'",
        ),
        ({'name': 'mlp', 'num_classes': 3, 'head': {'name': 'mlp', 'width': 3}}, 'model.head.width: unknown field'),
        ({'name': 'resnet18', 'widths': [8, 16]}, 'model.widths: 2 widths for 4 stages'),
        ({'name': 'mlp', 'num_classes': 0}, 'model.num_classes: must be at least 1'),
        ({'name': 'mlp', 'head': 'linear'}, 'model.head: without num_classes there is no head'),
        ({'name': 'mlp', 'num_classes': 3, 'head': 'distilled'}, "model.head: 'distilled' is for the two tokens"),
        ({'name': 'resnet18', 'dtype': 'float31'}, "model.dtype: 'float31'"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(UserError) as error:
        create_model(**fields)
    assert message in str(error.value)


def test_image_too_small_for_the_network():
    with pytest.raises(UserError, match='the map is 2 × 2 where backbone/conv2 has a kernel of .5, 5.'):
        shapes_of(create_model('lenet', num_classes=10), (1, 8, 8, 1))


@pytest.mark.shared
def test_imagenet_mobilenet_sees_bees(shared):
    """Folded TFLite weights through `norm='none', padding='same'`: of a thousand classes, bee is among the first five."""
    source = shared('weights/mobilenet_tflite/mobilenet_v2_1.0_224_quant.npz')
    labels = shared('weights/mobilenet_tflite/imagenet_labels.txt').read_text().splitlines()
    images = []
    with tarfile.open(shared('data/hymenoptera.tar')) as archive:
        bees = sorted(name for name in archive.getnames() if 'val/bees/' in name and name.endswith('.jpg'))
        for name in bees[::10]:
            image = Image.open(io.BytesIO(archive.extractfile(name).read())).convert('RGB').resize((224, 224))
            images.append(np.asarray(image, np.float32) / 127.5 - 1)
    overrides = dict(norm='none', padding='same')
    variables = load_pretrained('mobilenet_v2', source, **overrides)
    model = create_model('mobilenet_v2', num_classes=1001, **overrides)
    logits = jax.jit(model.apply)(variables, np.stack(images))['logits']
    first_five = np.argsort(-logits)[:, :5]
    assert np.mean(np.any(first_five == labels.index('bee'), axis=1)) >= 0.75
