import hashlib
import json
import subprocess

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from tl_jax.errors import UserError
from tl_jax.pretrained import read
from tl_jax.pretrained.sources import WEIGHTS, locate, sha256

SHARDS = ('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')
INDEX = json.dumps({'weight_map': {'a': SHARDS[0], 'b': SHARDS[1], 'c': SHARDS[0]}})
COMMIT = 'c' * 40


def test_finds_paths(tmp_path):
    file = tmp_path / 'w.npz'
    file.write_bytes(b'')
    assert locate(file) == locate(str(file)) == file


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('resnet20.pt', r"there is no such file; in .*: did you mean 'resnet20\.pth'\?"),
        ('nowhere/deep/w.pth', r'nor the folder .*nowhere/deep; the nearest that exists is '),
        ('folder', r'has none of model\.safetensors, .*flax_model\.msgpack; name a file'),
        ('/dev/null', 'not a regular file'),
    ],
)
def test_names_what_is_near(source, message, tmp_path):
    (tmp_path / 'resnet20.pth').write_bytes(b'')
    (tmp_path / 'folder').mkdir()
    with pytest.raises(UserError, match=message):
        locate(tmp_path / source)


@pytest.mark.parametrize(
    'source', ['shipped:no_such_weights', 'shipped:../tensors', 'hf://one', 'hf://a/../b', 'hf://a/b/../c']
)
def test_refuses_other_sources(source):
    with pytest.raises(UserError, match=f"source '{source}'"):
        locate(source)


def test_takes_the_best_file_of_a_folder(tmp_path):
    assert WEIGHTS[:2] == ('model.safetensors', 'model.safetensors.index.json')
    for name in reversed(WEIGHTS):
        (tmp_path / name).write_bytes(b'')
        (tmp_path / 'config.json').write_bytes(b'')
        assert locate(tmp_path) == tmp_path / name


def test_takes_an_orbax_checkpoint_for_a_file(tmp_path):
    (tmp_path / '_METADATA').write_bytes(b'')
    assert locate(tmp_path) == tmp_path


def test_digests_what_was_located(tmp_path):
    """A file's own; of an index and its shards, or a folder, what the shell says of the list of them."""
    files = ['model.safetensors.index.json', *SHARDS]
    for name, content in zip(files, (INDEX, 'first', 'second'), strict=True):
        (tmp_path / name).write_text(content)
    assert sha256(tmp_path / SHARDS[0]) == hashlib.sha256(b'first').hexdigest()
    listing = subprocess.run(['sha256sum', *files], cwd=tmp_path, check=True, capture_output=True).stdout
    assert sha256(tmp_path / files[0]) == hashlib.sha256(listing).hexdigest()
    (tmp_path / 'z').mkdir()
    (tmp_path / 'z' / 'y').write_text('third')
    listing = subprocess.run(['sha256sum', *sorted(files), 'z/y'], cwd=tmp_path, check=True, capture_output=True).stdout
    assert sha256(tmp_path) == hashlib.sha256(listing).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The snapshot `main` of org/net in an otherwise empty cache, offline."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    snapshot = tmp_path / 'models--org--net' / 'snapshots' / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / 'models--org--net' / 'refs').mkdir()
    (tmp_path / 'models--org--net' / 'refs' / 'main').write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize(
    ('source', 'files'),
    [
        ('hf://org/net@v1', ', '.join(WEIGHTS)),
        ('hf://org/net', 'model.safetensors, '),
        ('hf://o/n/sub/w.bin', 'sub/w.bin'),
    ],
)
def test_says_where_it_looked_offline(source, files, cache):
    repo = 'models--o--n' if '/o/' in source else 'models--org--net'
    with pytest.raises(UserError, match=f'cannot be reached and its cache {cache.parents[2]}/{repo}/.* has no {files}'):
        locate(source)


def test_takes_cached_files_offline(cache):
    (cache / 'pytorch_model.bin').write_bytes(b'weights')
    for source in ('hf://org/net/pytorch_model.bin', 'hf://org/net', 'hf://org/net@main', f'hf://org/net@{COMMIT}'):
        assert locate(source).read_bytes() == b'weights'


