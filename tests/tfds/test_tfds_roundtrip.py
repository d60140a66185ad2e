"""A real image set, prepared through TFDS from local files, is read back without TensorFlow.

`make test-tfds` sets TFDS_PYTHON to a python with TensorFlow, which then decodes the images for TFDS (asserted).
Otherwise this python prepares the set, TensorFlow-free, and what needs TensorFlow is skipped by name.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tl_jax.data import open_source, train_stream
from tl_jax.errors import UserError

WITH_TENSORFLOW = 'TFDS_PYTHON' in os.environ
PYTHON = os.environ.get('TFDS_PYTHON', sys.executable)
COUNTS = {'train': 200, 'test': 97}


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """scikit-learn's digits as SPLIT/CLASS/NUMBER.png."""
    root = tmp_path_factory.mktemp('images')
    digits = iter(zip(load_digits().images, load_digits().target, strict=True))
    for split, count in COUNTS.items():
        for number in range(count):
            pixels, label = next(digits)
            file = root / split / f'digit{label}' / f'{number:04}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15).astype(np.uint8)).convert('RGB').save(file)
    return root


def prepare(images: Path, data_dir: Path, file_format: str) -> str:
    command = [PYTHON, Path(__file__).with_name('prepare.py'), images, data_dir, file_format]
    command += ['tensorflow'] if WITH_TENSORFLOW else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == f'tensorflow loaded: {WITH_TENSORFLOW}'
    return str(data_dir)


@pytest.fixture(scope='module')
def data_dir(images, tmp_path_factory) -> str:
    return prepare(images, tmp_path_factory.mktemp('tfds'), 'array_record')


@pytest.mark.parametrize('split', COUNTS)
def test_every_example_comes_back(images, data_dir, split):
    source = open_source(f'tfds:local_images/{split}', data_dir=data_dir)
    folder = open_source(f'folder:{images}/{split}')
    assert source.length == COUNTS[split] and source.class_names == tuple(f'digit{i}' for i in range(10))
    examples = [source.get(i) for i in range(source.length)]
    assert [example['label'] for example in examples] == source.labels.tolist()
    # TFDS shuffles when it writes, so the two are compared as multisets.
    read = sorted((e['label'], e['image'].tobytes()) for e in examples)
    assert read == sorted((e['label'], e['image'].tobytes()) for e in map(folder.get, range(folder.length)))
    assert examples[0]['image'].shape == (8, 8, 3) and examples[0]['image'].dtype == np.uint8
    assert 'tensorflow' not in sys.modules


def test_options_streams_and_slices(data_dir):
    spec = 'tfds:local_images/train'
    lazy = open_source(spec, data_dir=data_dir, scan_labels=False)
    scanned = open_source(f'{spec}[:50%]', data_dir=data_dir, shots=3)
    assert lazy.labels is None and lazy.get(5)['label'] in range(10)
    assert np.bincount(scanned.labels).tolist() == [3] * 10
    batch = train_stream(scanned, batch_size=10, seed=0, balance='class', transforms=['to_float']).batch_at(4)
    assert sorted(batch['label']) == list(range(10)) and batch['image'].shape == (10, 8, 8, 3)
    with pytest.raises(UserError, match='needs labels that are known'):
        open_source(spec, data_dir=data_dir, scan_labels=False, shots=3)


def test_bad_input(data_dir):
    with pytest.raises(UserError, match="no split 'tarin'; did you mean 'train'"):
        open_source('tfds:local_images/tarin', data_dir=data_dir)
    with pytest.raises(UserError, match=r"is not prepared in data_dir=.*builder\('mnist'.*download_and_prepare\(\)$"):
        open_source('tfds:mnist/train', data_dir=data_dir)
    with pytest.raises(UserError, match="no feature 'labels'; did you mean 'label'"):
        open_source('tfds:local_images/train', data_dir=data_dir, label='labels')
    with pytest.raises(UserError, match='expected tfds:NAME/SPLIT'):
        open_source('tfds:mnist')


def test_sequential_files_are_refused_with_the_fix(data_dir, tmp_path):
    """Without TensorFlow, which writes tfrecord files, a set is only declared to be of that format."""
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    (info,) = tmp_path.glob('local_images/*/dataset_info.json')
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    refuses_tfrecord(tmp_path)


@pytest.mark.skipif(not WITH_TENSORFLOW, reason='needs TensorFlow: make test-tfds')
def test_real_tfrecord_files_are_refused_with_the_fix(images, tmp_path):
    prepare(images, tmp_path, 'tfrecord')
    assert list(tmp_path.glob('local_images/*/*.tfrecord*'))
    refuses_tfrecord(tmp_path)


def refuses_tfrecord(data_dir):
    with pytest.raises(UserError, match='is prepared as tfrecord files, without random access; once, where'):
        open_source('tfds:local_images/train', data_dir=str(data_dir))
    assert 'tensorflow' not in sys.modules
