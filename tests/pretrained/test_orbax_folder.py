"""What Orbax and our own runs saved, read leaf by leaf; and folders that are damaged or lie."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tl_jax import checkpoint, trees
from tl_jax.errors import UserError
from tl_jax.pretrained.orbax_folder import is_checkpoint, read
from tl_jax.state import TrainState

TREE = {
    'params': {
        'backbone': {'conv': {'kernel': jnp.arange(12.0).reshape(3, 4)}, 'rows': [jnp.ones(2), jnp.zeros(3)]},
        'head.bias': jnp.arange(3, dtype=jnp.bfloat16),
        'a/b': jnp.ones(1),
    },
    'nothing': {},
    'rate': np.float32(0.5),
    'step': 3,
}
EXPECTED = {
    'params/backbone/conv/kernel': np.arange(12, dtype=np.float32).reshape(3, 4),
    'params/backbone/rows/0': np.ones(2, np.float32),
    'params/backbone/rows/1': np.zeros(3, np.float32),
    'params/head.bias': np.arange(3).astype(jnp.bfloat16),
    'params/a/b': np.ones(1, np.float32),
    'rate': np.float32(0.5),
    'step': np.int64(3),
}


def save(folder, kind='ocdbt'):
    options = {'ocdbt': {}, 'folders': {'use_ocdbt': False}, 'zarr3': {'use_zarr3': True}}[kind]
    with ocp.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(folder, TREE)
    return folder


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A folder with a checkpoint of each kind; not to be changed."""
    root = tmp_path_factory.mktemp('orbax')
    return {kind: save(root / kind, kind) for kind in ('ocdbt', 'folders', 'zarr3')}


def check(contents):
    assert set(contents.tensors) == set(EXPECTED) and contents.notes == ()
    for name, tensor in contents.tensors.items():
        array = tensor.array()
        assert type(array) is np.ndarray
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
        assert (array.shape, array.dtype) == (EXPECTED[name].shape, EXPECTED[name].dtype), name
        np.testing.assert_array_equal(array, EXPECTED[name])


@pytest.mark.parametrize('kind', ['ocdbt', 'folders', 'zarr3'])
def test_reads_trees(kind, saved):
    assert is_checkpoint(saved[kind])
    check(read(saved[kind]))


def test_reads_what_the_standard_checkpointer_and_the_manager_save(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'standard', TREE)
    check(read(tmp_path / 'standard'))
    with ocp.CheckpointManager(tmp_path / 'managed') as manager:
        manager.save(5, args=ocp.args.StandardSave(TREE))
        both = ocp.args.Composite(a=ocp.args.StandardSave(TREE), b=ocp.args.StandardSave({'w': jnp.ones(2)}))
        manager.wait_until_finished()
    check(read(tmp_path / 'managed' / '5'))
    assert is_checkpoint(tmp_path / 'managed' / '5') and not is_checkpoint(tmp_path / 'managed')
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / 'two', args=both)
    with pytest.raises(UserError, match=r'two: it holds several items; name one, such as .*/two/a'):
        read(tmp_path / 'two')


def test_reads_a_runs_checkpoint_with_what_its_stage_froze(tmp_path):
    params = {'backbone': {'w': jnp.arange(3.0)}, 'head': {'w': jnp.ones(2)}}
    statistics = {'backbone': {'norm': {'mean': jnp.full(3, 7.0)}}}
    trainable = frozenset({'head/w'})
    state = TrainState(
        jnp.int32(40),
        params,
        {'batch_stats': statistics},
        optax.adam(1.0).init(params['head']),
        jnp.zeros(2, jnp.uint32),
    )
    run = checkpoint.Checkpoints(tmp_path, keep=2)
    run.save_frozen(state, 1, trainable)
    run.save(state, checkpoint.Place(1, 0), trainable, score=None)
    run.wait()
    run.close()
    contents = read(tmp_path / 'checkpoints' / '40')
    expected = trees.flatten({'params': params, 'batch_stats': statistics})
    assert set(contents.tensors) == set(expected)
    for name, tensor in contents.tensors.items():
        np.testing.assert_array_equal(tensor.array(), expected[name])
    assert contents.notes == ("a run's checkpoint, of stage 1: left aside 'key', 'opt_state', 'step'",)


def refused(folder) -> str:
    with pytest.raises(UserError) as caught:
        for tensor in read(folder).tensors.values():
            tensor.array()
    assert str(folder) in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


