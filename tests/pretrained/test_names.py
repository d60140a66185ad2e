import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.models import create_model
from tl_jax.pretrained import maps, names
from tl_jax.trees import flatten

TORCHVISION = json.loads((Path(__file__).parent / 'files' / 'torchvision_names.json').read_text())


@pytest.mark.parametrize('model', TORCHVISION)
def test_knows_every_name_of_torchvision(model):
    stored = TORCHVISION[model]
    name_map = maps.choose(stored, model)
    counters = [name for name in stored if name.endswith('num_batches_tracked')]
    targets = {name: names.target(name_map, name) for name in stored}
    assert [name for name, target in targets.items() if target is None] == counters
    paths = [path for target in targets.values() if target for path in target.paths]
    assert len(set(paths)) == len(paths) == len(stored) - len(counters)


def maps_to(name, model, origin='torchvision'):
    (path,) = names.target(maps.name_map(origin, create_model(model).backbone), name).paths
    return path


@pytest.mark.parametrize(
    ('name', 'path'),
    [
        ('conv1.weight', 'params/backbone/stem/conv/kernel'),
        ('bn1.running_var', 'batch_stats/backbone/stem/norm/var'),
        ('layer3.11.conv2.weight', 'params/backbone/stage3/block12/conv2/kernel'),
        ('layer4.0.bn3.bias', 'params/backbone/stage4/block1/norm3/bias'),
        ('layer2.0.downsample.0.weight', 'params/backbone/stage2/block1/shortcut_conv/kernel'),
        ('fc.bias', 'params/head/bias'),
    ],
)
def test_names_of_resnets(name, path):
    assert maps_to(name, 'resnet50') == path


@pytest.mark.parametrize(
    ('name', 'path'),
    [
        ('features.0.0.weight', 'params/backbone/stem/conv/kernel'),
        ('features.1.conv.0.0.weight', 'params/backbone/block1/depthwise/kernel'),
        ('features.1.conv.1.weight', 'params/backbone/block1/project/kernel'),
        ('features.1.conv.2.weight', 'params/backbone/block1/project_norm/scale'),
        ('features.17.conv.0.1.running_mean', 'batch_stats/backbone/block17/expand_norm/mean'),
        ('features.2.conv.1.0.weight', 'params/backbone/block2/depthwise/kernel'),
        ('features.2.conv.2.weight', 'params/backbone/block2/project/kernel'),
        ('features.2.conv.3.bias', 'params/backbone/block2/project_norm/bias'),
        ('features.18.1.weight', 'params/backbone/final/norm/scale'),
        ('classifier.1.weight', 'params/head/kernel'),
    ],
)
def test_names_of_mobilenet_v2(name, path):
    assert maps_to(name, 'mobilenet_v2') == path


@pytest.mark.parametrize(
    ('name', 'path'),
    [
        ('00_conv_s2_act3/weight', 'params/backbone/stem/conv/kernel'),
        ('01_dw_s1_act3/weight', 'params/backbone/block1/depthwise/kernel'),
        ('02_conv_s1_act0/bias', 'params/backbone/block1/project/bias'),
        ('03_conv_s1_act3/weight', 'params/backbone/block2/expand/kernel'),
        ('50_conv_s1_act0/weight', 'params/backbone/block17/project/kernel'),
        ('51_conv_s1_act3/weight', 'params/backbone/final/conv/kernel'),
        ('52_conv_s1_act0/weight', 'params/head/kernel'),
    ],
)
def test_names_of_mobilenet_v2_tflite(name, path):
    assert maps_to(name, 'mobilenet_v2', 'tflite') == path


def test_layouts():
    """Each layout, told by an entry: the value at [out, in, row, column] is where our convolution looks for it."""
    oihw = np.random.default_rng(0).normal(size=(5, 4, 3, 2))
    assert names.OIHW.read(oihw)[2, 1, 3, 4] == oihw[4, 3, 2, 1]
    ours = names.OIHW.read(oihw)
    np.testing.assert_array_equal(names.OHWI.read(oihw.transpose(0, 2, 3, 1)), ours)
    depthwise = oihw[:, :1]  # [channels, 1, height, width] in torch, [1, height, width, channels] in TFLite.
    np.testing.assert_array_equal(names.ONE_HWC.read(depthwise.transpose(1, 2, 3, 0)), names.OIHW.read(depthwise))
    assert names.OIHW.read(depthwise).shape == (3, 2, 1, 5)
    dense = oihw[:, :, 0, 0]
    np.testing.assert_array_equal(names.OI.read(dense), dense.T)
    np.testing.assert_array_equal(names.O11I.read(dense[:, None, None, :]), dense.T)
    np.testing.assert_array_equal(names.OI11.read(dense[:, :, None, None]), dense.T)


