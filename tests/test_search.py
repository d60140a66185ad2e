"""Search: what it proposes, stops, resumes and refuses, with a stand-in for training; and once with the real one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tl_jax import config as config_lib
from tl_jax.errors import UserError
from tl_jax.report import write_search_report
from tl_jax.search import checked, launched, left_running, search, write_results
from tl_jax.selection import selection_from

ROOT = Path(__file__).resolve().parent.parent
VAL = selection_from('val/loss', ['val'], [])
SPACE = {'a': {'low': -2.0, 'high': 2.0}, 'b.c': [[1], None], 'd': {'low': 1, 'high': 64, 'log': True}}
# "Trains" for five steps: its loss falls to (a - 1)²; resumes at what it has; goes on for ever where told to wait.
TRAINER = """
import json, pathlib, sys, time
folder, values, pause = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
file = folder / 'metrics.jsonl'
begun = len(file.read_text().splitlines()) if file.exists() else 0
if values['a'] > 1.9:
    print('error: too much'); sys.exit(2)
for step in range(begun, 5):
    loss = (values['a'] - 1) ** 2 + 1 / (step + 1)
    with file.open('a') as f: f.write(json.dumps({'step': step, 'stage': 0, 'val/loss': loss}) + chr(10))
    time.sleep(pause)
(folder / 'summary.json').write_text(json.dumps({'metrics': {'val/loss': loss, 'test/loss': 7.0}}))
"""


@pytest.fixture
def command(tmp_path):
    program = tmp_path / 'trainer.py'
    program.write_text(TRAINER)

    def make(pause=0.0):
        return lambda folder, values: [sys.executable, str(program), str(folder), json.dumps(values), str(pause)]

    return make


def test_a_search_finds_what_is_low_and_leaves_its_results(command, tmp_path):
    trials = search(SPACE, tmp_path / 'search', VAL, command(), trials=10, workers=2, poll=0.02)
    assert len(trials) == 10
    for trial in trials:
        assert -2 <= trial.params['a'] <= 2 and trial.params['d'] in range(1, 65)
    best = write_results(tmp_path / 'search', trials, VAL, SPACE)
    finished = [t for t in trials if t.state is TrialState.COMPLETE]
    assert best['value'] == min(t.value for t in finished)
    assert best['value'] == pytest.approx((best['fields']['a'] - 1) ** 2 + 0.2)
    assert best['fields']['b.c'] in ([1], None)
    stored = json.loads((tmp_path / 'search' / 'best.json').read_text())
    assert stored['trial'] == best['trial'] and stored['select_by'] == 'val/loss'
    page = write_search_report(tmp_path / 'search').read_text()
    assert '<svg' in page and all(f'trial{i:04d}' in page for i in range(10)) and 'test' not in stored['fields']
    assert (tmp_path / 'search' / 'table.md').read_text().splitlines()[2].startswith(f'| {best["trial"]}')
    assert not list((tmp_path / 'search').glob('*.pid'))


def test_a_search_that_goes_on_does_not_propose_its_first_trials_again(command, tmp_path):
    for trials in (2, 4):
        found = search(SPACE, tmp_path / 'search', VAL, command(), trials=trials, poll=0.02)
    assert len({trial.params['a'] for trial in found}) == 4


def test_a_stopped_search_goes_on(command, tmp_path):
    """Finished trials stay as they are; those at work are resumed where they were."""
    root = tmp_path / 'search'
    program = tmp_path / 'search.py'
    program.write_text(
        f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import pathlib, json
from test_search import SPACE, VAL
from tl_jax.search import search
command = lambda folder, values: [sys.executable, {str(tmp_path / 'trainer.py')!r}, str(folder), json.dumps(values), '0.3']
search(SPACE, pathlib.Path({str(root)!r}), VAL, command, trials=4, poll=0.02)
"""
    )
    begun = subprocess.Popen([sys.executable, str(program)])
    second = root / 'trial0001' / 'metrics.jsonl'
    give_up = time.monotonic() + 120
    while not (second.exists() and len(second.read_text().splitlines()) >= 2):
        assert begun.poll() is None and time.monotonic() < give_up
        time.sleep(0.02)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    pid = int((root / 'trial0001.pid').read_text())
    os.kill(pid, signal.SIGKILL)
    first = (root / 'trial0000' / 'summary.json').stat().st_mtime_ns
    kept = second.read_text()
    trials = search(SPACE, root, VAL, command(), trials=4, poll=0.02)
    assert [t.number for t in trials] == [0, 1, 2, 3]
    assert (root / 'trial0000' / 'summary.json').stat().st_mtime_ns == first
    assert second.read_text().startswith(kept) and len(second.read_text().splitlines()) == 5
    assert trials[1].state is TrialState.COMPLETE
    with pytest.raises(UserError, match='holds a search of another space'):
        search({'a': [1.0]}, root, VAL, command(), trials=5)


