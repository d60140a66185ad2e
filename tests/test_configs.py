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
from tl_jax.data import sources
from tl_jax.step import create_train_step, layouts

ROOT = Path(__file__).resolve().parent.parent


def variants():
    for path in sorted((ROOT / 'configs').glob('*.py')):
        module, _ = config_lib.load_module(str(path))
        for variant in dict.fromkeys(v for v, _ in module.sweep()) if hasattr(module, 'sweep') else ['']:
            yield pytest.param(path, variant, id=f'{path.stem}:{variant}')


def blank_images(size, classes, label_fields=('label',), count=60_000):
    """Stands in for images that are not here: the transforms of the config decide the shape."""
    labels = (np.arange(count) % classes).astype(np.int32)
    names = tuple(f'{i}/character{i}/rot000' for i in range(classes))

    def source(path, **_):
        get = lambda i: {'image': np.zeros(size, np.uint8), **{field: int(labels[i]) for field in label_fields}}
        return data_lib.Source(path, count, get, labels, names)

    return source


def blank_table(path, features, **_):
    return data_lib.Source(
        path, 2000, lambda i: {'inputs': np.zeros(features, np.float32), 'label': i % 2}, np.arange(2000) % 2
    )


def blank_sentences(path, length, **_):
    tokens = np.ones(length, np.int32)
    return data_lib.Source(path, 2000, lambda i: {'tokens': tokens, 'other_tokens': tokens})


def blank_texts():
    def source(path, length, text=None, class_names=None, **_):
        tokens = np.ones(length, np.int32)
        labels = np.arange(2000) % len(class_names or 'ab') if text else None
        get = lambda i: {'tokens': tokens} | ({'label': int(labels[i])} if text else {})
        return data_lib.Source(path, 2000, get, labels, class_names and tuple(class_names), np.full(2000, length))

    return source


BLANKS = {
    'tsv': blank_texts(),
    'lines': blank_texts(),
    'folder': blank_images((40, 40, 3), 2),
    'npz': blank_images((28, 28, 1), 10),
    'omniglot': blank_images((28, 28, 1), 100, count=2000),
    'multimnist': blank_images((28, 28, 1), 10, ('label_left', 'label_right')),
    'svmlight': blank_table,
    'bitext': blank_sentences,
}


@pytest.mark.parametrize(('path', 'variant'), list(variants()))
def test_config_by_shape(path, variant, monkeypatch):
    assert inspect.getdoc(config_lib.load_module(str(path))[0]), 'a config says what it is for'
    for kind, blank in BLANKS.items():
        blank.__signature__ = inspect.signature(sources.KINDS[kind])  # its options are still checked
        monkeypatch.setitem(sources.KINDS, kind, blank)
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
        losses = [value for name, value in metrics.items() if name.endswith('/loss')]
        assert losses and all(value.shape == () for value in losses)
