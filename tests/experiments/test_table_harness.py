import json
import math
import os
import statistics
import types

import pytest

from experiments import collect, run
from experiments.table import REVERSE, Cell, Mean, checked, config_of, fingerprint, load_table, seeds_from
from tl_jax import reverse
from tl_jax.errors import UserError
from tl_jax.report.table_page import format_paper_table

CONFIG = """
import ml_collections
def get_config(arg='plain'):
    c = ml_collections.ConfigDict()
    c.name = arg
    c.model = dict(name='mlp', dense=[8], source=None)
    c.data = dict(train='sklearn:digits/train', eval=dict(source_val='sklearn:digits/val'), test='sklearn:digits/test')
    c.objective = dict(name='supervised', label_smoothing=0.0)
    c.stages = [dict(name=n, epochs=3, train=[('.*', dict(name='sgd', lr=0.1))]) for n in ('one', 'two')]
    return c
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'tiny.py').write_text(CONFIG)
    return 'tiny.py'


class Trainer:
    """Writes the files of a run whose figures follow from its config; remembers what it was asked to train."""

    def __init__(self):
        self.runs, self.failing = [], set()

    def __call__(self, config, path):
        label = f'{path.parent.name}/{path.name}'
        if label in self.failing:
            raise UserError('config.model: no such weights')
        self.runs.append((str(path), config))
        path.mkdir(parents=True, exist_ok=True)
        (path / 'config.json').write_text(json.dumps(config))
        (path / 'model.safetensors').write_bytes(b'model')
        smoothing, seed = config['objective']['label_smoothing'], config['seed']
        accuracy = 0.7 + 0.01 * seed + smoothing * (1 - smoothing) + 0.05 * bool(config['model']['source'])
        metrics = {
            'test/accuracy': accuracy,
            'source_val/accuracy': 0.9 - smoothing / 10,
            'source_val/loss': 1 - smoothing,
            'test/mse': math.exp(-seed),
        }
        records = [{'step': step, 'stage': 0, 'privacy/epsilon': step / 100} for step in (10, 20, 30)]
        (path / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
        summary = {'select_by': config['select_by'], 'selected_step': 30, 'steps': 30, 'metrics': metrics}
        about = {
            'seconds': 1.25,
            'commit': f'c{seed}',
            'started': '2026-11-21T07:00:00',
            'device': 'cpu',
            'versions': {},
        }
        (path / 'summary.json').write_text(json.dumps({**summary, **about}))


def table_of(cells, **declared):
    return checked('demo', {'CELLS': cells, 'METRIC': 'test/accuracy', 'SEEDS': 2, 'SELECTION': '', **declared})


def bench_of(tmp_path, table, *, quick=False):
    return run.Bench(table, tmp_path / 'runs', tmp_path / 'results', quick, Trainer())


def drawn_of(bench, seeds=(0, 1)):
    found, refused = collect.current_results(bench.table, bench.results, quick=bench.quick)
    return collect.paper_table(bench.table, found, seeds=seeds, notes=refused, quick=bench.quick)


def test_runs_what_is_missing_once_and_writes_one_json_a_run(tmp_path, config_file):
    bench = bench_of(tmp_path, table_of([Cell('source', 'M>U', config_file, published=71.0, tolerance=2.0)]))
    assert run.run_cells(bench, ['source/M>U'], (0, 1)) == []
    assert run.run_cells(bench, ['source/M>U'], (0, 1)) == []
    assert [path for path, _ in bench.train.runs] == [str(tmp_path / f'runs/source.M-U/seed{s}') for s in (0, 1)]
    stored = json.loads((tmp_path / 'results/source.M-U/seed1.json').read_text())
    assert stored['metrics']['test/accuracy'] == pytest.approx(0.71)
    assert stored['seed'] == 1 and stored['commit'] == 'c1' and stored['machine'] == 'cpu' and not stored['quick']
    assert stored['selection']['checkpoint'] == 'last' and stored['steps'] == 30
    assert stored['command'] == "python -m experiments.run demo --only='source/M>U' --seeds=1,"
    line = drawn_of(bench).lines[0]
    assert line.mean == pytest.approx(70.5) and line.std == pytest.approx(statistics.stdev([70, 71]))
    assert line.reproduced and line.commits == ('c0', 'c1') and line.missing == ()


def test_an_interrupted_run_is_resumed_and_a_finished_directory_only_read(tmp_path, config_file):
    bench = bench_of(tmp_path, table_of([Cell('a', 'x', config_file)]))
    config = config_of(bench.table, bench.table.cells['a/x'], 0)
    half = tmp_path / 'runs/a.x/seed0'
    half.mkdir(parents=True)
    (half / 'config.json').write_text(json.dumps(config))  # claimed, no summary: killed
    bench.train(config, tmp_path / 'runs/a.x/seed1')
    (tmp_path / 'runs/a.x/seed1/config.json').write_text(json.dumps({**config, 'seed': 1}))
    bench.train.runs.clear()
    run.run_cells(bench, ['a/x'], (0, 1))
    assert [path for path, _ in bench.train.runs] == [str(half)]
    assert (tmp_path / 'results/a.x/seed1.json').is_file()


def test_one_failure_is_reported_and_the_others_run(tmp_path, config_file):
    cells = [
        Cell('a', 'x', config_file),
        Cell('b', 'x', config_file, after='a/x'),
        Cell('c', 'x', f'{config_file}:c', {'batch_size': 7}),
    ]
    bench = bench_of(tmp_path, table_of(cells))
    bench.train.failing.add('a.x/seed0')
    failed = run.run_cells(bench, list(bench.table.cells), (0,))
    assert len(failed) == 2 and all('no such weights' in line for line in failed)
    assert failed[0].startswith('FAILED a/x, seed 0') and failed[1].startswith('FAILED b/x, seed 0')
    assert (tmp_path / 'results/c.x/seed0.json').is_file()
    text = run.publish(bench, (0,), failed)
    assert 'no such weights' in text and 'missing' in text
    assert 'no such weights' not in (tmp_path / 'results/table.md').read_text()  # made from the JSON alone


def test_the_chosen_candidate_is_trained_again_by_the_refit_config(tmp_path, config_file):
    candidates = [{'objective.label_smoothing': x} for x in (0.1, 0.3)]
    cell = Cell('a', 'x', config_file, candidates=candidates, refit=f'{config_file}:whole')
    bench = bench_of(tmp_path, table_of([cell], SELECTION='source_val/accuracy'))
    assert run.run_cells(bench, ['a/x'], (0,)) == []
    *tried, (path, config) = bench.train.runs
    assert [c['select_by'] for _, c in tried] == ['source_val/accuracy'] * 2
    assert path == str(tmp_path / 'runs/a.x/seed0/refit') and config['select_by'] == 'last'
    assert (
        config['name'] == 'whole' and config['objective']['label_smoothing'] == 0.1
    )  # 0.89 on source_val, against 0.87
    stored = json.loads((tmp_path / 'results/a.x/seed0.json').read_text())
    assert stored['metrics']['test/accuracy'] == pytest.approx(0.7 + 0.1 * 0.9)
    assert stored['selection']['candidate'] == 'objective.label_smoothing=0.1'
    assert stored['selection']['checkpoint'] == 'last' and len(stored['selection']['scores']) == 2
    assert run.run_cells(bench, ['a/x'], (0,)) == [] and len(bench.train.runs) == 3
    assert fingerprint(bench.table, cell._replace(metric='test/accuracy', refit=''), 0) != stored['config_sha256']
    with pytest.raises(UserError, match="'a/x': refit is of a chosen candidate; give candidates"):
        table_of([cell._replace(candidates=())])


def test_cells_that_follow_share_their_base(tmp_path, config_file):
    cells = [
        Cell('source', 'x', config_file),
        *(Cell(m, 'x', config_file, {'name': m}, after='source/x') for m in 'pq'),
    ]
    bench = bench_of(tmp_path, table_of([*cells[:2], cells[2]._replace(overrides={'batch_size': 8})]))
    run.run_cells(bench, ['p/x', 'q/x'], (1,))
    trained = dict(bench.train.runs)
    assert len(bench.train.runs) == 3 and set(trained) == {
        str(tmp_path / f'runs/{c}.x/seed1') for c in ('source', 'p', 'q')
    }
    source = trained[str(tmp_path / 'runs/p.x/seed1')]['model']['source']
    assert (tmp_path / source).resolve() == tmp_path / 'runs/source.x/seed1/model.safetensors'
    assert (tmp_path / 'results/source.x/seed1.json').is_file()


def test_cells_of_one_config_and_different_metrics_share_their_run(tmp_path, config_file):
    cells = [
        Cell('DP-SGD', 'accuracy', config_file),
        Cell('DP-SGD', 'epsilon, epoch 1', config_file, metric='privacy/epsilon@10', unit='epsilon'),
        Cell('DP-SGD', 'epsilon', config_file, metric='privacy/epsilon', unit='epsilon'),
        Cell('DP-SGD', 'time', config_file, metric='seconds', unit='s'),
    ]
    bench = bench_of(tmp_path, table_of(cells))
    assert run.run_cells(bench, list(bench.table.cells), (0,)) == [] and len(bench.train.runs) == 1
    assert [line.values[0] for line in drawn_of(bench).lines] == pytest.approx([70, 0.1, 0.3, 1.25])


CANDIDATES = [{'objective.label_smoothing': w} for w in (0.0, 0.5, 0.9)]


@pytest.mark.parametrize(
    'rule, best, scores',
    [
        ('source_val/accuracy', 0.0, [0.9, 0.85, 0.81]),
        ('source_val/loss', 0.9, [-1.0, -0.5, -0.1]),
        ('oracle', 0.5, [0.7, 0.95, 0.79]),
    ],
)
def test_a_candidate_is_chosen_by_the_declared_rule(tmp_path, config_file, rule, best, scores):
    table = table_of([Cell('DANN', 'B>D', config_file, candidates=CANDIDATES)], SELECTION=rule)
    bench = bench_of(tmp_path, table)
    run.run_cells(bench, ['DANN/B>D'], (0,))
    stored = json.loads((tmp_path / 'results/DANN.B-D/seed0.json').read_text())
    assert stored['selection']['candidate'] == f'objective.label_smoothing={best}'
    assert list(stored['selection']['scores'].values()) == pytest.approx(scores)
    assert stored['metrics']['test/accuracy'] == pytest.approx(0.7 + best * (1 - best))
    assert drawn_of(bench).lines[0].selections == (f'{rule} among 3',)


def test_reverse_validation_trains_on_own_labels_and_scores_on_the_source(tmp_path, config_file, monkeypatch):
    asked = []

    def reverse_config(config, directory):
        asked.append(directory.name)
        smoothing = config['objective']['label_smoothing']
        return {**config, 'objective': {**config['objective'], 'label_smoothing': 1 - abs(smoothing - 0.5)}}

    monkeypatch.setattr(reverse, 'reverse_config', reverse_config)
    table = table_of([Cell('DANN', 'B>D', config_file, candidates=CANDIDATES)], SELECTION=REVERSE)
    bench = bench_of(tmp_path, table)
    assert run.run_cells(bench, ['DANN/B>D'], (0,)) == []
    stored = json.loads((tmp_path / 'results/DANN.B-D/seed0.json').read_text())
    # The reverse runs have label smoothing 0.5, 1 and 0.6, and source accuracies 0.9 - smoothing / 10.
    assert list(stored['selection']['scores'].values()) == pytest.approx([0.85, 0.8, 0.84])
    assert stored['selection']['candidate'] == 'objective.label_smoothing=0.0' and len(asked) == 3
    assert drawn_of(bench).lines[0].selections == ('reverse validation among 3, checkpoint: last',)
    assert len(bench.train.runs) == 6
    run.run_cells(bench._replace(results=tmp_path / 'elsewhere'), ['DANN/B>D'], (0,))
    assert len(bench.train.runs) == 6


def test_results_of_another_config_are_listed_and_not_counted(tmp_path, config_file):
    bench = bench_of(tmp_path, table_of([Cell('a', 'x', config_file)]))
    run.run_cells(bench, ['a/x'], (0, 1))
    changed = bench._replace(table=table_of([Cell('a', 'x', config_file, {'stages[1].train[0][1].lr': 0.2})]))
    paper = drawn_of(changed)
    assert not paper.lines[0].values and paper.lines[0].missing == (0, 1)
    assert len(paper.notes) == 2 and 'another config' in paper.notes[0] and 'a.x/seed0.json' in paper.notes[0]
    failed = run.run_cells(changed, ['a/x'], (0,))  # the run's directory still holds the other config
    assert len(failed) == 1 and 'another config' in failed[0] and 'config.stages[1].train' in failed[0]
    renamed = bench._replace(table=table_of([Cell('b', 'x', config_file)]))
    assert 'belongs to no cell' in drawn_of(renamed).notes[0]


def test_a_fingerprint_covers_the_base_and_ignores_names_and_places(tmp_path, config_file):
    base, other = Cell('s', 'x', config_file), Cell('s', 'x', config_file, {'batch_size': 9})
    follower = Cell('t', 'x', config_file, after='s/x')
    prints = [fingerprint(table_of([b, follower]), follower, 0) for b in (base, base, other)]
    assert prints[0] == prints[1] != prints[2]
    named = Cell('s', 'x', config_file, {'name': 'other words', 'log_every': 10})  # a name, and a default
    table = table_of([base])
    assert fingerprint(table, base, 0) == fingerprint(table, named, 0) != fingerprint(table, base, 1)
    assert fingerprint(table, base, 0, quick=True) != fingerprint(table, base, 0)


def test_one_model_may_teach_every_seed_in_a_field_of_its_own(tmp_path, config_file):
    cells = [
        Cell('s', 'x', config_file),
        Cell('t', 'x', config_file, {'batch_size': 9}, after='s/x', into='objective.name', after_seed=0),
    ]
    bench = bench_of(tmp_path, table_of(cells))
    assert run.run_cells(bench, ['t/x'], (1, 2)) == []
    (first, _), *taught = bench.train.runs
    assert first == str(tmp_path / 'runs/s.x/seed0') and len(taught) == 2
    for path, config in taught:
        assert os.path.abspath(config['objective']['name']) == f'{first}/model.safetensors', path
        assert config['model']['source'] is None


def test_quick_is_tiny_and_never_mixes_with_results(tmp_path, config_file):
    table = table_of([Cell('a', 'x', config_file)])
    quick = bench_of(tmp_path, table, quick=True)
    run.run_cells(quick, ['a/x'], (0,))
    assert [set(stage) & {'steps', 'epochs'} for stage in quick.train.runs[0][1]['stages']] == [{'steps'}] * 2
    assert quick.train.runs[0][1]['stages'][1]['steps'] == 2
    assert drawn_of(quick, (0,)).lines[0].values and drawn_of(quick).title.startswith('QUICK')
    paper = drawn_of(quick._replace(quick=False))
    assert not paper.lines[0].values and 'made with --quick' in paper.notes[0]


def test_overrides_may_depend_on_the_seed_and_selection_sets_the_checkpoint(config_file):
    cell = Cell('a', 'x', config_file, lambda seed: {'data.seed': seed + 100})
    table = table_of([cell], SELECTION='source_val/accuracy')
    config = config_of(table, cell, 3)
    assert config['data']['seed'] == 103 and config['seed'] == 3 and config['select_by'] == 'source_val/accuracy'
    assert config_of(table, cell, 3)['stages'][0]['epochs'] == 3


def test_means_are_taken_seed_by_seed_over_seeds_that_all_have(tmp_path, config_file):
    cells = [Cell('m', 'x', config_file), Cell('m', 'y', config_file, {'objective.label_smoothing': 0.2})]
    table = table_of(cells, MEANS=[Mean('m', of='m/*', published=78.0, tolerance=1.0)], SEEDS=3)
    bench = bench_of(tmp_path, table)
    run.run_cells(bench, ['m/x'], (0, 1, 2))
    run.run_cells(bench, ['m/y'], (0, 2))
    mean = drawn_of(bench, (0, 1, 2)).lines[-1]
    assert mean.name == 'm/mean' and mean.missing == (1,)
    assert mean.values == pytest.approx({0: (70 + 86) / 2, 2: (72 + 88) / 2})
    assert mean.reproduced  # 79 against 78 ± 1


def test_relations_are_checked_for_each_column(tmp_path, config_file):
    smooth = lambda w: {'objective.label_smoothing': w}
    cells = [
        Cell('DANN', 'x', config_file, smooth(0.2)),
        Cell('DANN', 'y', config_file, smooth(0.0)),
        Cell('source', 'x', config_file),
        Cell('source', 'y', config_file, smooth(0.1)),
    ]
    said = ['DANN > source', 'DANN/x > source/x + 15', 'DANN/x > source/x + 17', 'source/x < 0.9 * DANN/x']
    bench = bench_of(tmp_path, table_of(cells, RELATIONS=said))
    run.run_cells(bench, ['DANN/x', 'source/x', 'DANN/y'], (0,))
    claims = drawn_of(bench, (0,)).claims
    assert [claim.holds for claim in claims] == [True, None, True, False, True]
    assert claims[2].right == pytest.approx(85) and claims[4].right == pytest.approx(0.9 * 86)


def test_a_relation_is_of_the_seeds_that_both_have(tmp_path, config_file):
    cells = [Cell('a', 'x', config_file, {'objective.label_smoothing': 0.2}), Cell('b', 'x', config_file)]
    bench = bench_of(tmp_path, table_of(cells, RELATIONS=['a > b']))
    run.run_cells(bench, ['a/x'], (0, 1))
    assert drawn_of(bench, (0, 1)).claims[0].holds is None
    run.run_cells(bench, ['b/x'], (1, 2))
    claim = drawn_of(bench, (0, 1, 2)).claims[0]
    assert (claim.left, claim.right) == pytest.approx((87, 71))


def test_error_percent_and_open_ranges(tmp_path, config_file):
    cells = [
        Cell('a', 'error', config_file, unit='error %', published=29.5, accept=(None, 31.0)),
        Cell('a', 'mse', config_file, metric='test/mse', unit='MSE', published=1.13, tolerance=0.18),
    ]
    bench = bench_of(tmp_path, table_of(cells))
    run.run_cells(bench, list(bench.table.cells), (0,))
    error, mse = drawn_of(bench, (0,)).lines
    assert error.mean == pytest.approx(30) and error.reproduced
    assert mse.values == {0: 1.0} and mse.reproduced
    text = format_paper_table(drawn_of(bench, (0,)))
    assert '≤ 31' in text and '± 0.18' in text and '-0.130' in text


@pytest.mark.parametrize(
    'cells, declared, said',
    [
        ([Cell('a', 'x', 'c.py', after='a/y')], {}, "unknown 'a/y'; did you mean 'a/x'"),
        ([Cell('a', 'x', 'c.py', after='b/x'), Cell('b', 'x', 'c.py', after='a/x')], {}, 'no cell comes first'),
        ([Cell('a', 'x', 'c.py'), Cell('a', 'x', 'c.py')], {}, 'share a name'),
        ([Cell('a', 'B>D', 'c.py'), Cell('a', 'B→D', 'c.py')], {}, 'share a name or directory'),
        ([Cell('a', 'x', 'c.py')], {'METRIC': ''}, 'names no metric'),
        ([Cell('a', 'x', 'c.py')], {'RELATIONS': ['DAN > a']}, "there is no 'DAN'"),
        ([Cell('a', 'x', 'c.py')], {'RELATIONS': ['a>a']}, 'spaces around'),
        ([Cell('a', 'x', 'c.py')], {'RELATIONS': ['a > a/x']}, 'two of a kind'),
        ([Cell('a', 'x', 'c.py')], {'MEANS': [Mean('b', of='b/*')]}, "no cell matches 'b/*'"),
        ([Cell('a', 'x', 'c.py', candidates=[{}])], {'SELECTION': 'last'}, 'cannot choose among candidates'),
        ([Cell('a', 'x', 'c.py')], {'SEEDS': 'many'}, 'neither a count nor a list'),
        ([Cell('a', 'x', 'c.py')], {'SEEDS': 0}, 'names no seed'),
    ],
)
def test_a_contradictory_table_is_refused_in_one_line(cells, declared, said):
    with pytest.raises(UserError) as error:
        table_of(cells, **declared)
    assert said in str(error.value) and '\n' not in str(error.value)


def test_seeds_are_a_count_or_a_list():
    assert seeds_from('3') == seeds_from(3) == (0, 1, 2)
    assert seeds_from('0,4') == (0, 4) and seeds_from('4,') == (4,) and seeds_from([2019, 2020]) == (2019, 2020)


def test_damaged_and_foreign_results_are_named(tmp_path, config_file):
    bench = bench_of(tmp_path, table_of([Cell('a', 'x', config_file)], SEEDS=4))
    run.run_cells(bench, ['a/x'], (0, 1, 2))
    folder = tmp_path / 'results/a.x'
    (folder / 'seed1.json').write_text('{"seed": 1,')
    (folder / 'seed3.json').write_text((folder / 'seed2.json').read_text())  # a copy under another seed's name
    paper = drawn_of(bench, (0, 1, 2, 3))
    assert set(paper.lines[0].values) == {0, 2}
    assert 'not valid JSON' in paper.notes[0] and 'not the result of a run of this seed' in paper.notes[1]


def test_a_figure_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        collect.write_result(tmp_path / 'seed0.json', {'metrics': {'test/loss': math.nan}})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def command(tmp_path, config_file, monkeypatch):
    """`main` with tables and results under tmp_path and a trainer that only writes files."""
    declared = f"""
