"""Cached features train what the frozen backbone would have trained, and nothing stale or random is ever taken for them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import features, run_once, trees
from tl_jax import mesh as mesh_lib
from tl_jax.data import cached
from tl_jax.errors import UserError
from tl_jax.objectives import Model
from tl_jax.train import Preempted, train_and_evaluate

ADAM = {'name': 'adam', 'lr': 1e-2}
PROBE = {'name': 'probe', 'epochs': 2, 'train': [['head/.*', ADAM]]}
SMALL = {
    'train': 'sklearn:digits/train[:40]',
    'eval': 'sklearn:digits/val[:20]',
    'train_transform': ['to_float'],
    'eval_transform': ['to_float'],
}
MODELS = {
    'batch_norm': {'name': 'convnet', 'widths': [8, 16], 'norm': 'batch', 'head': {'name': 'linear', 'dropout': 0.3}},
    'vit': {'name': 'vit_tiny_patch16', 'patch_size': 4, 'width': 16, 'heads': 2, 'depth': 2, 'mlp_width': 32},
    'bert': {
        'name': 'bert_tiny',
        'width': 16,
        'heads': 2,
        'depth': 1,
        'mlp_width': 32,
        'vocabulary': 300,
        'length': 24,
    },
}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def config(digits_config):
    return lambda **changes: digits_config(
        **{'data': SMALL, 'stages': [PROBE], 'eval_batch_size': 16, 'model': MODELS['batch_norm'], **changes}
    )


def leaves(state):
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(state.params).items()}


def figures(workdir):
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [r[k] for r in lines for k in ('train/loss', 'train/accuracy', 'val/loss', 'val/accuracy') if k in r]


def texts(folder, **options):
    rng = np.random.default_rng(0)
    rows = [f'{"".join(rng.choice(list("abcdefgh "), rng.integers(5, 20)))},{i % 2}' for i in range(40)]
    (folder / 'texts.csv').write_text('\n'.join(['text,label', *rows]))
    spec = {'spec': f'csv:{folder}/texts.csv', 'text': 'text', 'tokenizer': 'bytes', 'length': 24, **options}
    return {'train': spec, 'eval': spec}


@pytest.mark.parametrize('kind', [*MODELS, 'bert in buckets'])
def test_a_head_learns_the_same_on_cached_features(config, tmp_path, capsys, kind):
    name, _, bucketed = kind.partition(' in ')
    buckets = {'buckets': [12, 24]} if bucketed else {}
    changes = {'model': MODELS[name], **({'data': texts(tmp_path, **buckets)} if name == 'bert' else {})}
    with_cache = train_and_evaluate(config(**changes), tmp_path / 'cached')
    assert "probe: features of 40 examples of 'train' computed in" in capsys.readouterr().out
    without = train_and_evaluate(config(**changes, cache_features=False), tmp_path / 'uncached')
    assert 'features of' not in capsys.readouterr().out
    start = leaves(without)
    for path, leaf in leaves(with_cache).items():
        np.testing.assert_allclose(leaf, start[path], atol=1e-5, err_msg=path)
    np.testing.assert_allclose(figures(tmp_path / 'cached'), figures(tmp_path / 'uncached'), atol=1e-5)


def test_stored_features_are_found_again_and_a_damaged_file_is_not_believed(config, tmp_path, capsys):
    first = train_and_evaluate(config(), tmp_path / 'first')
    files = sorted(cached.folder().rglob('*.npy'))
    assert len(files) == 3 + 2  # 40 and 20 examples, 16 a batch
    assert {cached.read(file).dtype for file in files} == {np.dtype('float32')}
    for file in files[:2]:
        stored = bytearray(file.read_bytes())
        stored[150] ^= 1
        file.write_bytes(stored)
        assert cached.read(file) is None
    capsys.readouterr()
    again = train_and_evaluate(config(log_every=3), tmp_path / 'again')
    said = capsys.readouterr().out
    assert 'reused' in said and 'computed in' in said
    assert sorted(cached.folder().rglob('*.npy')) == files and all(cached.read(file) is not None for file in files)
    for path, leaf in leaves(first).items():
        np.testing.assert_array_equal(leaf, leaves(again)[path])
    train_and_evaluate(config(cache_dtype='float16'), tmp_path / 'half')
    others = set(cached.folder().rglob('*.npy')) - set(files)
    assert {cached.read(file).dtype for file in others} == {np.dtype('float16')} and len(others) == len(files)
    np.testing.assert_allclose(figures(tmp_path / 'half'), figures(tmp_path / 'first'), rtol=2e-3)


def test_what_is_stored_is_known_by_its_content():
    """By weights, inputs and program; the same values come back, however they were made."""
    weights, x = np.arange(6, dtype=np.float32).reshape(3, 2), np.ones((4, 3), np.float32)
    mesh = mesh_lib.create_mesh(data=1)

    def asked(inputs, weights, run=lambda v, x: x @ v['w']):
        network = run_once.Network(run, {'w': weights}, cached.content_hash([weights]))
        return run_once.stored_or_run(network, mesh)(inputs)

    found, fresh = asked(x, weights)
    assert fresh and not asked(x.copy(), weights.copy())[1]
    np.testing.assert_array_equal(asked(x, weights)[0], x @ weights)
    for inputs, w, *program in (
        (2 * x, weights),
        (x[:3], weights),
        (x, weights + 1),
        (x, weights, lambda v, x: x @ v['w'] + 1),
        (x, weights, lambda v, x: (x @ v['w']).astype('float16')),
    ):
        features_of, fresh = asked(inputs, w, *program)
        assert fresh and (
            features_of.shape != found.shape or features_of.dtype != found.dtype or (features_of != found).any()
        )


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'data': {**SMALL, 'train_transform': ['flip', 'to_float']}}, "the transform flip of 'train' is random"),
        ({'model': {**MODELS['batch_norm'], 'vector_dropout': 0.5, 'dense': [8]}}, 'drops units or paths at random'),
        ({'stages': [{'name': 'probe', 'steps': 2, 'train': [['head/.*', ADAM]]}]}, 'do not see the 40 examples'),
        (
            {'objective': {'name': 'supervised', 'mixed': {'mixup': 0.2}}},
            "wants more of it than its features (KeyError: 'image')",
        ),
    ],
    ids=['random transform', 'dropout', 'short', 'mixed images'],
)
def test_what_cannot_be_cached_is_not_and_says_why(config, tmp_path, capsys, changes, reason):
    train_and_evaluate(config(**changes), tmp_path / 'run')
    said = capsys.readouterr().out
    assert 'probe: the backbone is frozen, and runs in every step: ' in said and reason in said
    assert not cached.folder().exists()


def test_a_copy_of_the_backbone_is_not_given_its_features(adaptation, tmp_path, capsys):
    """ADDA's target encoder plays the backbone's part and learns, while the backbone itself is frozen."""
    objective = {'name': 'adda', 'discriminator': {'name': 'mlp', 'dense': [8], 'num_classes': 1}}
    stages = [{'name': 'adapt', 'epochs': 1, 'train': [['(target|discriminator)/.*', ADAM]]}]
    state = train_and_evaluate(adaptation('target', objective=objective, stages=stages), tmp_path / 'run')
    assert 'the backbone is frozen, and runs in every step' in capsys.readouterr().out
    kernel = trees.flatten(state.params)
    moved = [p for p, leaf in kernel.items() if p.startswith('target/') and (leaf != kernel[f'backbone{p[6:]}']).any()]
    assert moved


def test_a_network_of_features_refuses_a_backbone():
    model = features.features_alone(Model(None, None, lambda variables, f, **_: f @ variables['params']['head']))
    head, seen = jnp.arange(6.0).reshape(3, 2), {'features': jnp.ones((4, 3))}
    outputs, moved = model.apply({'params': {'head': head}}, seen, train=True, mutable=['batch_stats'])
    np.testing.assert_allclose(outputs['logits'], np.full((4, 2), [6.0, 9.0]))
    assert moved == {}
    with pytest.raises(features.Uncached, match='another backbone'):
        model.apply({'params': {'head': head, 'backbone': {'kernel': head}}}, seen)
    with pytest.raises(features.Uncached, match='not in the features'):
        model.apply({'params': {'head': head}}, jnp.ones((4, 8, 8, 1)))


def test_a_stop_within_a_cached_stage_changes_nothing(config, tmp_path, monkeypatch):
    stages = [PROBE, {'name': 'all', 'steps': 2, 'train': [['.*', ADAM]]}]
    unbroken = leaves(train_and_evaluate(config(stages=stages), tmp_path / 'unbroken'))
    with monkeypatch.context() as patch:
        patch.setattr('tl_jax.mesh.preempted', lambda asked, step: step == 3)
        with pytest.raises(Preempted):
            train_and_evaluate(config(stages=stages), tmp_path / 'broken')
    resumed = leaves(train_and_evaluate(config(stages=stages), tmp_path / 'broken'))
    assert all((resumed[path] == leaf).all() for path, leaf in unbroken.items())


def test_eight_devices_compute_the_features_of_one(config, tmp_path):
    train_and_evaluate(config(), tmp_path / 'one')
    for file in cached.folder().rglob('*.npy'):
        file.unlink()
    train_and_evaluate(config(mesh={'data': 8}), tmp_path / 'eight')
    np.testing.assert_allclose(figures(tmp_path / 'eight'), figures(tmp_path / 'one'), rtol=1e-5)


def test_a_hash_knows_shapes_and_types():
    x = np.arange(6, dtype=np.float32)
    same = [cached.content_hash([x]), cached.content_hash([x.copy()])]
    others = [[x.reshape(2, 3)], [x.view(np.int32)], [x[:5], x[5:]], ['', x, 'a'], [x[::-1]]]
    hashes = [cached.content_hash(parts) for parts in others]
    assert same[0] == same[1] and len({same[0], *hashes}) == 1 + len(others)


def test_an_unknown_precision_is_refused(config, tmp_path):
    with pytest.raises(UserError, match='config.cache_dtype: must be float32 or float16'):
        train_and_evaluate(config(cache_dtype='int8'), tmp_path / 'other')
