"""Checkpoints by name: what a section of a config stands for."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import models, pretrained
from tl_jax.data import make_transform
from tl_jax.errors import UserError
from tl_jax.experiment_data import data_from
from tl_jax.pretrained import catalogue, maps


@pytest.mark.parametrize('name', maps.CATALOGUE)
def test_every_entry_names_a_model_and_what_it_needs(name):
    entry = maps.CATALOGUE[name]
    module = models.create_model(entry.model, num_classes=2, **entry.fields)
    assert maps.family_of(module.backbone)
    assert entry.source.startswith('hf://')
    if entry.preprocessing:
        mean, std = jnp.asarray(entry.preprocessing.mean), jnp.asarray(entry.preprocessing.std)
        assert mean.shape == std.shape and 0 < entry.preprocessing.crop <= 1
        rng = np.random.default_rng(0)
        photo = {'image': rng.integers(0, 256, (97, 130, 3), np.uint8)}
        for transforms in (catalogue.evaluation_transforms, catalogue.training_transforms):
            image = make_transform(transforms(entry.preprocessing))(dict(photo), rng)['image']
            assert image.shape == (entry.preprocessing.size, entry.preprocessing.size, 3)


@pytest.fixture
def checkpoint(monkeypatch, tmp_path):
    entry = catalogue.Entry(
        'resnet18',
        str(tmp_path / 'model.safetensors'),
        'mit',
        catalogue.Preprocessing(64, (0.5,) * 3, (0.25,) * 3, 0.9, 'bicubic'),
        {'stem_width': 8},
    )
    monkeypatch.setitem(maps.CATALOGUE, 'timm/some.net', entry)
    (tmp_path / 'model.safetensors').touch()
    return tmp_path


def test_a_name_stands_for_architecture_source_and_fields(checkpoint):
    section = pretrained.resolved({'name': 'timm/some.net', 'stem': 'small'})
    assert section == {
        'name': 'resnet18',
        'source': str(checkpoint / 'model.safetensors'),
        'stem_width': 8,
        'stem': 'small',
    }
    assert pretrained.resolved({'name': 'timm/some.net', 'stem_width': 4})['stem_width'] == 4
    assert pretrained.resolved({'name': 'resnet18'}) == {'name': 'resnet18'}
    assert pretrained.list_pretrained('timm/some*') == ['timm/some.net']


def test_sizes_beside_the_weights(checkpoint, monkeypatch):
    (family,) = (f for f in maps.FAMILIES if f.module.__name__ == 'ResNet')
    stated = family._replace(fields=lambda config: {'stem': config['stem'], 'stem_width': config['width']})
    monkeypatch.setattr(maps, 'FAMILIES', (stated,))
    (checkpoint / 'config.json').write_text(json.dumps({'architecture': 'some', 'stem': 'small', 'width': 16}))
    source = str(checkpoint / 'model.safetensors')
    assert pretrained.resolved({'name': 'resnet18', 'source': source, 'stem_width': 2}) == {
        'name': 'resnet18',
        'source': source,
        'stem': 'small',
        'stem_width': 2,
    }
    (checkpoint / 'config.json').write_text('{"stem"')
    with pytest.raises(UserError, match=r'config\.json: a damaged description'):
        pretrained.resolved({'name': 'resnet18', 'source': source})


@pytest.mark.parametrize(
    'text',
    ['{"architecture": "x", "architecture": "y"}', '[' * 100_000, '3', '{"architecture": "some", "width": 1}', '\xff'],
)
def test_refuses_a_damaged_description(text, checkpoint, monkeypatch):
    (family,) = (f for f in maps.FAMILIES if f.module.__name__ == 'ResNet')
    monkeypatch.setattr(maps, 'FAMILIES', (family._replace(fields=lambda config: {'stem': config['stem']}),))
    (checkpoint / 'config.json').write_text(text, 'latin-1')
    with pytest.raises(UserError, match=r'config\.json: a damaged description of a network'):
        pretrained.resolved({'name': 'resnet18', 'source': str(checkpoint / 'model.safetensors')})


def test_refuses_the_description_of_another_network(checkpoint, monkeypatch):
    """Its tensors may fit, and its function be another: other norms, other pooling."""
    (family,) = (f for f in maps.FAMILIES if f.module.__name__ == 'ResNet')
    monkeypatch.setattr(maps, 'FAMILIES', (family._replace(fields=lambda config: None),))
    (checkpoint / 'config.json').write_text('{"architecture": "resnetblur50"}')
    with pytest.raises(UserError, match=r"describes 'resnetblur50', which 'resnet18' \(ResNet\) is not"):
        pretrained.resolved({'name': 'resnet18', 'source': str(checkpoint / 'model.safetensors')})
    (checkpoint / 'config.json').write_text('{"seed": 0}')  # a run's own
    assert 'seed' not in pretrained.resolved({'name': 'resnet18', 'source': str(checkpoint / 'model.safetensors')})


@pytest.mark.parametrize(
    'section, message',
    [
        ({'name': 3}, 'model.name: must be a string, not 3'),
        ({'source': 'x'}, 'model.name: is missing'),
        ({'name': None}, 'model.name: is missing'),
        ({'name': 'resnet18', 'source': 3}, 'model.source: must be a string, not 3'),
    ],
)
def test_refuses_a_section_that_names_nothing(section, message):
    with pytest.raises(UserError, match=message):
        pretrained.resolved(section)


def test_an_unknown_checkpoint(checkpoint):
    with pytest.raises(UserError, match="model.name: no checkpoint 'timm/sone.net' in the catalogue; .*timm/some.net"):
        pretrained.resolved({'name': 'timm/sone.net'})
    with pytest.raises(UserError, match="source: 'resnet18' is an architecture"):
        pretrained.load_pretrained('resnet18')


def test_transforms_of_the_checkpoint(checkpoint):
    config = {
        'data': {'train': 'sklearn:digits/train', 'train_transform': 'pretrained', 'eval_transform': 'pretrained'},
        'model': {'name': 'timm/some.net'},
        'seed': 0,
        'batch_size': 2,
        'eval_batch_size': 2,
    }
    data = data_from(config)
    assert data.eval_transforms['train'] == [
        {'name': 'resize', 'size': 71, 'interpolation': 'bicubic'},
        {'name': 'center_crop', 'size': 64},
        'to_float',
        {'name': 'normalize', 'mean': [0.5] * 3, 'std': [0.25] * 3},
    ]
    config['model'] = {'name': 'resnet18'}
    with pytest.raises(
        UserError, match="config.data.train_transform: 'pretrained' is .* config.model.name is 'resnet18'"
    ):
        data_from(config)
