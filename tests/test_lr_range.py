"""The range test: rates in their ratios, suggestions read from a known curve, and a whole run of it."""

import json
import os

import jax
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import lr_range as lr_range_lib
from tl_jax.errors import UserError
from tl_jax.lr_range import SMOOTHING, judged, lr_range, ranged
from tl_jax.optimizers import create_schedule


def test_rules_keep_the_ratios_of_their_rates():
    cosine = {'name': 'cosine', 'peak': 1e-3, 'warmup': 5}
    rules = [('a', {'name': 'sgd', 'lr': 0.01}), ('b', {'name': 'adam', 'lr': cosine}), ('c', None)]
    grown = ranged(rules, 1e-4, 1.0)
    rates = [create_schedule(spec['lr'], steps=8) for _, spec in grown[:2]]
    assert grown[2] == ('c', None)
    for step in range(9):
        assert float(rates[0](step)) == pytest.approx(1e-4 * 10 ** (step / 2), rel=1e-5)
        assert float(rates[1](step)) == pytest.approx(float(rates[0](step)) / 10, rel=1e-5)


def test_suggestions_of_a_known_curve():
    """Falls most steeply at 1e-2 and is lowest at 1."""
    rates = np.logspace(-6, 1, 400)
    away = np.log10(rates)
    losses = 2.3 - 2 / (1 + np.exp(-4 * (away + 2))) + np.where(away > 0, 8 * away, 0)
    found = judged(rates, losses)
    late = 10 ** (7 / 400 / (1 - SMOOTHING))  # what averaging over the steps before delays it by, at most
    assert 1e-2 <= found.steepest <= 1e-2 * late and 0.1 <= found.tenth <= 0.1 * late
    biased = sum((1 - SMOOTHING) * SMOOTHING ** (9 - i) * losses[i] for i in range(10)) / (1 - SMOOTHING**10)
    assert found.smooth[9] == pytest.approx(biased)


@pytest.mark.parametrize('process', [0, 1])
def test_its_files_are_the_first_processs_and_appear_whole(digits_config, tmp_path, monkeypatch, process):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, 'replace', lambda start, end: moved.append(end.name) or replace(start, end))
    monkeypatch.setattr(lr_range_lib, 'losses_of', lambda experiment: [2.0, 1.0, 0.5, 3.0])
    monkeypatch.setattr(jax, 'process_index', lambda: process)
    lr_range(config_lib.resolve(digits_config(model={'name': 'mlp', 'dense': [16]})), tmp_path / 'run')
    assert moved == (['lr_range.json', 'lr_range.png'] if process == 0 else [])
    assert (tmp_path / 'run').exists() == (process == 0)


def test_a_run_of_it_leaves_two_files_and_no_more(digits_config, tmp_path):
    stages = [
        {'recipe': 'lp_ft', 'steps': 10, 'probe': {'name': 'sgd', 'lr': 1.0}, 'optimizer': {'name': 'sgd', 'lr': 1}}
    ]
    config = digits_config(stages=stages, model={'name': 'mlp', 'dense': [16]})
    found = lr_range(config_lib.resolve(config), tmp_path, low=1e-4, high=1e4, steps=80)
    assert {p.name for p in tmp_path.iterdir()} == {'lr_range.json', 'lr_range.png'}
    stored = json.loads((tmp_path / 'lr_range.json').read_text())
    assert stored['rates'][0] == pytest.approx(1e-4) and len(stored['rates']) == len(stored['losses']) < 80
    assert found.losses[-1] > 4 * min(found.losses), 'it stops where the loss explodes'
    assert 5e-4 < found.steepest <= 10 * found.tenth < found.rates[-1]
    for optimizer, message in (({'name': 'sgd', 'lr': 0.0}, 'above 0'), ({'name': 'sgd'}, 'lr: is required')):
        bad = config_lib.resolve({**config, 'stages': [{'steps': 5, 'train': [('head/.*', optimizer)]}]})
        with pytest.raises(UserError, match=message):
            lr_range(bad, tmp_path)
    with pytest.raises(UserError, match='config.batch_size: 10 examples cannot be split over 4'):
        lr_range(config_lib.resolve({**config, 'batch_size': 10, 'mesh': {'data': 4}}), tmp_path)
    with pytest.raises(UserError, match='--range: must be two rates, the lower one first'):
        lr_range(config_lib.resolve(config), tmp_path, low=1.0, high=0.1)
