import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import checkpoint
from tl_jax.errors import UserError
from tl_jax.optimizers import create_partition
from tl_jax.state import Layout, create_state, enter_stage

VARIABLES = {
    'params': {
        'backbone': {'kernel': jnp.arange(40_000.0).reshape(200, 200), 'norm': {'scale': jnp.ones(3)}},
        'head': {'kernel': jnp.linspace(0, 1, 8).reshape(4, 2)},
    },
    'batch_stats': {'backbone': {'norm': {'mean': jnp.zeros(3)}}},
    'memory': {},
}


@pytest.fixture
def begun():
    state = create_state(VARIABLES, 0)
    partition = create_partition([('head/.*', {'name': 'adamw', 'lr': 0.1})], state.params, steps=9)
    state = enter_stage(state, partition, ema=0.9)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    return state, partition, lambda number: Layout(partition, shapes)


def at(state, step):
    head = {'kernel': state.params['head']['kernel'] + step}
    return state._replace(step=jnp.int32(step), params={**state.params, 'head': head})


def save(workdir, state, partition, scores):
    checkpoints = checkpoint.Checkpoints(workdir, keep=2)
    checkpoints.save_frozen(state, 0, partition.trainable)
    for step, score in enumerate(scores, 1):
        checkpoints.save(at(state, step), checkpoint.Place(0, 0), partition.trainable, score=score)
    checkpoints.wait()
    checkpoints.close()


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


def test_newest_and_best_are_kept_and_come_back_whole(begun, tmp_path):
    state, partition, layout_of = begun
    save(tmp_path, state, partition, [0.1, 0.9, 0.2, 0.9, 0.3])
    assert {p.name for p in (tmp_path / 'checkpoints').iterdir() if p.is_dir()} == {'2', '4', '5'}
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    restored, place = checkpoints.restore_latest(layout_of)
    assert same(restored, at(state, 5)) and place == checkpoint.Place(0, 0)
    assert same(checkpoints.restore(2, layout_of)[0], at(state, 2))


def test_frozen_leaves_are_stored_once(begun, tmp_path):
    state, partition, _ = begun
    save(tmp_path, state, partition, [None] * 3)

    def size(folder):
        return sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())

    assert size(tmp_path / 'frozen') > 20_000  # 160 kB of a regular sequence, compressed
    assert all(size(tmp_path / 'checkpoints' / str(step)) < 15_000 for step in (2, 3))


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'delete', 'metadata'])
def test_a_damaged_newest_checkpoint_is_named_set_aside_and_passed_over(begun, tmp_path, damage, capsys):
    state, partition, layout_of = begun
    save(tmp_path, state, partition, [None] * 3)
    newest = tmp_path / 'checkpoints' / '3'
    if damage == 'metadata':
        next((newest / 'about').glob('metadata')).write_text('{')
    for file in [f for f in (newest / 'state').rglob('*') if f.is_file() and f.parent.name == 'd']:
        content = bytearray(file.read_bytes())
        if damage == 'flip':
            for i in range(0, len(content), 7):
                content[i] ^= 0x10
            file.write_bytes(content)
        elif damage == 'truncate':
            file.write_bytes(content[: len(content) // 2])
        elif damage == 'delete':
            file.unlink()
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    restored, _ = checkpoints.restore_latest(layout_of)
    assert f'checkpoint {newest} is damaged' in capsys.readouterr().out
    assert same(restored, at(state, 2))
    assert (tmp_path / 'damaged' / '3').is_dir() and not newest.exists()


def test_values_that_changed_behind_intact_files_are_found(begun, tmp_path):
    state, partition, layout_of = begun
    save(tmp_path / 'a', state, partition, [None])
    save(tmp_path / 'b', at(state, 7), partition, [None])
    # Everything reads, but the arrays are another run's.
    shutil.rmtree(tmp_path / 'a/checkpoints/1/state')
    shutil.copytree(tmp_path / 'b/checkpoints/1/state', tmp_path / 'a/checkpoints/1/state')
    checkpoints = checkpoint.Checkpoints(tmp_path / 'a', keep=2)
    with pytest.raises(UserError, match='none of its 1 checkpoints can be read'):
        checkpoints.restore_latest(layout_of)


def test_checksums_see_value_place_and_sign(begun):
    def of(x):
        return checkpoint.checksums({'x': x})['x']

    x = jnp.arange(12.0).reshape(3, 4)
    variants = [x, x.T.reshape(3, 4), x.at[0, 0].set(-0.0), x.at[2, 3].add(1e-6), x[:, ::-1]]
    assert len({of(v) for v in variants}) == len(variants)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ('data',))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'data'))
    assert of(jax.device_put(x, spec)) == of(x)
    assert of(jnp.array([True, False])) != of(jnp.array([False, True]))
    assert of(x.astype(jnp.bfloat16)) == of(x.astype(jnp.bfloat16))
