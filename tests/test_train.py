"""The loop on embedded real data: stages, freezing, averages, selection, early stopping, the NaN guard."""

import json

import jax
import numpy as np
import pytest

from tl_jax.config import resolve
from tl_jax.errors import UserError
from tl_jax.experiment import build
from tl_jax.train import train_and_evaluate

ADAMW = {'name': 'adamw', 'lr': 1e-2, 'weight_decay': 0.1}


def records(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


def test_frozen_leaves_and_statistics_are_bit_equal_after_adamw_with_decay(digits_config, tmp_path):
    config = digits_config(
        model={'name': 'convnet', 'widths': [8, 16], 'norm': 'batch'},
        stages=[{'steps': 5, 'train': [['head/.*', ADAMW]]}],
    )
    experiment = build(resolve(config))
    start = experiment.stages[0].init(jax.random.key(0), experiment.batch)
    state = train_and_evaluate(config, tmp_path)
    assert equal(state.params['backbone'], start['params']['backbone'])
    assert equal(state.collections['batch_stats'], start['batch_stats'])
    assert not equal(state.params['head'], start['params']['head'])
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert held == 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state.params['head']))


def test_statistics_of_trained_layers_move_and_only_theirs(digits_config, tmp_path):
    rules = [['backbone/norm2/.*', ADAMW], ['head/.*', ADAMW]]
    config = digits_config(
        model={'name': 'convnet', 'widths': [8, 16], 'norm': 'batch'}, stages=[{'steps': 2, 'train': rules}]
    )
    state = train_and_evaluate(config, tmp_path)
    stats = state.collections['batch_stats']['backbone']
    assert (np.asarray(stats['norm1']['mean']) == 0).all() and (np.asarray(stats['norm1']['var']) == 1).all()
    assert (np.asarray(stats['norm2']['mean']) != 0).any()
    assert set(stats['norm1']) == {'mean', 'var'}  # no marker is left behind


def test_stages_follow_each_other_and_a_probe_leaves_the_backbone_to_the_second(digits_config, tmp_path):
    sgd = {'name': 'sgd', 'lr': 0.1}
    config = digits_config(
        stages=[
            {'name': 'probe', 'steps': 4, 'train': [['head/.*', sgd]]},
            {'name': 'full', 'examples': 32, 'train': [['head/.*', sgd], ['backbone/.*', dict(sgd, lr=0.01)]]},
        ]
    )
    state = train_and_evaluate(config, tmp_path)
    assert int(state.step) == 4 + 32 // 16
    assert [r['stage'] for r in records(tmp_path) if 'val/loss' in r] == [0, 1]
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert (
        summary['parameters']['trainable'][1] == summary['parameters']['total'] > summary['parameters']['trainable'][0]
    )
    last = [r for r in records(tmp_path) if 'train/loss' in r][-1]
    assert last['lr/head/.*'] == pytest.approx(0.1) and last['lr/backbone/.*'] == pytest.approx(0.01)


def test_gradient_norm_is_blind_to_frozen_leaves(digits_config, tmp_path):
    def first_norm(name, train):
        config = digits_config(stages=[{'steps': 1, 'train': train}])
        train_and_evaluate(config, tmp_path / name)
        return records(tmp_path / name)[0]['train/grad_norm']

    sgd = {'name': 'sgd', 'lr': 0.0}
    head = first_norm('head', [['head/.*', sgd]])
    backbone = first_norm('backbone', [['backbone/.*', sgd]])
    both = first_norm('both', [['.*', sgd]])
    assert both == pytest.approx(np.hypot(head, backbone), rel=1e-5) and head < both


