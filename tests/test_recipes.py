"""Sequences of stages by name, against their papers and sources, and a layer that freezes by itself."""

import json
import math

import jax
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import train
from tl_jax.errors import UserError
from tl_jax.experiment import build
from tl_jax.optimizers import create_schedule
from tl_jax.stages import bit_hyperrule, bit_rule, expanded
from tl_jax.train import train_and_evaluate

ADAM = {'name': 'adam', 'lr': 1e-2}
FACTS = {'layers': 3, 'num_examples': 100}


def stages_of(**section):
    return expanded([section], FACTS)


def trained(stages, digits_config):
    """For each stage its length and, `{first part of the path: learning rate}`, what it trains."""
    config = digits_config(stages=stages, model={'name': 'mlp', 'dense': [4, 4, 4]})
    experiment = build(config_lib.resolve(config))
    params, found = experiment.shapes(0)['params'], []
    for number, stage in enumerate(experiment.stages):
        schedules = experiment.partition(number, params).schedules
        found.append((stage.steps, {rule: float(schedule(0)) for rule, schedule in schedules.items()}))
    return found


HEAD, ALL = 'head/.*', 'backbone/.*'
LAYERS = [f'backbone/(dense|dense_norm){i}/.*' for i in (1, 2, 3)]


def test_lp_ft_probes_then_tunes(digits_config):
    probe = {'name': 'sgd', 'lr': 0.5}
    stages = [{'recipe': 'lp_ft', 'steps': 10, 'share': 0.3, 'probe': probe, 'optimizer': ADAM}]
    assert trained(stages, digits_config) == [
        (3, {HEAD: pytest.approx(0.5)}),
        (7, {HEAD: pytest.approx(1e-2), ALL: pytest.approx(1e-2)}),
    ]


def test_head_then_all(digits_config):
    found = trained([{'recipe': 'head_then_all', 'steps': 10, 'each': 2, 'optimizer': ADAM}], digits_config)
    assert found == [
        (2, {HEAD: pytest.approx(1e-2)}),
        (8, {HEAD: pytest.approx(5e-3), ALL: pytest.approx(5e-3)}),
    ]


def test_gradual_unfreezing_adds_a_layer_at_a_time(digits_config):
    found = trained([{'recipe': 'gradual_unfreezing', 'steps': 20, 'each': 4, 'optimizer': ADAM}], digits_config)
    rate = {HEAD: 1e-2, LAYERS[2]: 1e-2 / 2.6, LAYERS[1]: 1e-2 / 2.6**2, LAYERS[0]: 1e-2 / 2.6**3}
    assert [steps for steps, _ in found] == [4, 4, 4, 8]
    for number, (_, rates) in enumerate(found):
        assert rates == {rule: pytest.approx(rate[rule]) for rule in list(rate)[: number + 1]}


def test_chain_thaw_trains_one_at_a_time_then_all(digits_config):
    found = trained([{'recipe': 'chain_thaw', 'steps': 20, 'optimizer': ADAM}], digits_config)
    slow = pytest.approx(1e-3)
    expected = [{HEAD: pytest.approx(1e-2)}, *({rule: slow} for rule in LAYERS), {HEAD: slow, ALL: slow}]
    assert found == [(4, rates) for rates in expected]


LENGTHS = {
    'lp_ft': {'probe': ADAM, 'share': 0.3},
    'head_then_all': {'each': 1.5},
    'gradual_unfreezing': {'each': 1.25},
    'chain_thaw': {},
    'auto_freeze': {'intervals': 4},
}


@pytest.mark.parametrize('recipe', LENGTHS)
def test_a_recipe_keeps_its_length_whatever_its_parts(recipe):
    for steps in range(5, 40):
        stages = stages_of(recipe=recipe, steps=steps, optimizer=ADAM, **LENGTHS[recipe])
        assert sum(stage['steps'] for stage in stages) == steps
        assert all(isinstance(stage['steps'], int) and stage['steps'] >= 1 for stage in stages)