from experiments.table import Cell
TITLE, METRIC, SEEDS, SELECTION = 'Demo', 'test/accuracy', 2, 'last'
CELLS = [Cell('DANN', c, '{config_file}', published=70.5, tolerance=1, source='table 1') for c in ('B>D', 'B>E')]
"""
    (tmp_path / 'demo.py').write_text(declared)
    (tmp_path / 'words.py').write_text('cells = []')
    for module in ('experiments.table', 'experiments.run'):
        monkeypatch.setattr(f'{module}.HERE', tmp_path)
    trainer = Trainer()
    monkeypatch.setattr(run, '_train', trainer)
    return types.SimpleNamespace(main=run.main, trainer=trainer)


def test_the_command_runs_prints_and_rebuilds_from_json_alone(tmp_path, command, capsys):
    assert command.main(['demo', '--workdir=runs/demo', '--only=DANN/B>E', '--seeds=1']) == 0
    printed = capsys.readouterr().out
    assert '1 of 2' in printed and 'missing' in printed and len(command.trainer.runs) == 1
    assert command.main(['demo', '--workdir=runs/demo']) == 0
    assert len(command.trainer.runs) == 2  # the other seed; B>D has B>E's config and shares its runs
    made = [(tmp_path / f'results/demo/table.{kind}').read_bytes() for kind in ('md', 'html')]
    (tmp_path / 'runs').rename(tmp_path / 'gone')
    capsys.readouterr()
    assert command.main(['demo', '--print']) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('| DANN | B\\>D'))
    assert [c.strip() for c in row.split('|')[3:9]] == ['70.5', '70.50 ± 0.71', '+0.00', '± 1', '✓', '2']
    assert made == [(tmp_path / f'results/demo/table.{kind}').read_bytes() for kind in ('md', 'html')]
    assert len(command.trainer.runs) == 2 and not (tmp_path / 'runs').exists()


def test_the_command_lists_and_runs_quickly(tmp_path, command, capsys):
    assert command.main(['demo', '--quick', '--workdir=runs/demo']) == 0
    assert 'QUICK, not a result' in capsys.readouterr().out
    assert not (tmp_path / 'results').exists() and (tmp_path / 'runs/demo/quick/results/table.md').is_file()
    assert command.main(['demo', '--list', '--workdir=runs/demo']) == 0
    assert capsys.readouterr().out.splitlines() == [
        'DANN/B>D  0/2 seeds     tiny.py',
        'DANN/B>E  0/2 seeds     tiny.py',
    ]


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['dmo'], "no table 'dmo'"),
        (['dmo'], "did you mean 'demo'"),
        (['words'], "no table 'words'"),
        (['demo', '--only=DAN/B>D'], "no cell of demo matches 'DAN/B>D'; did you mean 'DANN/B>D'"),
        (['demo', '--onyl=x'], "did you mean 'only'"),
        (['demo', '--seeds=three'], 'neither a count nor a list'),
        (['--print'], 'name one table'),
    ],
)
def test_a_wrong_command_is_told_what_there_is(command, arguments, said):
    with pytest.raises(UserError, match='.'):
        command.main(arguments)
    with pytest.raises(UserError) as error:
        command.main(arguments)
    assert said in str(error.value)


def test_every_shipped_table_is_consistent():
    from experiments.table import HERE, declares_cells

    for path in HERE.glob('*.py'):
        if declares_cells(path):
            table = load_table(path.stem)
            for cell in table.cells.values():
                # The others of a grid set the same fields as its ends, and some grids have hundreds.
                cell = cell._replace(candidates=[*cell.candidates[:1], *cell.candidates[1:][-1:]])
                assert len(fingerprint(table, cell, table.seeds[0])) == 16
                assert len(fingerprint(table, cell, table.seeds[0], quick=True)) == 16
                assert cell.published is None or cell.source, f'{cell.name}: a published figure without its source'