def test_clip_bounds_the_update(digits_config, tmp_path):
    config = digits_config(stages=[{'steps': 1, 'train': [['.*', {'name': 'sgd', 'lr': 1.0}]]}], clip_norm=0.01)
    experiment = build(resolve(config))
    start = experiment.stages[0].init(jax.random.key(0), experiment.batch)['params']
    state = train_and_evaluate(config, tmp_path)
    moved = jax.tree.map(
        lambda a, b: np.sum((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2), state.params, start
    )
    assert np.sqrt(sum(jax.tree.leaves(moved))) == pytest.approx(0.01, rel=1e-3)


def test_ema_is_its_recurrence_and_evaluation_uses_it(digits_config, tmp_path):
    decay, losses = 0.5, {}
    sgd = {'name': 'sgd', 'lr': 0.5}
    trajectory = []
    for steps in (1, 2, 3):
        config = digits_config(stages=[{'steps': steps, 'train': [['.*', sgd]]}], ema=decay)
        state = train_and_evaluate(config, tmp_path / str(steps))
        trajectory.append(state)
        losses[steps] = json.loads((tmp_path / str(steps) / 'summary.json').read_text())['metrics']['val/loss']
    experiment = build(resolve(config))
    mean = experiment.stages[0].init(jax.random.key(0), experiment.batch)['params']
    for state in trajectory:
        mean = jax.tree.map(lambda m, p: decay * m + (1 - decay) * p, mean, state.params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), state.collections['ema'], mean
        )
    plain = train_and_evaluate(digits_config(stages=[{'steps': 3, 'train': [['.*', sgd]]}]), tmp_path / 'plain')
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain.params, trajectory[-1].params
    )
    assert losses[3] != json.loads((tmp_path / 'plain/summary.json').read_text())['metrics']['val/loss']


def test_accumulation_takes_the_step_of_the_whole_batch(digits_config, tmp_path):
    sgd = [{'steps': 2, 'train': [['.*', {'name': 'sgd', 'lr': 0.1}]]}]
    whole = train_and_evaluate(digits_config(stages=sgd), tmp_path / 'whole')
    parts = train_and_evaluate(
        digits_config(stages=sgd, gradient={'name': 'accumulated', 'parts': 4}), tmp_path / 'parts'
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole.params, parts.params)


def test_best_checkpoint_is_returned_and_reported(digits_config, tmp_path):
    # A step size that ruins what the first two steps learned.
    rules = [['.*', {'name': 'sgd', 'lr': {'name': 'step', 'peak': 0.05, 'at': [2], 'factor': 400.0}}]]
    config = digits_config(stages=[{'steps': 4, 'train': rules}], eval_every=1, select_by='val/loss', keep=1)
    state = train_and_evaluate(config, tmp_path)
    losses = {r['step']: r['val/loss'] for r in records(tmp_path) if 'val/loss' in r}
    best = min(losses, key=losses.get)
    assert int(state.step) == best < 4
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['selected_step'] == best and summary['select_by'] == 'val/loss'
    assert summary['metrics']['val/loss'] == pytest.approx(losses[best], rel=1e-6)
    kept = {int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()}
    assert kept == {best, 4}


def test_patience_ends_a_stage_and_the_next_begins(digits_config, tmp_path):
    still = {'name': 'sgd', 'lr': 0.0}
    config = digits_config(
        stages=[{'steps': 50, 'train': [['.*', still]]}, {'steps': 1, 'train': [['.*', still]]}],
        eval_every=1,
        select_by='val',
        patience=2,
    )
    train_and_evaluate(config, tmp_path)
    assert [(r['stage'], r['step']) for r in records(tmp_path) if 'val/loss' in r] == [(0, 1), (0, 2), (0, 3), (1, 4)]


def test_divergence_stops_with_step_examples_and_leaf_and_keeps_the_last_good_checkpoint(digits_config, tmp_path):
    rules = [['.*', {'name': 'sgd', 'lr': {'name': 'step', 'peak': 1e-3, 'at': [4], 'factor': 1e38}}]]
    config = digits_config(stages=[{'steps': 20, 'train': rules}], checkpoint_every=2, log_every=7)
    with pytest.raises(
        UserError, match=r"step \d+: train/\w+ is (nan|inf), first in the gradient of '(backbone|head)/.*'.*"
    ):
        train_and_evaluate(config, tmp_path)
    kept = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit())
    assert kept[-1] <= 6