def test_parts_that_do_not_divide_differ_by_a_step_and_share_a_schedule():
    lengths = lambda **section: [stage['steps'] for stage in stages_of(optimizer=ADAM, **section)]
    assert lengths(recipe='auto_freeze', steps=10, intervals=4) == [2, 3, 3, 2]
    assert lengths(recipe='chain_thaw', steps=8) == [2, 1, 2, 1, 2]
    assert lengths(recipe='lp_ft', steps=5, probe=ADAM) == [2, 3]
    assert lengths(recipe='lp_ft', steps=2, probe=ADAM, share=0.9) == [1, 1]
    cosine = {'name': 'cosine', 'peak': 1.0}
    stages = stages_of(recipe='auto_freeze', steps=15, optimizer={'name': 'adam', 'lr': cosine})
    lrs = [stage['train']['optimizer']['lr'] for stage in stages]
    schedules = [create_schedule(lr, steps=stage['steps']) for lr, stage in zip(lrs, stages, strict=True)]
    rates = [float(f(s)) for f, stage in zip(schedules, stages, strict=True) for s in range(stage['steps'])]
    whole = create_schedule(cosine, steps=15)
    np.testing.assert_allclose(rates, [float(whole(step)) for step in range(15)], rtol=1e-6)


def test_a_recipe_hands_on_name_objective_and_gradient():
    own = {'objective': {'name': 'supervised', 'label_smoothing': 0.1}, 'gradient': {'name': 'plain'}}
    plain = {'steps': 1, 'train': [['.*', ADAM]]}
    stages = expanded([plain, {'recipe': 'head_then_all', 'name': 'ft', 'epochs': 3, 'optimizer': ADAM, **own}], FACTS)
    assert stages[0] == plain
    assert [stage['name'] for stage in stages[1:]] == ['ft: head', 'ft: all']
    assert [stage['epochs'] for stage in stages[1:]] == [1, 2]
    assert all({k: stage[k] for k in own} == own for stage in stages[1:])


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        ({'recipe': 'lpft'}, r"config.stages\[0\].recipe: there is no recipe 'lpft'; did you mean 'lp_ft'"),
        ({'recipe': 'lp_ft', 'steps': 4, 'optimizer': ADAM}, r'stages\[0\].probe: is required'),
        ({'recipe': 'chain_thaw', 'optimizer': ADAM}, 'give exactly one of steps, epochs, examples; has none'),
        ({'recipe': 'chain_thaw', 'optimizer': ADAM, 'steps': 4}, "steps: 4 are fewer than the recipe's 5 parts"),
        (
            {'recipe': 'auto_freeze', 'optimizer': ADAM, 'examples': 9},
            "examples: 9 are fewer than the recipe's 10 parts",
        ),
        ({'recipe': 'gradual_unfreezing', 'optimizer': ADAM, 'steps': 3}, "leaves the part 'all' no time"),
        (
            {'recipe': 'auto_freeze', 'optimizer': ADAM, 'epochs': 3, 'interval': 2},
            'interval: unknown field; did you mean',
        ),
        (
            {'recipe': 'auto_freeze', 'optimizer': ADAM, 'epochs': 3, 'percentile': 150.0},
            r'stages\[0\].percentile: must lie in 0 … 100, not 150',
        ),
        ({'recipe': 'bit_hyperrule', 'steps': 3}, 'steps: unknown field'),
    ],
)
def test_bad_recipes_are_named(section, message):
    with pytest.raises(UserError, match=message):
        stages_of(**section)


# google-research/big_transfer@140de6e, bit_hyperrule.py and bit_jax/train.py, as published values.
BIT = [
    (1, 500, 100, (200, 300, 400), 0.0),
    (19_999, 500, 100, (200, 300, 400), 0.0),
    (20_000, 10_000, 500, (3000, 6000, 9000), 0.1),
    (499_999, 10_000, 500, (3000, 6000, 9000), 0.1),
    (500_000, 20_000, 500, (6000, 12_000, 18_000), 0.1),
]