@pytest.fixture
def copy(saved, tmp_path):
    """Of the checkpoint with a folder for each leaf."""
    return shutil.copytree(saved['folders'], tmp_path / 'net')


KERNEL = 'params.backbone.conv.kernel'


def test_names_the_leaf_that_is_missing_or_damaged(copy):
    chunk = copy / KERNEL / '0.0'
    whole = chunk.read_bytes()
    for damaged in (whole[:-3], b'', b'x' * len(whole)):
        chunk.write_bytes(damaged)
        assert "the array 'params/backbone/conv/kernel' is missing or damaged" in refused(copy)
    chunk.unlink()  # By default tensorstore would read zeros.
    assert "the array 'params/backbone/conv/kernel' is missing or damaged" in refused(copy)
    shutil.rmtree(copy / KERNEL)
    assert "the array 'params/backbone/conv/kernel' is missing or damaged" in refused(copy)


def test_a_truncated_store_is_refused_or_read_right(saved, tmp_path):
    """Some of its files hold versions that later ones replaced."""
    names = [path.relative_to(saved['ocdbt']) for path in saved['ocdbt'].rglob('*') if path.is_file()]
    needed = [name for name in names if name.name in ('_METADATA', 'manifest.ocdbt') or 'd' in name.parts]
    missed = []
    for number, name in enumerate(needed):
        folder = shutil.copytree(saved['ocdbt'], tmp_path / str(number))
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        try:
            check(read(folder))
        except UserError as error:
            assert str(error).isprintable()
            missed.append(name)
    assert len(missed) >= 3 and {name.name for name in missed} >= {'_METADATA', 'manifest.ocdbt'}


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    'changes',
    [
        {'shape': [-3, 4]},
        {'shape': [2**63, 4]},
        {'shape': 'x'},
        {'chunks': [2**40, 4]},
        {'chunks': [3, 2**20]},
        {'chunks': [0, 4]},
        {'dtype': '|O'},
        {'dtype': 'pickle'},
        {'dtype': [['a', '<f4'], ['b', '<f4']]},
        {'compressor': {'id': 'pickle'}},
        {'filters': [{'id': 'pickle'}]},
        {'zarr_format': 9},
    ],
)
def test_refuses_arrays_that_no_checkpoint_has(changes, copy):
    change(copy / KERNEL / '.zarray', **changes)
    assert "the array 'params/backbone/conv/kernel'" in refused(copy)


def leaf(*keys, kind='jax.Array', **more):
    return {
        'key_metadata': [{'key': key, 'key_type': 2} for key in keys],
        'value_metadata': {'value_type': kind, 'skip_deserialize': False, **more},
    }


@pytest.mark.parametrize('name', ['../outside', '/tmp/outside', 'a/../../outside', 'a\x00b', 'a\x1b[2J\n'])
def test_names_stay_in_the_folder(name, copy):
    shutil.copytree(copy / KERNEL, copy.parent / 'outside')
    change(copy / '_METADATA', tree_metadata={'x': leaf(name)})
    assert 'leaves the folder' in refused(copy)


@pytest.mark.parametrize(
    ('text', 'why'),
    [
        ('', 'damaged'),
        ('[]', 'no table'),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('[' * 200_000, 'nested too deeply'),
        ('{}', "has no 'tree_metadata'"),
        ('{"tree_metadata": {"x": 3}}', "has no 'tree_metadata'"),
        ('{"tree_metadata": {"x": {}}}', 'is damaged'),
        ('{"tree_metadata": {"x": {"key_metadata": [3], "value_metadata": {}}}}', 'is damaged'),
        ('{"tree_metadata": {"x": {"key_metadata": [], "value_metadata": 3}}}', 'is damaged'),
        (json.dumps({'tree_metadata': {'x': leaf('a', 'b'), 'y': leaf('a/b')}}), 'two of its leaves have one name'),
    ],
)
def test_refuses_other_metadata(text, why, copy):
    (copy / '_METADATA').write_text(text)
    assert why in refused(copy)


def test_says_what_is_no_tensor(copy):
    tree = json.loads((copy / '_METADATA').read_text())['tree_metadata']
    change(copy / '_METADATA', tree_metadata=tree | {'x': leaf('about', kind='string')})
    assert read(copy).notes == ("left aside what is no tensor: 'about'",)


def test_refuses_folders_without_a_finished_checkpoint(tmp_path):
    assert 'no finished Orbax checkpoint' in refused(tmp_path)
