import pytest
from huggingface_hub import constants

from tl_jax.errors import UserError
from tl_jax.pretrained import read
from tl_jax.pretrained.sources import locate


def test_finds_paths(tmp_path):
    file = tmp_path / 'w.npz'
    file.write_bytes(b'')
    assert locate(file) == locate(str(file)) == file


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('resnet20.pt', r"there is no such file; in .*: did you mean 'resnet20\.pth'\?"),
        ('nowhere/deep/w.pth', r'nor the folder .*nowhere/deep; the nearest that exists is '),
        ('folder', 'not a regular file'),
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


@pytest.mark.parametrize(
    ('source', 'file'), [('hf://org/net@v1', 'model.safetensors'), ('hf://org/net/sub/w.bin', 'sub/w.bin')]
)
def test_says_where_it_looked_offline(source, file, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(
        UserError, match=f"cannot be reached and its cache {tmp_path}/models--org--net/.* has no '{file}'"
    ):
        locate(source)


def test_takes_a_cached_file_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    snapshot = tmp_path / 'models--org--net' / 'snapshots' / ('0' * 40)
    snapshot.mkdir(parents=True)
    (snapshot / 'pytorch_model.bin').write_bytes(b'weights')
    (tmp_path / 'models--org--net' / 'refs').mkdir()
    (tmp_path / 'models--org--net' / 'refs' / 'main').write_text('0' * 40)
    assert locate('hf://org/net/pytorch_model.bin').read_bytes() == b'weights'


@pytest.mark.parametrize('name', ['w.onnx', 'w'])
def test_names_the_suffixes_it_reads(name, tmp_path):
    (tmp_path / name).write_bytes(b'x')
    with pytest.raises(UserError, match=r'no reader for the suffix .*; known: \.safetensors, \.pth'):
        read(tmp_path / name)


def test_names_a_file_that_cannot_be_opened(tmp_path):
    for suffix in ('pth', 'npz', 'safetensors'):
        with pytest.raises(UserError, match=f'gone.{suffix}'):
            read(tmp_path / f'gone.{suffix}')