@pytest.mark.parametrize(('size', 'steps', 'warmup', 'decays', 'mixup'), BIT)
def test_the_bit_hyperrule_is_its_sources(size, steps, warmup, decays, mixup):
    rule = bit_rule(size)
    assert (rule.steps, rule.warmup, rule.decays, rule.mixup, rule.batch_size) == (steps, warmup, decays, mixup, 512)

    def source(step):
        if step < warmup:
            return 0.003 * step / warmup
        return 0.003 / 10 ** sum(s < step for s in decays)

    (stage,) = bit_hyperrule(num_examples=size)
    optimizer = stage['train']['optimizer']
    assert stage['steps'] == steps and optimizer['name'] == 'momentum' and set(optimizer) == {'name', 'lr'}
    schedule = create_schedule(optimizer['lr'], steps=steps)
    near = {s + d for s in (0, warmup, *decays, steps - 2) for d in (-1, 0, 1) if s + d >= 0}
    for step in sorted({*near, *range(0, steps, 97)}):
        assert float(schedule(step)) == pytest.approx(source(step), rel=1e-5, abs=1e-9), step


@pytest.mark.parametrize(
    ('height', 'width', 'sides'),
    [(32, 32, (160, 128)), (96, 95, (160, 128)), (96, 96, (512, 480)), (1, 9216, (512, 480)), (224, 224, (512, 480))],
)
def test_the_bit_hyperrules_resolution(height, width, sides):
    assert bit_rule(50_000, height, width)[:2] == sides


def test_layers_freeze_where_their_gradients_stop_changing(digits_config, tmp_path, monkeypatch):
    """And a run that is killed after something froze, in the last interval, finds it frozen again."""
    cosine = {'name': 'adam', 'lr': {'name': 'cosine', 'peak': 3e-2}}
    section = {'recipe': 'auto_freeze', 'steps': 16, 'intervals': 4, 'optimizer': cosine, 'percentile': 75}
    config = digits_config(
        stages=[section], model={'name': 'mlp', 'dense': [4, 4, 4]}, checkpoint_every=1, eval_every=50
    )
    whole = train_and_evaluate(config, tmp_path / 'whole')
    stages = json.loads((tmp_path / 'whole' / 'summary.json').read_text())['stages']
    records = [json.loads(line) for line in (tmp_path / 'whole' / 'metrics.jsonl').read_text().splitlines()]
    sizes = [found for r in records if (found := {k[9:]: v for k, v in r.items() if k.startswith('gradient/')})]
    first = 0
    for number, stage in enumerate(stages):
        assert set(stage['train']) == {HEAD, *LAYERS[first:]} and set(sizes[number]) == set(LAYERS[first:])
        if 0 < number < len(stages) - 1:
            before, now = (np.array([sizes[n][rule] for rule in LAYERS[first:]]) for n in (number - 1, number))
            change = abs(before - now) / before
            first += next(i for i, x in enumerate(change) if x >= np.percentile(change, 75))
    assert first > 0, 'nothing froze'
    peak = lambda step: 3e-2 * (1 + math.cos(math.pi * step / 16)) / 2
    rates = {r['step']: r[f'lr/{HEAD}'] for r in records if f'lr/{HEAD}' in r}
    assert rates == {step: pytest.approx(peak(step - 1), rel=1e-5) for step in rates}

    show = train.Progress.show

    def killed(self, step, values, **options):
        if step >= 14:
            raise KeyboardInterrupt
        show(self, step, values, **options)

    monkeypatch.setattr(train.Progress, 'show', killed)
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(config, tmp_path / 'cut')
    monkeypatch.setattr(train.Progress, 'show', show)
    resumed = train_and_evaluate(config, tmp_path / 'cut')
    assert int(resumed.step) == 16
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
