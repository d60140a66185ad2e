"""What methods ask of the core: an objective a stage, further networks, streams by name, facts of the data."""

import json

import numpy as np
import pytest

from tl_jax import trees
from tl_jax.config import resolve
from tl_jax.errors import UserError
from tl_jax.experiment import build
from tl_jax.train import Preempted, train_and_evaluate

ADAM = {'name': 'adam', 'lr': 1e-2}


def summary(run):
    return json.loads((run / 'summary.json').read_text())


def test_a_missing_stream_is_named_with_what_to_add(adaptation):
    config = adaptation('target')
    del config['data']['train']['target']
    with pytest.raises(UserError, match="'dann' reads the streams source and target; .* add 'target'"):
        build(resolve(config))


def test_a_missing_network_is_named_with_what_to_add(adaptation):
    with pytest.raises(UserError, match=r"config.objective.discriminator: 'dann' needs another network; add"):
        build(resolve(adaptation('target', objective={'name': 'dann'})))


def test_class_sets_that_differ_are_named(adaptation, tmp_path):
    np.savez(tmp_path / 'more.npz', x_test=np.zeros((4, 8, 8), np.uint8), y_test=np.array([0, 1, 10, 11]))
    config = adaptation('target')
    config['data']['test'] = {'target': f'npz:{tmp_path}/more.npz/test'}
    with pytest.raises(UserError, match=r'config.data.test.target: label 11 is out of range; there are 10 classes'):
        build(resolve(config))


def test_a_stage_hands_its_roles_to_the_next_objective(adaptation, tmp_path):
    stages = [
        {
            'name': 'source',
            'steps': 6,
            'objective': {'name': 'supervised', 'stream': 'source'},
            'train': [['.*', ADAM]],
        },
        {'name': 'adapt', 'steps': 2, 'train': [['discriminator/.*', ADAM]]},
    ]
    config = adaptation('target', stages=stages)
    first = train_and_evaluate({**config, 'stages': stages[:1]}, tmp_path / 'first')
    both = train_and_evaluate(config, tmp_path / 'both')
    assert set(first.params) == {'backbone', 'head'} and set(both.params) == {'backbone', 'head', 'discriminator'}
    for path, leaf in trees.flatten(first.params).items():
        np.testing.assert_array_equal(leaf, trees.flatten(both.params)[path])
    assert int(both.step) == 8


def test_the_stored_network_is_the_adapted_one_alone(adaptation, tmp_path):
    train_and_evaluate(adaptation('target'), tmp_path / 'dann')
    source = f'{tmp_path}/dann/model.safetensors'
    config = adaptation(
        'target',
        model={'name': 'mlp', 'dense': [16], 'source': source},
        stages=[{'steps': 1, 'train': [['.*', {'name': 'sgd', 'lr': 0.0}]]}],
    )
    train_and_evaluate(config, tmp_path / 'next')
    assert (
        summary(tmp_path / 'next')['metrics']['target/accuracy']
        == summary(tmp_path / 'dann')['metrics']['target/accuracy']
    )


def test_a_target_without_a_labelled_stream_takes_its_classes_from_the_splits(adaptation):
    config = adaptation('target', objective={'name': 'shot'})
    del config['data']['train']['source']
    assert len(build(resolve(config)).data.class_names) == 10


def test_labels_that_a_method_needs_and_does_not_get_are_named(adaptation, tmp_path):
    config = adaptation('target')
    config['data']['train']['source'] = {'spec': config['data']['train']['source'], 'unlabelled': True}
    with pytest.raises(UserError, match='labels are wanted'):
        train_and_evaluate(config, tmp_path)


def test_episodes_are_asked_for_by_name(digits_config, tmp_path):
    with pytest.raises(UserError, match='learns from episodes'):
        train_and_evaluate(digits_config(objective={'name': 'protonet'}), tmp_path)


def test_only_stages_of_the_last_objective_are_selected_among(adaptation, tmp_path):
    source = {'name': 'source', 'steps': 40, 'objective': {'name': 'supervised', 'stream': 'source'}}
    stages = [
        {**source, 'train': [['.*', ADAM]]},
        {'name': 'adapt', 'steps': 40, 'train': [['.*', {'name': 'sgd', 'lr': 10.0}]]},  # ruins the network
    ]
    train_and_evaluate(adaptation('target', stages=stages, select_by='source_val/accuracy'), tmp_path)
    assert summary(tmp_path)['selected_step'] > 40


