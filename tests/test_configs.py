"""Every shipped config is resolved, and each that is built otherwise than the ones before it is checked by shape through
initialisation and one step of each stage; no data.
"""

import inspect
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import data as data_lib
from tl_jax import experiment as experiment_lib
from tl_jax import mesh as mesh_lib
from tl_jax.data import sources
from tl_jax.models import create_model
from tl_jax.optimizers import create_partition
from tl_jax.step import create_train_step, layouts

ROOT = Path(__file__).resolve().parent.parent


# Large networks: blocks that only repeat others are left out, and convolutions within them.
TABLES = {
    'glue': {'depth': 2},
    'task_adaptation': {'stage_sizes': [1, 1, 1, 1], 'block': 'basic'},
    'vpt': {'depth': 2},
    'vtab': {'name': 'timm/resnetv2_50x1_bit.goog_in21k', 'stage_sizes': [1, 1], 'widths': [64, 128]},
}
# Cut likewise, student and teacher; the third stage stays, whose endpoints terms name. Networks of other depths are then the
# same, and take one name.
CUT = ('distill', 'attention_transfer', 'repdistiller')
SHALLOW = {
    **dict.fromkeys(('resnet32', 'resnet56', 'resnet110'), 'resnet20'),
    'resnet32x4': 'resnet8x4',
    'wrn_40_1': 'wrn_16_1',
    'wrn_40_2': 'wrn_16_2',
}


HERE = 'shipped:mnist_convnet'  # weights that are always there; of no network in question, and not read
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))


def names_of(path):
    module, _ = config_lib.load_module(str(path))
    return list(dict.fromkeys(v for v, _ in module.sweep()) if hasattr(module, 'sweep') else [''])


def distinct():
    """Of the variants that differ in rates, durations and what their data say alone, the first."""
    for path in CONFIGS:
        module, _ = config_lib.load_module(str(path))
        config_of = lambda name, module=module: module.get_config(*([name] if name else []))
        first = {shape_of(shrunk(path, config_of(name))): name for name in reversed(names_of(path))}
        for name in reversed(first.values()):
            yield pytest.param(path, name, id=f'{path.stem}:{name}')


def shrunk(path, config):
    """The config with its large networks cut, on one device, and sources that are here; none is read for shapes."""
    config.mesh = dict(data=1)
    if path.stem in TABLES:
        config.model.update(TABLES[path.stem], source=HERE)
        config.batch_size = 4
        config.gradient = {'name': 'plain'}  # in place of one that cuts the batch
    for network in (config.model, *teachers(config)) if path.stem in CUT else ():
        name = SHALLOW.get(network['name'], network['name'])
        network.update({'name': name}, **({'depth': 10} if 'wrn' in name else {'stage_sizes': [1, 1, 1]}))
        config.batch_size = 4
    for teacher in teachers(config):
        teacher.update(source=HERE)
    if str(config.model.get('source')).startswith('runs/'):  # what another run made
        config.model.source = HERE
    return config


def shape_of(config):
    """What decides the shapes of a run, but for those of its data."""
    plain = config_lib.plain(config)
    exact = {name: plain.get(name) for name in ('model', 'objective', 'gradient', 'cache_top_k', 'cache_dtype')}
    views = {name: value for name, value in plain['data'].items() if 'transform' in name}
    numbers = re.sub(r'-?\d[\d.e-]*', '#', json.dumps(plain.get('stages')))
    return json.dumps([exact, views, numbers])


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
    def source(path, length=None, text=None, class_names=None, image=None, target=None, **_):
        if image:
            return blank_images((40, 40, 3), 200)(path)
        tokens = np.ones(length, np.int32)
        if target:
            get = lambda i: {'tokens': tokens, 'target': np.float32(i)}
            return data_lib.Source(path, 2000, get, None, None, np.full(2000, length))
        labels = np.arange(2000) % len(class_names or 'ab') if text else None
        get = lambda i: {'tokens': tokens} | ({'label': int(labels[i])} if text else {})
        return data_lib.Source(path, 2000, get, labels, class_names and tuple(class_names), np.full(2000, length))

    return source


def blank_tags(path, length, class_names, **_):
    tokens = np.ones(length, np.int32)
    get = lambda i: {'tokens': tokens, 'token_label': tokens}
    return data_lib.Source(path, 2000, get, class_names=tuple(class_names), lengths=np.full(2000, length))


def blank_arrays(path, **options):
    return blank_images((32, 32, 3) if 'cifar' in path else (28, 28, 1), 10)(path, **options)


def teachers(config):
    """The sections of teachers in a config's objectives."""
    for section in (config, *config.stages):
        found = section.get('objective', {}).get('distilled', {}).get('teacher', [])
        yield from found if isinstance(found, list | tuple) else [found]


BLANKS = {
    'tsv': blank_texts(),
    'jsonl': blank_texts(),
    'lines': blank_texts(),
    'packed': blank_texts(),
    'conll': blank_tags,
    'tfds': blank_images((40, 40, 3), 10),
    'folder': blank_images((40, 40, 3), 2),
    'npz': blank_arrays,
    'omniglot': blank_images((28, 28, 1), 100, count=2000),
    'multimnist': blank_images((28, 28, 1), 10, ('label_left', 'label_right')),
    'svmlight': blank_table,
    'bitext': blank_sentences,
}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_variant_is_resolved(path):
    for name in names_of(path):
        config_lib.resolve(config_lib.load(f'{path}:{name}' if name else str(path)))


@pytest.mark.parametrize(('path', 'variant'), list(distinct()))
def test_config_by_shape(path, variant, monkeypatch):
    assert inspect.getdoc(config_lib.load_module(str(path))[0]), 'a config says what it is for'
    for kind, blank in BLANKS.items():
        blank.__signature__ = inspect.signature(sources.KINDS[kind])  # its options are still checked
        monkeypatch.setitem(sources.KINDS, kind, blank)
    config = shrunk(path, config_lib.load(f'{path}:{variant}' if variant else str(path)))
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


def test_glue_trains_the_norms_with_bottlenecks():
    module = create_model('bert_tiny', num_classes=2, depth=1, pool='pooler')
    params = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 4), np.int32))['params']
    norms = {
        f'backbone/{name}/{leaf}' for name in ('norm', 'block1/norm1', 'block1/norm2') for leaf in ('scale', 'bias')
    }
    for method, wanted in (('houlsby', norms), ('lora', set())):
        (stage,) = config_lib.load(f'{ROOT}/configs/glue.py:cola,{method}').to_dict()['stages']
        leaves = {**params, 'adapters': {'up': np.zeros(2)}}
        partition = create_partition(stage['train'], leaves, steps=stage['steps'])
        assert {path for path in partition.trainable if 'norm' in path} == wanted
