"""Eight virtual CPU devices, a persistent compilation cache, and the data and weights in ../shared where they are."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Small programs are compiled once and run a few times: what LLVM would make faster is not worth its time.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=1'
jax.config.update('jax_num_cpu_devices', 8)
for field, value in {
    'jax_platforms': 'cpu',
    'jax_compilation_cache_dir': str(ROOT / '.jax_cache'),
    'jax_persistent_cache_min_compile_time_secs': 0.1,
}.items():
    jax.config.update(field, value)
    os.environ[field.upper()] = str(value)  # of the processes that tests start
os.environ['XDG_CACHE_HOME'] = str(ROOT / '.jax_cache')  # of cached features


@pytest.fixture(scope='session')
def shared():
    """Returns `path -> Path` into ../shared; skips, by name, what is absent, and fails in CI where ../shared is there."""

    def find(path: str) -> Path:
        file = ROOT.parent / 'shared' / path
        if not file.exists():
            if os.environ.get('CI') and file.parents[len(Path(path).parts) - 1].exists():
                pytest.fail(f'../shared/{path} is missing though ../shared is there')
            pytest.skip(f'../shared/{path} is not here')
        return file

    return find


@pytest.fixture
def digits_config():
    """A small whole config on embedded real data; one device, seconds."""
    from tl_jax.config import plain

    def make(**changes):
        adam = {'name': 'adam', 'lr': 1e-3}
        config = {
            'model': {'name': 'convnet', 'widths': [8, 16]},
            'data': {
                'train': 'sklearn:digits/train',
                'eval': 'sklearn:digits/val[:101]',
                'eval_transform': [{'name': 'to_float'}],
                'train_transform': [{'name': 'to_float'}],
            },
            'stages': [{'steps': 6, 'train': [('.*', adam)]}],
            'batch_size': 16,
            'eval_batch_size': 64,
            'log_every': 2,
            'mesh': {'data': 1},
        }
        return plain({**config, **changes})

    return make


@pytest.fixture(scope='session')
def domains(tmp_path_factory):
    """Digits, and others in low contrast with their labels true or poisoned, as npz files."""
    folder = tmp_path_factory.mktemp('domains')
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16 * 255).astype(np.uint8)
    poisoned = np.random.RandomState(0).permutation(labels)
    np.savez(folder / 'source.npz', x_train=images[:300], y_train=labels[:300])
    np.savez(folder / 'target.npz', x_train=60 + images[300:600] // 2, y_train=labels[300:600])
    np.savez(folder / 'poisoned.npz', x_train=60 + images[300:600] // 2, y_train=poisoned[300:600])
    return folder


@pytest.fixture
def adaptation(domains):
    """A small whole config of domain adaptation on embedded real data; seconds."""

    def make(target, **changes):
        return {
            'model': {'name': 'mlp', 'dense': [16]},
            'data': {
                'train': {
                    'source': f'npz:{domains}/source.npz/train[:80%]',
                    'target': {'spec': f'npz:{domains}/{target}.npz/train', 'unlabelled': True},
                },
                'eval': {'source_val': f'npz:{domains}/source.npz/train[80%:]'},
                'test': {'target': f'npz:{domains}/{target}.npz/train'},
                'train_transform': ['to_float'],
                'eval_transform': ['to_float'],
            },
            'objective': {
                'name': 'dann',
                'weight': 0.1,
                'discriminator': {'name': 'mlp', 'dense': [8], 'num_classes': 1},
            },
            'stages': [{'steps': 60, 'train': [['.*', {'name': 'adam', 'lr': 1e-2}]]}],
            'batch_size': 32,
            'eval_batch_size': 64,
            'eval_every': 20,
            'mesh': {'data': 1},
            **changes,
        }

    return make
