"""The second main job on real weights and real photos: ImageNet MobileNetV2 to ants and bees."""

import json
import tarfile

import pytest

from tl_jax import config as config_lib
from tl_jax.train import train_and_evaluate


@pytest.mark.shared
def test_a_probe_of_the_imagenet_features_tells_ants_from_bees(shared, tmp_path):
    weights = shared('weights/mobilenet_tflite/mobilenet_v2_1.0_224_quant.npz')
    with tarfile.open(shared('data/hymenoptera.tar')) as photos:
        photos.extractall(tmp_path, filter='data')
    config = config_lib.load('configs/finetune.py:probe')
    for assignment in (
        f'model.source={weights}',
        f'data.train=folder:{tmp_path}/train',
        'data.eval=None',
        f'data.test=folder:{tmp_path}/val',
        'select_by=last',
        'stages[0].epochs=2',
        'mesh.data=1',
        'data.train_transform[0].size=224',  # the size that the weights were trained at
        'data.eval_transform[0].size=256',
        'data.eval_transform[1].size=224',
    ):
        config_lib.override(config, assignment)
    train_and_evaluate(config, tmp_path / 'run')
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    print(f'ants and bees, probe, 153 photos: accuracy {summary["metrics"]["test/accuracy"]:.4f}')
    assert summary['metrics']['test/accuracy'] >= 0.90
    assert summary['parameters']['trainable'] == [1280 * 2 + 2]
