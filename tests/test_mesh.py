"""One device or eight: the same run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tl_jax import mesh as mesh_lib
from tl_jax.checkpoint import Checkpoints
from tl_jax.config import resolve
from tl_jax.errors import UserError
from tl_jax.experiment import build
from tl_jax.step import layouts
from tl_jax.train import train_and_evaluate

MOMENTUM = {'name': 'momentum', 'lr': 0.02}
RUN = {
    'model': {'name': 'convnet', 'widths': [8, 16], 'norm': 'batch'},
    'stages': [{'steps': 6, 'train': [['.*', MOMENTUM]]}],
    'log_every': 1,
}


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [r[k] for r in lines for k in ('train/loss', 'val/loss') if k in r]


@pytest.mark.parametrize('sharding', [[], [['.*kernel', 'fsdp']]], ids=['replicated', 'fsdp'])
def test_eight_devices_give_the_losses_of_one(digits_config, tmp_path, sharding):
    train_and_evaluate(digits_config(**RUN), tmp_path / 'one')
    state = train_and_evaluate(digits_config(**RUN, sharding=sharding) | {'mesh': {'data': 8}}, tmp_path / 'eight')
    np.testing.assert_allclose(losses(tmp_path / 'eight'), losses(tmp_path / 'one'), rtol=1e-6)
    kernel = state.params['head']['kernel']
    assert kernel.sharding.spec == (PartitionSpec('data', None) if sharding else PartitionSpec())
    assert len(kernel.sharding.device_set) == 8
    if sharding:
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
        assert all(m.sharding == kernel.sharding for m in moments)


@pytest.mark.parametrize(('saved_on', 'restored_on'), [(8, 1), (1, 8)])
def test_saved_on_some_devices_restored_on_others(digits_config, tmp_path, saved_on, restored_on):
    config = digits_config(**RUN, sharding=[['.*kernel', 'fsdp']])
    state = train_and_evaluate({**config, 'mesh': {'data': saved_on}}, tmp_path)
    experiment = build(resolve({**config, 'mesh': {'data': restored_on}}))
    mesh = mesh_lib.create_mesh(data=restored_on)
    restored, _ = Checkpoints(tmp_path, keep=2).restore_latest(layouts(experiment, mesh))
    assert len(restored.params['head']['kernel'].sharding.device_set) == restored_on
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), state, restored)
    assert jax.tree.all(same)


def test_fsdp_splits_the_largest_axis_that_divides():
    mesh = mesh_lib.create_mesh(data=8)
    params = {'a': {'kernel': jnp.zeros((3, 16, 64)), 'odd': jnp.zeros((3, 5))}, 'b': jnp.zeros(7)}
    shardings = mesh_lib.parameter_shardings(params, [('a/.*', 'fsdp')], mesh)
    assert shardings['a']['kernel'].spec == PartitionSpec(None, None, 'data')
    assert shardings['a']['odd'].spec == PartitionSpec() and shardings['b'].spec == PartitionSpec()


@pytest.mark.parametrize(
    ('rules', 'message'),
    [
        ([('a/nothing', 'fsdp')], 'does nothing'),
        ([('a/kernel', ['data'])], "'a/kernel' has 3 axes"),
        ([('a/kernel', ['data', None, None])], '8 devices do not divide 3'),
    ],
)
def test_bad_shardings(rules, message):
    with pytest.raises(UserError, match=message):
        mesh_lib.parameter_shardings({'a': {'kernel': jnp.zeros((3, 16, 64))}}, rules, mesh_lib.create_mesh(data=8))