def test_nan_in_the_data_names_the_example(digits_config, tmp_path):
    images = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    images[17, 3] = np.inf
    np.savez(tmp_path / 'bad.npz', x_train=images, y_train=np.arange(64) % 4)
    config = digits_config(
        model={'name': 'mlp', 'dense': [8]}, data={'train': f'npz:{tmp_path}/bad.npz/train'}, stages=[
            {'epochs': 2, 'train': [['.*', {'name': 'sgd', 'lr': 0.1}]]}
        ],
    )  # fmt: skip
    with pytest.raises(UserError, match=r'(example 17|row 17|\b17\b)'):
        train_and_evaluate(config, tmp_path / 'run')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'select_by': 'test'}, "no evaluation split 'test'; did you mean 'last'"),
        ({'select_by': 'val/acuracy'}, "unknown metric 'acuracy'; did you mean 'accuracy'"),
        ({'patience': 3}, "config.patience: waits for a better config.select_by, and that is 'last'"),
        (
            {'stages': [{'steps': 1, 'train': [['hed/.*', ADAMW]]}]},
            r'stages\[0\].train\[0\]: the rule .* matches no leaf',
        ),
        ({'stages': [{'steps': 1, 'epochs': 1, 'train': [['.*', ADAMW]]}]}, 'exactly one of steps, epochs, examples'),
        (
            {'stages': [{'step': 1, 'train': [['.*', ADAMW]]}]},
            "stages\\[0\\].step: unknown field; did you mean 'steps'",
        ),
        ({'model': {'name': 'convnot'}}, "did you mean 'convnet'"),
        ({'model': {'name': 'convnet', 'width': 3}}, "did you mean 'widths'"),
        ({'model': {'name': 'convnet', 'source': 'nowhere.pth'}}, 'nowhere.pth'),
        ({'objective': {'name': 'supervised', 'label_smooth': 0.1}}, "did you mean 'label_smoothing'"),
        ({'objective': {'name': 'superwised'}}, "did you mean 'supervised'"),
        ({'gradient': {'name': 'accumulate'}}, "did you mean 'accumulated'"),
        ({'mesh': {'data': 64}}, 'needs 64 devices'),
        ({'batch_size': 17, 'mesh': {'data': 8}}, 'config.batch_size: 17 examples cannot be split over 8'),
        ({'data': {'train': 'sklearn:digit/train'}}, "did you mean 'digits'"),
        (
            {'data': {'train': 'sklearn:digits/train', 'evaluate': 'x'}},
            "config.data.evaluate: unknown field; did you mean 'eval'",
        ),
        ({'sharding': [['nothing', 'fsdp']]}, 'config.sharding'),
        ({'dtype': 'float33'}, 'config.dtype'),
    ],
)
def test_bad_configs_are_one_line_and_leave_nothing_behind(digits_config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train_and_evaluate(digits_config(**changes), tmp_path / 'run')
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'run').exists()


def test_another_configs_workdir_is_refused(digits_config, tmp_path):
    train_and_evaluate(digits_config(stages=[{'steps': 1, 'train': [['.*', ADAMW]]}]), tmp_path / 'run')
    with pytest.raises(UserError, match=r'another config \(config.seed is 0 there and 1 here\)'):
        train_and_evaluate(digits_config(stages=[{'steps': 1, 'train': [['.*', ADAMW]]}], seed=1), tmp_path / 'run')
    (tmp_path / 'stray').mkdir()
    (tmp_path / 'stray' / 'thesis.tex').write_text('')
    with pytest.raises(UserError, match='is not empty and holds no run'):
        train_and_evaluate(digits_config(), tmp_path / 'stray')


def test_mixing_and_class_weights_train(digits_config, tmp_path):
    config = digits_config(
        objective={
            'name': 'supervised',
            'label_smoothing': 0.1,
            'class_weights': 'balanced',
            'mixed': {'mixup': 0.2, 'cutmix': 1.0},
        },
        stages=[{'steps': 3, 'train': [['.*', ADAMW]]}],
    )
    train_and_evaluate(config, tmp_path)
    assert np.isfinite(records(tmp_path)[-1]['val/loss'])


def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_and_statistics_in_float32(digits_config, tmp_path):
    config = digits_config(
        model={'name': 'convnet', 'widths': [8, 16], 'norm': 'batch'},
        stages=[{'steps': 20, 'train': [['.*', {'name': 'adam', 'lr': 1e-2}]]}],
    )
    state = train_and_evaluate({**config, 'dtype': 'bfloat16'}, tmp_path / 'half')
    train_and_evaluate(config, tmp_path / 'full')
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.collections))} == {'float32'}
    half, full = (
        np.array([r['train/loss'] for r in records(tmp_path / name) if 'train/loss' in r]) for name in ('half', 'full')
    )
    assert (half != full).any()
    np.testing.assert_allclose(half, full, rtol=0.1)


@pytest.mark.parametrize('width', [1, 5, 1000])
def test_refuses_another_number_of_logits_than_there_are_classes(width, digits_config):
    config = digits_config(model={'name': 'convnet', 'widths': [4], 'num_classes': width})
    with pytest.raises(UserError, match=rf'config.model.num_classes: {width}, and the data have 10 classes'):
        build(resolve(config))
