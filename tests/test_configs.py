"""Every shipped config is parsed, and checked by shape through initialisation and one step of each stage; no data."""

import inspect
from pathlib import Path

import jax
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import data as data_lib
from tl_jax import experiment as experiment_lib
from tl_jax import mesh as mesh_lib
from tl_jax.step import create_train_step, layouts

ROOT = Path(__file__).resolve().parent.parent


def variants():
    for path in sorted((ROOT / 'configs').glob('*.py')):
        module, _ = config_lib.load_module(str(path))
        for variant in dict.fromkeys(v for v, _ in module.sweep()) if hasattr(module, 'sweep') else ['']:
            yield pytest.param(path, variant, id=f'{path.stem}:{variant}')


def blank_images(spec, *, shots=None, **_):
    """Stands in for a source that is not here: the transforms of the config decide the shape."""
    size = (40, 40, 3) if spec.startswith('folder:') else (28, 28, 1) if spec.startswith('npz:') else (8, 8, 1)
    classes = 2 if spec.startswith('folder:') else 10
    labels = (np.arange(400) % classes).astype(np.int32)
    get = lambda i: {'image': np.zeros(size, np.uint8), 'label': int(labels[i])}
    return data_lib.Source(name=spec, length=400, get=get, labels=labels, class_names=tuple(map(str, range(classes))))


@pytest.mark.parametrize(('path', 'variant'), list(variants()))
def test_config_by_shape(path, variant, monkeypatch):
    assert inspect.getdoc(config_lib.load_module(str(path))[0]), 'a config says what it is for'
    monkeypatch.setattr(data_lib, 'open_source', blank_images)
    config = config_lib.load(f'{path}:{variant}' if variant else str(path))
    config.mesh = dict(data=1)
    experiment = experiment_lib.build(config_lib.resolve(config))
    layout_of = layouts(experiment, mesh_lib.create_mesh(data=1))
    for number in range(len(experiment.stages)):
        layout = layout_of(number)
        step = create_train_step(
            experiment.stages[number].objective,
            experiment.stages[number].gradient,
            layout.partition,
            config.get('clip_norm', 0.0),
            config.get('ema', 0.0),
        )
        after, metrics = jax.eval_shape(step, layout.state, experiment.batch)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), layout.state
        )
        assert metrics['train/loss'].shape == ()