def test_more_ways_than_logits_are_refused(digits_config):
    data = {'train': {'spec': 'sklearn:digits/train', 'episodes': {'ways': 6, 'shots': 1, 'queries': 1}}}
    model = {'name': 'mlp', 'dense': [8], 'num_classes': 3}
    with pytest.raises(UserError, match='config.model.num_classes: 3, and support_label .* reaches 5'):
        build(resolve(digits_config(data=data, model=model, objective={'name': 'maml'})))


def test_episodes_larger_than_a_class_are_refused(digits_config):
    data = {'train': {'spec': 'sklearn:digits/train', 'episodes': {'ways': 5, 'shots': 60, 'queries': 5}}}
    with pytest.raises(UserError, match='class .* has .* examples'):
        build(resolve(digits_config(data=data, objective={'name': 'protonet'})))


def test_privacy_is_not_claimed_where_it_is_not_accounted(digits_config):
    private = {'name': 'private', 'clip': 1.0, 'noise_multiplier': 1.0, 'delta': 1e-5}
    data = {'train': 'sklearn:digits/train', 'poisson': 0.01}
    stage = {'steps': 2, 'train': [['.*', ADAM]]}
    for changes, message in (
        ({'gradient': {**private, 'delta': None}}, 'means nothing without δ'),
        ({'gradient': {'name': 'plain'}}, "the gradient 'plain' does not know of it"),
        ({'stages': [stage, stage]}, 'accounted over one stage'),
        ({'objective': {'name': 'supervised', 'class_weights': 'balanced'}}, 'shares of a batch'),
    ):
        with pytest.raises(UserError, match=message):
            build(resolve(digits_config(**{'data': data, 'gradient': private, 'stages': [stage], **changes})))


@pytest.mark.parametrize('method', ['shot', 'self_ensembling', 'adda'])
@pytest.mark.parametrize('stopped_at', [4, 6, 9])
def test_a_stop_within_or_between_stages_changes_nothing(adaptation, tmp_path, monkeypatch, method, stopped_at):
    """Pseudo-labels, a teacher and a copied encoder come back bit for bit, and are not made anew on resuming."""
    adapt = {
        'shot': {'name': 'shot'},
        'self_ensembling': {'name': 'self_ensembling', 'confidence': 0.0},
        'adda': {'name': 'adda', 'discriminator': {'name': 'mlp', 'dense': [8], 'num_classes': 1}},
    }[method]
    rule = {'shot': 'backbone/.*', 'self_ensembling': '.*', 'adda': '(target|discriminator)/.*'}[method]
    supervised = {'name': 'supervised', 'stream': 'source'}
    stages = [
        {'name': 'source', 'steps': 6, 'objective': supervised, 'train': [['.*', ADAM]]},
        {'name': 'adapt', 'steps': 6, 'train': [[rule, ADAM]]},
    ]
    config = adaptation('target', objective=adapt, stages=stages, refresh_every=2, eval_every=0)
    unbroken = train_and_evaluate(config, tmp_path / 'unbroken')
    with monkeypatch.context() as patch:
        patch.setattr('tl_jax.mesh.preempted', lambda asked, step: step == stopped_at)
        with pytest.raises(Preempted):
            train_and_evaluate(config, tmp_path / 'broken')
    resumed = train_and_evaluate(config, tmp_path / 'broken')
    for path, leaf in trees.flatten({'params': unbroken.params, **unbroken.collections}).items():
        there = trees.flatten({'params': resumed.params, **resumed.collections})[path]
        np.testing.assert_array_equal(leaf, there, err_msg=path)


@pytest.mark.parametrize('method', ['dann', 'mcd', 'shot'])
def test_eight_devices_give_the_losses_of_one(adaptation, tmp_path, method):
    objective = {
        'dann': {'name': 'dann', 'discriminator': {'name': 'mlp', 'dense': [8], 'num_classes': 1}},
        'mcd': {'name': 'mcd', 'repeats': 2},
        'shot': {'name': 'shot'},
    }[method]
    rule = 'backbone/.*' if method == 'shot' else '.*'
    losses = {}
    for devices in (1, 8):
        stages = [{'steps': 4, 'train': [[rule, {'name': 'sgd', 'lr': 0.1}]]}]
        config = adaptation('target', objective=objective, stages=stages, mesh={'data': devices}, log_every=1)
        train_and_evaluate(config, tmp_path / str(devices))
        lines = (tmp_path / str(devices) / 'metrics.jsonl').read_text().splitlines()
        records = [{k: v for k, v in json.loads(line).items() if k.endswith('loss')} for line in lines]
        losses[devices] = [list(record.values()) for record in records]
    assert len(losses[1]) == 5
    for one, eight in zip(losses[1], losses[8], strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-4)
