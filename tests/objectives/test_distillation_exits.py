"""Exits within the wrapper: they learn beside the network, without a teacher, and are left out of what is stored."""

import jax
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import experiment as experiment_lib
from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.train import train_and_evaluate

MODEL = dict(name='convnet', widths=[3, 4], dense=[5])


@pytest.fixture
def config(digits_config):
    def make(**term):
        objective = {'name': 'supervised', 'distilled': {'terms': [{'name': 'exits', 'layers': ['conv1'], **term}]}}
        return digits_config(model=MODEL, objective=objective)

    return make


def test_exits_learn_in_a_run_without_a_teacher(config, tmp_path):
    whole = config(layers=['conv1', 'conv2'])
    stage = experiment_lib.build(config_lib.resolve(whole)).stages[0]
    state = train_and_evaluate(whole, tmp_path / 'run')
    learnt = trees.flatten(state.params['projectors'])
    batch = experiment_lib.build(config_lib.resolve(whole)).batch
    start = trees.flatten(jax.jit(stage.objective.init)(jax.random.key(0), batch)['params']['projectors'])
    assert {path.rpartition('/')[0] for path in learnt} == {
        f'teacher/exits/layer{i}/{part}' for i in (1, 2) for part in ('inner', 'norm', 'classifier')
    }
    for path, leaf in learnt.items():
        assert np.abs(np.asarray(leaf) - start[path]).max() > 1e-4, path
    assert 'teacher' not in state.collections and 'teacher' not in state.params
    from tl_jax.finished import network

    assert set(network(tmp_path / 'run')[1]['params']) == {'backbone', 'head'}


@pytest.mark.parametrize(
    ('term', 'message'),
    [
        (
            dict(layers=['conv3']),
            r"terms\[0\]: the student gives no 'conv3'; it gives conv1, conv2, dense1, features, logits",
        ),
        (dict(layers=[['conv1', 'conv2']]), 'exits.layers names endpoints of the one network, not pairs'),
        (dict(imitation=1.5), 'exits.imitation is a share'),
        (dict(temperature=0.0), 'temperature must be above 0'),
    ],
)
def test_bad_exits_in_one_line(config, term, message):
    with pytest.raises(UserError, match=message) as caught:
        experiment_lib.build(config_lib.resolve(config(**term))).shapes()
    assert '\n' not in str(caught.value)
