"""Sharded weights: what the safetensors library wrote shard by shard, and indices that must not be followed."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from pickle_assembler import pickled, table, tensor, write

from tl_jax.errors import UserError
from tl_jax.pretrained.sharded import read_index, shard_paths

SHARDS = ('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')
ARRAYS = {
    'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
    'a.bias': np.ones(2, np.float16),
    'b.weight': np.arange(4).astype(ml_dtypes.bfloat16),
}
WEIGHT_MAP = {'b.weight': SHARDS[1], 'a.weight': SHARDS[0], 'a.bias': SHARDS[0]}


def write_shards(folder, weight_map=WEIGHT_MAP):
    """Writes two shards and returns the path of an index that says `weight_map`."""
    for shard in SHARDS:
        held = {name: array for name, array in ARRAYS.items() if WEIGHT_MAP[name] == shard}
        safetensors.numpy.save_file(held, folder / shard, metadata={'format': 'pt'})
    return write_index(folder, {'metadata': {'total_size': 36}, 'weight_map': weight_map})


def write_index(folder, index):
    path = folder / 'model.safetensors.index.json'
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    return path


def refused(path) -> str:
    with pytest.raises(UserError) as caught:
        for each in read_index(path).tensors.values():
            each.array()
    assert path.parent.name in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


def test_reads_every_shard_in_the_order_of_the_index(tmp_path):
    contents = read_index(write_shards(tmp_path))
    assert list(contents.tensors) == list(WEIGHT_MAP)
    for name, each in contents.tensors.items():
        np.testing.assert_array_equal(each.array(), ARRAYS[name])
        assert (each.shape, each.dtype) == (ARRAYS[name].shape, ARRAYS[name].dtype)
    assert contents.metadata == {'format': 'pt'}
    assert contents.notes == ('3 tensors, 36 bytes, of 2 shards',)


def test_reads_torch_shards(tmp_path):
    weight_map = {'v': 'pytorch_model-00001-of-00002.bin', 'w': 'pytorch_model-00002-of-00002.bin'}
    for name, shard in weight_map.items():
        write(tmp_path / shard, pickled(table(**{name: tensor()})), 'zip')
    contents = read_index(write_index(tmp_path, {'weight_map': weight_map}))
    assert [(name, each.array().tolist()) for name, each in contents.tensors.items()] == [
        ('v', [0] * 4),
        ('w', [0] * 4),
    ]


def test_says_what_the_index_does_not_list(tmp_path):
    contents = read_index(write_shards(tmp_path, {name: WEIGHT_MAP[name] for name in ('b.weight', 'a.bias')}))
    assert list(contents.tensors) == ['b.weight', 'a.bias']
    assert contents.notes == (
        '2 tensors, 12 bytes, of 2 shards',
        "left aside what the index does not list: 'a.weight'",
    )


def test_names_a_missing_shard(tmp_path):
    path = write_shards(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    assert f"its shard '{SHARDS[1]}' is missing" in refused(path)
    (tmp_path / SHARDS[1]).mkdir()
    assert f"its shard '{SHARDS[1]}' is missing" in refused(path)


def test_names_a_damaged_shard(tmp_path):
    path = write_shards(tmp_path)
    (tmp_path / SHARDS[1]).write_bytes((tmp_path / SHARDS[1]).read_bytes()[:-1])
    assert f'{SHARDS[1]}: a damaged safetensors file' in refused(path)


def test_names_tensors_that_are_not_in_their_shard(tmp_path):
    path = write_shards(tmp_path, WEIGHT_MAP | {'a.weight': SHARDS[1], 'c': SHARDS[1]})
    assert f"its shard '{SHARDS[1]}' lacks 'a.weight', 'c'" in refused(path)


@pytest.mark.parametrize(
    'shard',
    [
        '../secret.safetensors',
        '/etc/secret.safetensors',
        'sub/w.safetensors',
        './w.safetensors',
        '..\\secret.safetensors',
        '..',
        '.hidden.safetensors',
        'w\x00.safetensors',
        'w\x1b[2J\n.safetensors',
    ],
)
def test_shards_stay_in_the_folder(shard, tmp_path):
    folder = tmp_path / 'model'
    (folder / 'sub').mkdir(parents=True)
    for reachable in (
        tmp_path / 'secret.safetensors',
        folder / 'sub' / 'w.safetensors',
        folder / '.hidden.safetensors',
    ):
        safetensors.numpy.save_file({'b.weight': ARRAYS['b.weight']}, reachable)
    assert 'is not the name of a file beside it' in refused(write_shards(folder, WEIGHT_MAP | {'b.weight': shard}))


def test_links_stay_in_the_folder(tmp_path):
    folder = tmp_path / 'model'
    folder.mkdir()
    path = write_shards(folder)
    (folder / SHARDS[1]).rename(tmp_path / 'elsewhere')
    (folder / SHARDS[1]).symlink_to('../elsewhere')
    assert 'a link out of the folder' in refused(path)
    with pytest.raises(UserError, match='a link out of the folder'):
        shard_paths(path)
    (folder / SHARDS[1]).unlink()
    (tmp_path / 'elsewhere').rename(folder / 'within')
    (folder / SHARDS[1]).symlink_to('within')
    (tmp_path / 'linked').symlink_to('model')
    assert len(read_index(tmp_path / 'linked' / path.name).tensors) == 3


def test_links_into_the_blobs_of_the_hubs_cache(tmp_path):
    """SNAPSHOT/file → models--org--net/blobs/etag → blobs/xet, as huggingface_hub lays them out; no other place."""
    repo = tmp_path / 'models--org--net'
    snapshot = repo / 'snapshots' / ('0' * 40)
    for folder in (snapshot, repo / 'blobs', tmp_path / 'blobs'):
        folder.mkdir(parents=True)
    path = write_shards(snapshot)
    for shard, blob in zip(SHARDS, (repo / 'blobs' / 'etag', tmp_path / 'blobs' / 'xet'), strict=True):
        (snapshot / shard).rename(blob)
        (snapshot / shard).symlink_to(blob)
    assert shard_paths(path) == [snapshot / shard for shard in SHARDS]
    assert len(read_index(path).tensors) == 3
    (tmp_path / 'blobs' / 'xet').rename(tmp_path / 'other')
    (snapshot / SHARDS[1]).unlink()
    (snapshot / SHARDS[1]).symlink_to(tmp_path / 'other')
    assert 'a link out of the folder' in refused(path)


@pytest.mark.parametrize('shard', ['w.pkl', 'w.npz', 'w', 'model.safetensors.index.json'])
def test_names_the_suffixes_of_shards(shard, tmp_path):
    (tmp_path / shard).write_bytes(b'')
    assert f"no reader for its shard '{shard}'; known: .safetensors, .bin" in refused(
        write_shards(tmp_path, {'w': shard})
    )


@pytest.mark.parametrize(
    ('index', 'why'),
    [
        ('', 'a damaged index'),
        ('{"weight_map": {"a": "', 'a damaged index'),
        ('{"weight_map": {"a": "x.bin", "a": "y.bin"}}', "'a' is there twice"),
        ('[' * 200_000, 'nested too deeply'),
        ([], "without a 'weight_map'"),
        ({}, "without a 'weight_map'"),
        ({'weight_map': {}}, "without a 'weight_map'"),
        ({'weight_map': ['a']}, "without a 'weight_map'"),
        ({'weight_map': {'a': 3}}, "without a 'weight_map'"),
        ({'weight_map': {'a': ['w.bin']}}, "without a 'weight_map'"),
        ({'weight_map': {'a': ''}}, "no reader for its shard ''"),
        ({'modelTopology': {}, 'weightsManifest': []}, "without a 'weight_map'"),
    ],
)
def test_refuses_other_json(index, why, tmp_path):
    assert why in refused(write_index(tmp_path, index))


def test_an_endless_index_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr('tl_jax.pretrained.sharded.MAX_BYTES', 1000)
    path = write_index(tmp_path, ' ' * 10_000_000)
    tracemalloc.start()
    assert 'more than 1,000 bytes' in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