@pytest.mark.parametrize(
    ('layout', 'shape'),
    [
        (names.SAME, (5,)),
        (names.OIHW, (5, 4, 3, 2)),
        (names.OHWI, (5, 3, 2, 4)),
        (names.ONE_HWC, (1, 3, 2, 4)),
        (names.OI, (5, 4)),
        (names.O11I, (5, 1, 1, 4)),
        (names.OI11, (5, 4, 1, 1)),
        (names.stacked(3, names.OI), (6, 4)),
        (names.stacked(2, names.SAME, axis=1), (3, 4)),
    ],
)
def test_layouts_write_what_they_read(layout, shape):
    tensor = np.random.default_rng(1).normal(size=shape)
    read = layout.read(tensor)
    written = layout.write(*read) if isinstance(read, tuple) else layout.write(read)
    np.testing.assert_array_equal(written, tensor)


def test_one_tensor_may_be_several_leaves():
    rule = names.Rule('h{i}.qkv', ('params/block{i+1}/q', 'params/block{i+1}/k', 'params/block{i+1}/v'), names.SAME)
    name_map = names.NameMap('here', (rule,), prefix='model.')
    wanted = ('params/block3/q', 'params/block3/k', 'params/block3/v')
    assert names.target(name_map, 'model.h2.qkv').paths == names.target(name_map, 'h2.qkv').paths == wanted
    for path in wanted:
        name, target = names.foreign(name_map, path)
        assert (name, target.paths) == ('h2.qkv', wanted)  # a prefix stands before the backbone's names only
    assert names.foreign(name_map, 'params/block0/q') is None  # our blocks count from one


def test_templates():
    rule = names.Rule('a{i}.{j}.{i}', 'params/backbone/b{j}/c{i+1}', names.SAME)
    name_map = names.NameMap('here', (rule,), prefix='net.')
    assert names.target(name_map, 'a3.10.3').paths == ('params/backbone/b10/c4',)
    assert names.target(name_map, 'a3.10.4') is None and names.target(name_map, 'a3.10.3.x') is None
    assert names.foreign(name_map, 'params/backbone/b10/c4')[0] == 'net.a3.10.3'


def test_input_channels_keep_what_a_grey_image_gives():
    kernel = np.random.default_rng(2).normal(size=(3, 3, 3, 5)).astype(np.float32)
    grey = np.random.default_rng(3).normal(size=(3, 3, 1)).astype(np.float32)
    wanted = (kernel * grey[..., None]).sum((0, 1, 2))
    for channels in (1, 2, 4, 6, 7):
        changed = names.input_channels(kernel, (3, 3, channels, 5))
        if channels == 1:
            np.testing.assert_allclose(changed, kernel.sum(2, keepdims=True), rtol=1e-6)
        if channels % 3 == 0 or channels == 1:
            np.testing.assert_allclose((changed * grey[..., None]).sum((0, 1, 2)), wanted, rtol=1e-4)
        np.testing.assert_array_equal(changed[:, :, :1], changed[:, :, 3:4] if channels > 3 else changed[:, :, :1])
    with pytest.raises(ValueError, match='with other input channels'):
        names.input_channels(kernel, (5, 5, 1, 5))


@pytest.mark.parametrize('model', ['resnet18', 'resnet50', 'mobilenet_v2'])
def test_every_leaf_has_a_name_and_comes_back(model):
    """Right to left and left to right again, over a whole network."""
    module = create_model(model, num_classes=3)
    name_map = maps.name_map('torchvision', module.backbone)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    for path in flatten(shapes):
        name, target = names.foreign(name_map, path)
        assert names.target(name_map, name).paths == target.paths == (path,)


def test_prefixes_come_off_only_where_all_share_them():
    assert names.without_prefix(['module.model.a', 'module.model.b']) == (
        {'module.model.a': 'a', 'module.model.b': 'b'},
        'module.model.',
    )
    assert names.without_prefix(['module.a', 'b']) == ({'module.a': 'module.a', 'b': 'b'}, '')
    assert names.without_prefix([]) == ({}, '')


def test_names_the_known_origins():
    with pytest.raises(UserError, match=r'net\.pth: no name map knows its tensors \(.x.\); known are .*ResNet'):
        maps.choose(['x'], 'net.pth')


def test_says_what_a_file_of_another_family_looks_like():
    with pytest.raises(
        UserError, match=r'no name map of a MobileNetV2 knows its tensors .* looks like ResNet \(torchvision\)'
    ):
        maps.choose(TORCHVISION['resnet18'], 'net.pth', create_model('mobilenet_v2').backbone)


def test_an_origin_the_family_lacks():
    with pytest.raises(UserError, match=r"origin: there is no 'torchvison' of a ResNet; .*torchvision"):
        maps.name_map('torchvison', create_model('resnet18').backbone)
