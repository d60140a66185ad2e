"""Honest selection: what chooses a checkpoint or a hyperparameter never sees a label of the target."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tl_jax.errors import UserError
from tl_jax.reverse import reverse_config
from tl_jax.selection import selection_from
from tl_jax.train import train_and_evaluate


def summary(run):
    return json.loads((run / 'summary.json').read_text())


@pytest.mark.parametrize('select_by', ['last', 'source_val/accuracy'])
def test_poisoned_target_labels_change_nothing(adaptation, tmp_path, select_by):
    for target in ('target', 'poisoned'):
        train_and_evaluate(adaptation(target, select_by=select_by), tmp_path / target)
    true, poisoned = summary(tmp_path / 'target'), summary(tmp_path / 'poisoned')
    assert true['selected_step'] == poisoned['selected_step']
    stored = [load_file(tmp_path / target / 'model.safetensors') for target in ('target', 'poisoned')]
    for name in stored[0]:
        np.testing.assert_array_equal(stored[0][name], stored[1][name])
    assert true['metrics']['source_val/accuracy'] == poisoned['metrics']['source_val/accuracy']
    # The labels did differ: only the test, which nothing looks at, can tell.
    assert true['metrics']['target/accuracy'] != poisoned['metrics']['target/accuracy']


def test_the_oracle_does_look_and_says_so(adaptation, tmp_path):
    train_and_evaluate(adaptation('target', select_by='oracle'), tmp_path / 'run')
    assert 'chosen on the test labels' in summary(tmp_path / 'run')['select_by']


def test_reverse_validation_is_blind_to_target_labels_and_tells_a_good_run_from_a_bad_one(adaptation, tmp_path):
    scores = {}
    for name, target, lr in (('good', 'target', 1e-2), ('poisoned', 'poisoned', 1e-2), ('bad', 'target', 1e-6)):
        config = adaptation(target)
        config['stages'][0]['train'][0][1]['lr'] = lr
        train_and_evaluate(config, tmp_path / name)
        stored = json.loads((tmp_path / name / 'config.json').read_text())
        turned = reverse_config(stored, tmp_path / name)
        assert turned['data']['train']['target']['unlabelled'] and turned['data']['test'] is None
        turned['stages'][0]['train'][0][1]['lr'] = 1e-2
        train_and_evaluate(turned, tmp_path / f'{name}.reverse')
        scores[name] = summary(tmp_path / f'{name}.reverse')['metrics']['source_val/accuracy']
    assert scores['good'] == scores['poisoned']
    assert scores['good'] > scores['bad'] + 0.1


def test_reverse_validation_needs_a_labelled_split_of_the_source(adaptation, tmp_path):
    config = adaptation('target')
    del config['data']['eval']
    with pytest.raises(UserError, match='source_val'):
        reverse_config(config, tmp_path)


def test_an_unknown_metric_or_split_is_named():
    with pytest.raises(UserError, match="unknown metric 'acuracy'"):
        selection_from('val/acuracy', ['val'], [])
    with pytest.raises(UserError, match="no evaluation split 'vall'"):
        selection_from('vall/accuracy', ['val'], [])


@pytest.mark.parametrize(
    ('metric', 'sign'), [('mse', -1), ('perplexity', -1), ('left/loss', -1), ('accuracy', 1), ('left/accuracy', 1)]
)
def test_which_way_a_metric_is_better(metric, sign):
    assert selection_from(f'val/{metric}', ['val'], [], metrics=None).sign == sign
