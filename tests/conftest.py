"""Eight virtual CPU devices, a persistent compilation cache, and the data and weights in ../shared where they are."""

import os
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_compilation_cache_dir', str(ROOT / '.jax_cache'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


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
