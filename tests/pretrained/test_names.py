import json
from pathlib import Path

import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.pretrained import names

TORCHVISION = json.loads((Path(__file__).parent / 'files' / 'torchvision_names.json').read_text())


@pytest.mark.parametrize('model', TORCHVISION)
def test_knows_every_name_of_torchvision(model):
    stored = TORCHVISION[model]
    name_map = names.choose(stored, model)
    counters = [name for name in stored if name.endswith('num_batches_tracked')]
    targets = {name: names.target(name_map, name) for name in stored}
    assert [name for name, target in targets.items() if target is None] == counters
    paths = [target.path for target in targets.values() if target]
    assert len(set(paths)) == len(paths) == len(stored) - len(counters)


@pytest.mark.parametrize(
    ('name', 'path'),
    [
        ('conv1.weight', 'params/backbone/stem/conv/kernel'),
        ('bn1.running_var', 'batch_stats/backbone/stem/norm/var'),
        ('layer3.11.conv2.weight', 'params/backbone/stage3/block12/conv2/kernel'),
        ('layer4.0.bn3.bias', 'params/backbone/stage4/block1/norm3/bias'),
        ('layer2.0.downsample.0.weight', 'params/backbone/stage2/block1/shortcut_conv/kernel'),
        ('layer2.0.shortcut.1.running_mean', 'batch_stats/backbone/stage2/block1/shortcut_norm/mean'),
        ('linear.weight', 'params/head/kernel'),
        ('fc.bias', 'params/head/bias'),
    ],
)
def test_names_of_resnets(name, path):
    assert names.target(names.RESNET, name).path == path


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
    assert names.target(names.MOBILENET_V2, name).path == path


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
    assert names.target(names.MOBILENET_V2_TFLITE, name).path == path


def test_layouts():
    """Each transform, told by an entry: the value at [out, in, row, column] is where our convolution looks for it."""
    oihw = np.random.default_rng(0).normal(size=(5, 4, 3, 2))
    assert names.from_oihw(oihw)[2, 1, 3, 4] == oihw[4, 3, 2, 1]
    ohwi = oihw.transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(names.from_ohwi(ohwi), names.from_oihw(oihw))
    depthwise = oihw[:, :1]  # [channels, 1, height, width] in torch, [1, height, width, channels] in TFLite.
    one_hwc = depthwise.transpose(1, 2, 3, 0)
    np.testing.assert_array_equal(names.from_1hwc(one_hwc), names.from_oihw(depthwise))
    assert names.from_oihw(depthwise).shape == (3, 2, 1, 5)
    dense = oihw[:, :, 0, 0]
    np.testing.assert_array_equal(names.from_o11i(dense[:, None, None, :]), names.from_oi(dense))


def test_prefixes_come_off_only_where_all_share_them():
    assert names.without_prefix(['module.model.a', 'module.model.b']) == (
        {'module.model.a': 'a', 'module.model.b': 'b'},
        'module.model.',
    )
    assert names.without_prefix(['module.a', 'b']) == ({'module.a': 'module.a', 'b': 'b'}, '')
    assert names.without_prefix([]) == ({}, '')


def test_names_the_known_origins():
    with pytest.raises(
        UserError, match=r'net\.pth: no name map knows its tensors \(.x.\); known origins: tl_jax; .*torchvision'
    ):
        names.choose(['x'], 'net.pth')