@pytest.mark.parametrize(
    ('argument', 'ours'),
    [
        ('--workdir={root}/a/trial0000', True),
        ('--workdir=a/trial0000', True),
        ('--workdir={root}/b/trial0000', False),
        ('--workdir={root}/a/trial00001', False),
        ('{root}/a/trial0000', False),
    ],
)
def test_a_process_is_a_trials_by_its_workdir(tmp_path, argument, ours):
    (tmp_path / 'a').mkdir()
    # A number may have gone to another search's trial, which has the same name.
    process = subprocess.Popen(
        [sys.executable, '-c', 'print(flush=True); input()', argument.format(root=tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    try:
        process.stdout.readline()
        (tmp_path / 'a' / 'trial0000.pid').write_text(str(process.pid))
        assert left_running(tmp_path / 'a' / 'trial0000') == (process.pid if ours else None)
    finally:
        process.kill()
        process.wait()
    assert left_running(tmp_path / 'a' / 'trial0000') is None


def test_hopeless_trials_are_stopped(command, tmp_path):
    trials = search(SPACE, tmp_path, VAL, command(0.15), trials=12, workers=2, poll=0.02, seed=3)
    pruned = [t for t in trials if t.state is TrialState.PRUNED]
    best = min(t.value for t in trials if t.state is TrialState.COMPLETE)
    assert pruned and all(t.intermediate_values[t.last_step] > best for t in pruned)
    for trial in pruned:
        assert not (tmp_path / f'trial{trial.number:04d}' / 'summary.json').exists()


def test_failures_are_counted_and_named(command, tmp_path):
    with pytest.raises(UserError, match='no trial finished; the last one said: error: too much'):
        search({'a': {'low': 1.95, 'high': 2.0}}, tmp_path, VAL, command(), trials=2, poll=0.02)


@pytest.mark.parametrize(
    ('space', 'changes', 'message'),
    [
        ({'stages[0].train[0][1].lrr': [1.0]}, {}, r'stages\[0\].train\[0\]\[1\].lrr: unknown field'),
        ({'stages[1].steps': [1]}, {}, r'space\(\): config.stages\[1\]: there are 1 items'),
        ({'model.widht': [1]}, {}, 'widht: unknown field'),
        ({'stages[0].train[0][1].name': ['sgd', 'adamm']}, {}, r"unknown optimizer 'adamm'; did you mean 'adam"),
        ({'gradient': [{'name': 'plain'}, 1]}, {}, r'space\(\): config.gradient: must be Mapping, not int'),
        ({'ema': {'low': 0.5, 'high': 1.5}}, {}, 'config.ema: must lie in 0 … 1, not 1.5'),
        ({'seed': {'low': 1}}, {}, r'space\(\): seed: must be dict\(low=…, high=…, log=True\) or a list'),
        ({'ema': {'low': '1e-4', 'high': 0.1}}, {}, r"space\(\): ema.low: must be float, not str \('1e-4'\)"),
        ({'ema': {'low': None, 'high': 0.1}}, {}, r'space\(\): ema.low: must be float, not NoneType'),
        ({'ema': {'low': 0.0, 'high': float('inf')}}, {}, 'high inf must be finite'),
        ({'seed': [1, {2}]}, {}, r'space\(\): seed: a choice must be plain data, .*: Object of type set is not'),
        ({'seed': {'low': 3, 'high': 1}}, {}, 'low 3 and high 1 must rise'),
        ({'ema': {'low': 0.0, 'high': 1.0, 'log': True}}, {}, 'be above 0 with log'),
        (
            {'seed': [1, 2]},
            {'select_by': 'last'},
            "config.select_by: 'last' cannot decide a search; choose val/accuracy",
        ),
        ({'seed': [1, 2]}, {'select_by': 'oracle'}, "config.select_by: 'oracle' cannot decide a search"),
    ],
)
def test_bad_searches_are_refused_in_one_line(digits_config, space, changes, message):
    config = digits_config(model={'name': 'mlp', 'dense': [4]}, **{'select_by': 'val/loss', **changes})
    config['data']['test'] = 'sklearn:digits/test'
    with pytest.raises(UserError, match=message) as refused:
        checked(config_lib.with_defaults(config), space)
    assert '\n' not in str(refused.value)


def test_the_command_of_a_trial():
    command = launched('c.py:full', ['mesh.data=1'], Path('launch.py'))(Path('runs/trial0001'), {'stages[0].steps': 3})
    assert command[1:] == [
        'launch.py',
        '--config=c.py:full',
        '--workdir=runs/trial0001',
        '--config.mesh.data=1',
        '--config.stages[0].steps=3',
    ]


def test_from_the_command_line(tmp_path):
    """The shipped example, cut short."""
    done = subprocess.run(
        [sys.executable, 'launch.py', '--mode=sweep', '--config=configs/quickstart.py:probe', f'--workdir={tmp_path}/s',
         '--trials=1', '--config.stages[0].steps=2', "--config.data.test={}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'best: trial0000' in done.stdout
    best = json.loads((tmp_path / 's' / 'best.json').read_text())
    summary = json.loads((tmp_path / 's' / 'trial0000' / 'summary.json').read_text())
    assert best['value'] == summary['metrics']['val/accuracy']
    config = json.loads((tmp_path / 's' / 'trial0000' / 'config.json').read_text())
    assert config['stages'][0]['train'][0][1]['lr'] == best['fields']['stages[0].train[0][1].lr']