@pytest.mark.parametrize('folder', ['', 'sub/'])
def test_a_cached_index_needs_all_of_its_shards_offline(folder, cache):
    (cache / folder).mkdir(exist_ok=True)
    (cache / folder / 'model.safetensors.index.json').write_text(INDEX)
    source = f'hf://org/net/{folder}model.safetensors.index.json' if folder else 'hf://org/net'
    (cache / folder / SHARDS[0]).write_bytes(b'')
    with pytest.raises(UserError, match=f"has no '{folder}{SHARDS[1]}' of model.safetensors.index.json"):
        locate(source)
    (cache / folder / SHARDS[1]).write_bytes(b'')
    assert locate(source) == cache / folder / 'model.safetensors.index.json'


class Hub:
    """Stands in for `hf_hub_download`: serves `files` into a folder laid out as the cache is, and lists what was asked."""

    def __init__(self, folder, files):
        self.folder, self.files, self.asked = folder, files, []

    def __call__(self, repo, file, *, revision=None, local_files_only=False):
        self.asked.append((file, revision))
        if file not in self.files or local_files_only:
            raise errors.LocalEntryNotFoundError(file) if local_files_only else errors.EntryNotFoundError(file)
        path = self.folder / 'snapshots' / COMMIT / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.files[file])
        return str(path)


@pytest.fixture
def serve(tmp_path, monkeypatch):
    def serve(files):
        hub = Hub(tmp_path, files)
        monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hub)
        return hub

    return serve


def test_fetches_the_best_file_of_a_repository(serve):
    hub = serve({'pytorch_model.bin': 'p', 'flax_model.msgpack': 'f'})
    assert locate('hf://org/net@v1').read_text() == 'p'
    assert hub.asked == [*((name, 'v1') for name in WEIGHTS[:3]), ('config.json', COMMIT)]
    serve({'README.md': ''})
    with pytest.raises(UserError, match=r'none of model\.safetensors, .*; name one, hf://org/net/FILE'):
        locate('hf://org/net')


def test_fetches_the_shards_of_an_index_from_its_commit(serve):
    """Not from the revision, which may have moved on in between."""
    hub = serve({'sub/model.safetensors.index.json': INDEX, **{f'sub/{shard}': shard for shard in SHARDS}})
    index = locate('hf://org/net/sub/model.safetensors.index.json')
    assert [(index.parent / shard).read_text() for shard in SHARDS] == list(SHARDS)
    assert hub.asked[1:-1] == [(f'sub/{shard}', COMMIT) for shard in SHARDS]
    assert hub.asked[-1] == ('sub/config.json', COMMIT)


def test_names_a_shard_that_the_repository_lacks(serve):
    serve({'model.safetensors.index.json': INDEX, SHARDS[0]: ''})
    with pytest.raises(UserError, match=f"names the shard '{SHARDS[1]}', which the repository lacks"):
        locate('hf://org/net')


@pytest.mark.parametrize('shard', ['../../x.safetensors', '/etc/x.bin', 'a/b.safetensors'])
def test_asks_for_no_shard_outside_the_folder(shard, serve):
    hub = serve({'model.safetensors.index.json': json.dumps({'weight_map': {'a': shard}}), shard: ''})
    with pytest.raises(UserError, match='is not the name of a file beside it'):
        locate('hf://org/net')
    assert [file for file, _ in hub.asked] == list(WEIGHTS[:2])


@pytest.mark.parametrize(
    ('error', 'message'),
    [
        (errors.RevisionNotFoundError, "the repository has no revision 'v1'"),
        (errors.RepositoryNotFoundError, 'no such repository, or it needs a login'),
        (errors.HFValidationError, 'the hub refused'),
        (PermissionError, 'the hub refused'),
    ],
)
def test_says_why_the_hub_refused(error, message, monkeypatch):
    def refuse(*args, **options):
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', refuse)
    with pytest.raises(UserError, match=message):
        locate('hf://org/net@v1')


@pytest.mark.parametrize('name', ['w.onnx', 'w'])
def test_names_the_suffixes_it_reads(name, tmp_path):
    (tmp_path / name).write_bytes(b'x')
    with pytest.raises(UserError, match=r'no reader for the suffix .*; known: \.safetensors, \.pth'):
        read(tmp_path / name)


def test_names_a_file_that_cannot_be_opened(tmp_path):
    for suffix in ('pth', 'npz', 'safetensors'):
        with pytest.raises(UserError, match=f'gone.{suffix}'):
            read(tmp_path / f'gone.{suffix}')
