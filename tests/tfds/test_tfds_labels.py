"""Classes made from other features, and TFDS's own expressions of splits, on a set with objects in its images.

Expected classes are those of google-research/task_adaptation's functions (as KMnP/vpt at 4410440 carries them,
`src/data/vtab_datasets/{clevr,kitti,dsprites}.py`), written below with its thresholds, on random scenes.
"""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tl_jax.data import open_source
from tl_jax.errors import UserError

COUNTS = {'train': 40, 'validation': 12, 'bare': 1}


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Up to ten objects an image, of a type and at a place; sometimes none of type 0, 1 or 2."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        thing = {'location': tfds.features.Tensor(shape=(3,), dtype=np.float32), 'type': np.int64}
        features = {
            'image': tfds.features.Image(shape=(2, 2, 3)),
            'objects': tfds.features.Sequence(thing),
            'orientation': tfds.features.ClassLabel(num_classes=40),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split):
        rng = np.random.default_rng(len(split))
        for i in range(COUNTS[split]):
            things = [
                {'location': rng.uniform(0, 30, 3).astype(np.float32), 'type': int(rng.integers(8))}
                for _ in range(0 if split == 'bare' else rng.integers(3, 11))
            ]
            image = io.BytesIO()  # an encoded image: TFDS encodes arrays by TensorFlow
            Image.fromarray(np.full((2, 2, 3), i, np.uint8)).save(image, 'png')
            image.seek(0)
            yield f'{i:03}', {'image': image, 'objects': things, 'orientation': int(rng.integers(40))}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp('scenes'))
    Scenes(data_dir=root, file_format='array_record').download_and_prepare()
    return root


def raw(data_dir, split):
    builder = tfds.core.read_only_builder.builder_from_files('scenes', data_dir=data_dir)
    examples = list(builder.as_data_source(split=split))
    for example in examples:  # TFDS gives the objects as lists
        example['objects'] = {name: np.array(values) for name, values in example['objects'].items()}
    return examples


def by_thresholds(x, thresholds):
    return int(np.max(np.where(np.array(thresholds) - x < 0)))


def number_of_objects(example):
    return len(example['objects']['type']) - 3


def nearest_object(example):
    return by_thresholds(example['objects']['location'][:, 2].min(), [0.0, 0.5, 1.5, 3.0, 5.0, 100.0])


def nearest_vehicle(example):
    things = example['objects']
    z = [*things['location'][things['type'] < 3, 2], 1000.0]
    return by_thresholds(min(z), [-100.0, 8.0, 20.0, 999.0])


def grouped_orientation(example):
    return int(np.float32(example['orientation']) // np.float32(40 / 16))


VEHICLES = {'objects/type': [0, 1, 2]}
TASKS = {
    'count': (dict(feature='objects/type', reduce='count', bins=[3, 4, 5, 6, 7, 8, 9]), number_of_objects, 8),
    'distance': (
        dict(feature='objects/location', column=2, reduce='min', bins=[0.5, 1.5, 3.0, 5.0]),
        nearest_object,
        5,
    ),
    'vehicle': (
        dict(feature='objects/location', column=2, where=VEHICLES, reduce='min', bins=[8.0, 20.0, 999.0]),
        nearest_vehicle,
        4,
    ),
    'groups': (
        dict(feature='orientation', bins=[2.5 * i - 0.25 for i in range(1, 16)]),
        grouped_orientation,
        16,
    ),
}


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('scan', [True, False])
def test_classes_are_those_of_the_benchmark(data_dir, task, scan):
    label, expected, classes = TASKS[task]
    source = open_source('tfds:scenes/train', data_dir=data_dir, label=label, scan_labels=scan)
    answers = [expected(example) for example in raw(data_dir, 'train')]
    assert [source.get(i)['label'] for i in range(source.length)] == answers
    assert len(set(answers)) > 2 and source.class_names == tuple(map(str, range(classes)))
    assert (source.labels is None) or source.labels.tolist() == answers


def test_an_image_without_objects_is_of_the_farthest_class(data_dir):
    label, _, classes = TASKS['vehicle']
    assert open_source('tfds:scenes/bare', data_dir=data_dir, label=label).labels.tolist() == [classes - 1]


def test_greatest_of_several_and_a_plain_feature(data_dir):
    label = dict(feature='objects/location', column=0, reduce='max', bins=[20.0, 25.0])
    source = open_source('tfds:scenes/train', data_dir=data_dir, label=label)
    highest = [example['objects']['location'][:, 0].max() for example in raw(data_dir, 'train')]
    assert source.labels.tolist() == [int(x > 20) + int(x > 25) for x in highest]
    plain = open_source('tfds:scenes/train', data_dir=data_dir, label='orientation')
    assert plain.labels.tolist() == [example['orientation'] for example in raw(data_dir, 'train')]
    assert len(plain.class_names) == 40


def test_split_is_an_expression_of_tfds_in_the_files_order(data_dir):
    source = open_source('tfds:scenes', data_dir=data_dir, split='train[:8]+validation[:2]', label='orientation')
    first = raw(data_dir, 'train')[:8] + raw(data_dir, 'validation')[:2]
    assert source.length == 10
    for i, example in enumerate(first):
        assert source.get(i)['label'] == example['orientation']
        np.testing.assert_array_equal(source.get(i)['image'], example['image'])


def test_bad_labels_and_splits(data_dir):
    def refused(message, **options):
        with pytest.raises(UserError, match=message):
            open_source(options.pop('spec', 'tfds:scenes/train'), data_dir=data_dir, **options)

    refused("no feature 'objects/place'", label='objects/place')
    refused("no feature 'objects/kind'", label=dict(feature='objects/location', where={'objects/kind': [1]}))
    refused('bins must ascend', label=dict(feature='orientation', bins=[3, 2]))
    refused('label.bin', label=dict(feature='orientation', bin=[3]))
    refused('label.reduce', label=dict(feature='orientation', reduce='median'))
    refused("Unknown split 'tarin'", spec='tfds:scenes', split='tarin[:4]', label='orientation')
