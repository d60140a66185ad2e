import ml_collections
import pytest

from tl_jax import config as config_lib
from tl_jax.errors import UserError


def a_config():
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.model = dict(name='convnet', source=None)
    c.stages = [dict(steps=5, train=[('head/.*', dict(name='sgd', lr=0.1))])]
    return c


@pytest.mark.parametrize(
    ('assignment', 'get', 'value'),
    [
        ('seed=3', lambda c: c.seed, 3),
        ('model.source=weights.pth', lambda c: c.model.source, 'weights.pth'),
        ('model.widths=[8,16]', lambda c: list(c.model.widths), [8, 16]),
        ('stages[0].steps=10', lambda c: c.stages[0]['steps'], 10),
        ('stages[0].train[0][1].lr=0.5', lambda c: c.stages[0]['train'][0][1]['lr'], 0.5),
        ('ema=0.99', lambda c: c.ema, 0.99),
    ],
)
def test_override(assignment, get, value):
    config = a_config()
    config_lib.override(config, assignment)
    assert get(config) == value


@pytest.mark.parametrize(
    ('assignment', 'message'),
    [
        ('sead=3', "config.sead: unknown field; did you mean 'seed'"),
        ('seed=abc', 'config.seed: must be int, not str'),
        ('seed=1.5', 'config.seed: must be int, not float'),
        ('seed=true', 'config.seed: must be int, not bool'),
        ('stages=3', 'config.stages: must be list or tuple, not int'),
        ('mdel.source=x', "config.mdel: unknown field; did you mean 'model'"),
        ('stages[3].steps=1', r'config.stages\[3\]: there are 1 items'),
        ('seed.x=1', 'config.seed: is 0, which has no fields'),
        ('stages[0].train[0][1]=1', 'a rule is a pair'),
        ('seed', 'write --config.seed=VALUE'),
    ],
)
def test_bad_override_is_one_line_that_names_the_field(assignment, message):
    with pytest.raises(UserError, match=message) as error:
        config = a_config()
        config_lib.override(config, assignment)
        config_lib.resolve(config)
    assert '\n' not in str(error.value)


def test_resolved_config_is_plain_and_resolves_to_itself():
    resolved = config_lib.resolve(a_config())
    assert resolved['stages'][0]['train'] == [['head/.*', {'name': 'sgd', 'lr': 0.1}]]
    assert resolved['batch_size'] == config_lib.DEFAULTS['batch_size']
    assert config_lib.resolve(resolved) == resolved


def loss(positional, *, weight: float, name: str | None = None, sizes: list[int] = (), given=None):
    return positional, weight, name, sizes, given


def test_call_takes_the_section_as_keyword_arguments():
    assert config_lib.call(loss, {'weight': 1, 'sizes': [2]}, 'c', 'p', given=4) == ('p', 1, None, [2], 4)


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        ({'wieght': 1.0}, "c.wieght: unknown field; did you mean 'weight'"),
        ({}, 'c.weight: is required'),
        ({'weight': '1'}, 'c.weight: must be float, not str'),
        ({'weight': True}, 'c.weight: must be float, not bool'),
        ({'weight': 1.0, 'name': 3}, 'c.name: must be str or NoneType'),
        ({'weight': 1.0, 'sizes': 'ab'}, 'c.sizes: must be list or tuple, not str'),
        ({'weight': 1.0, 'given': 1}, 'c.given: unknown field'),
        ({'weight': 1.0, 'positional': 1}, 'c.positional: unknown field'),
    ],
)
def test_call_checks_names_and_types(section, message):
    with pytest.raises(UserError, match=message):
        config_lib.call(loss, section, 'c', 'p', given=4)


def test_missing_config_file_names_its_neighbour(tmp_path):
    (tmp_path / 'finetune.py').write_text('')
    with pytest.raises(UserError, match='did you mean .*finetune.py'):
        config_lib.load(str(tmp_path / 'finetun.py'))
    with pytest.raises(UserError, match='defines no get_config'):
        config_lib.load(str(tmp_path / 'finetune.py'))
    (tmp_path / 'broken.py').write_text('def get_config(:\n')
    with pytest.raises(UserError, match='line 1, is not valid Python'):
        config_lib.load(str(tmp_path / 'broken.py'))
