"""The command as a user types it."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from launch import main
from tl_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
def get_config(arg='full'):
    import ml_collections
    c = ml_collections.ConfigDict()
    c.model = dict(name='convnet', widths=[8, 16])
    small = [dict(name='resize', size=[16, 16]), 'to_float']
    c.data = dict(train='folder:{photos}[:70%]', eval='folder:{photos}[70%:]', train_transform=small, eval_transform=small)
    c.stages = [dict(name=arg, steps=30, train=[('head/.*' if arg == 'probe' else '.*', dict(name='adam', lr=1e-2))])]
    c.batch_size = 8
    c.mesh = dict(data=1)
    return c

def sweep():
    for arg in ('probe', 'full'):
        yield arg, dict(seed=0)
"""


def launch(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / 'launch.py'), *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Two classes that differ in colour, as a person's own folder would be."""
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for channel, name in ((0, 'red'), (2, 'blue')):
        (folder / name).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 120, (24, 20, 3))
            pixels[..., channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def config_file(photos):
    path = photos.parent / 'config.py'
    path.write_text(CONFIG.format(photos=photos))
    return path


@pytest.fixture(scope='module')
def trained(config_file):
    workdir = config_file.parent / 'run'
    done = launch(f'--config={config_file}', f'--workdir={workdir}', '--config.stages[0].steps=40')
    assert done.returncode == 0, done.stderr
    assert 'report.html' in done.stdout and 'val/accuracy' in done.stdout
    return workdir


def test_train_writes_a_whole_run(trained):
    summary = json.loads((trained / 'summary.json').read_text())
    assert summary['steps'] == 40 and summary['metrics']['val/accuracy'] > 0.9
    assert {'config.json', 'metrics.jsonl', 'report.html', 'model.safetensors'} <= {p.name for p in trained.iterdir()}
    assert list(trained.glob('events.out.tfevents*'))


def test_eval_gives_the_figures_of_training(trained):
    done = launch(f'--workdir={trained}', '--mode=eval')
    assert done.returncode == 0, done.stderr
    figure = json.loads((trained / 'summary.json').read_text())['metrics']['val/accuracy']
    assert f'accuracy {figure:.4f}' in done.stdout


def test_predict_writes_probabilities(trained, photos):
    output = trained.parent / 'out.csv'
    done = launch(f'--workdir={trained}', '--mode=predict', f'--files={photos}/*/1*.png', f'--output={output}')
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(output.open()))
    assert len(rows) == 22
    for row in rows:
        assert float(row['red']) + float(row['blue']) == pytest.approx(1, abs=1e-5)
    assert np.mean([row['prediction'] in row['file'] for row in rows]) > 0.9


def test_export_writes_the_names_of_an_origin(trained, tmp_path):
    output = tmp_path / 'adapted.safetensors'
    done = launch(f'--workdir={trained}', '--mode=export', '--origin=tl_jax', f'--output={output}')
    assert done.returncode == 0, done.stderr
    stored = safetensors.numpy.load_file(output)
    run = safetensors.numpy.load_file(trained / 'model.safetensors')
    assert stored.keys() == run.keys() and 'params/head/kernel' in stored
    for name, tensor in run.items():
        np.testing.assert_array_equal(stored[name], tensor)
    done = launch(f'--workdir={trained}', '--mode=export', '--origin=timm', f'--output={output}')
    assert done.returncode == 2 and "origin: there is no 'timm'" in done.stderr


def test_a_finished_run_is_a_checkpoint_for_the_next(trained, config_file, tmp_path):
    done = launch(
        f'--config={config_file}:probe', f'--workdir={tmp_path}/next', '--config.stages[0].steps=1',
        f'--config.model.source={trained}/model.safetensors',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'next/summary.json').read_text())['metrics']['val/accuracy'] > 0.9


def test_dry_run_says_what_would_be_trained_and_writes_nothing(config_file, tmp_path):
    done = launch(f'--config={config_file}:probe', f'--workdir={tmp_path}/no', '--dry_run')
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / 'no').exists()
    row = next(line for line in done.stdout.splitlines() if line.startswith('head/kernel'))
    assert row.split()[2] == 'float32' and row.split()[-1] == 'adam'
    assert next(line for line in done.stdout.splitlines() if line.startswith('backbone/')).split()[-1] == 'frozen'
    assert '28 examples' in done.stdout and 'optimizer state' in done.stdout


# The first process takes its time over the summary; each says which of the sweep's files it put in place.
PROCESS = """
import os, sys, time
from pathlib import Path
import jax
jax.distributed.initialize({address!r}, 2, int(sys.argv[1]))
from tl_jax import jobs, train, workdir
write_json, replace, trained = workdir.write_json, os.replace, train.train_and_evaluate

def slowly(path, value):
    time.sleep(2 * (path.name == 'summary.json'))
    write_json(path, value)

def whole(config, run):
    trained(config, run)
    print('finished', (Path(run) / 'summary.json').exists())

def moved(start, end):
    replace(start, end)
    print('wrote', Path(end).name)

workdir.write_json, train.train_and_evaluate, os.replace = slowly, whole, moved
jobs.JOBS['sweep']({{'config': {config!r}, 'workdir': {sweep!r}}}, [])
"""
DIGITS = """
def get_config(arg='full'):
    import ml_collections
    c = ml_collections.ConfigDict()
    c.model = dict(name='mlp', dense=[4])
    c.data = dict(train='sklearn:digits/train[:64]', eval='sklearn:digits/val[:32]', eval_transform=['to_float'],
                  train_transform=['to_float'])
    c.stages = [dict(name=arg, steps=1, train=[('.*', dict(name='sgd', lr=1e-2))])]
    return c

def sweep():
    yield 'full', dict(seed=0)
"""


def test_of_several_processes_the_first_alone_reads_and_writes_a_sweep(tmp_path):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    config, program = tmp_path / 'config.py', tmp_path / 'process.py'
    config.write_text(DIGITS)
    program.write_text(PROCESS.format(address=address, config=str(config), sweep=str(tmp_path / 'sweep')))
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(number)], env={**os.environ, 'PYTHONPATH': str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in (0, 1)
    ]  # fmt: skip
    try:
        first, second = (process.communicate(timeout=300)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert 'finished True' in first and 'finished True' in second
    for name in ('summary.json', 'table.md', 'table.json', 'report.html'):
        assert f'wrote {name}' in first and f'wrote {name}' not in second
    assert '[1/1] full seed 0' in first and 'full seed 0' not in second


def test_sweep_compares_and_resumes(config_file, tmp_path):
    done = launch(f'--config={config_file}', f'--workdir={tmp_path}/sweep', '--mode=sweep')
    assert done.returncode == 0, done.stderr
    assert 'probe' in done.stdout and 'full' in done.stdout and (tmp_path / 'sweep/report.html').exists()
    again = launch(f'--config={config_file}', f'--workdir={tmp_path}/sweep', '--mode=sweep')
    assert again.returncode == 0 and 'step' not in again.stdout.partition('|')[0]


def test_sweep_refuses_a_bad_variant_before_it_trains_another(config_file, tmp_path):
    bad = tmp_path / 'bad.py'
    bad.write_text(f'{config_file.read_text()}\n        yield arg, dict(sed=1)\n')
    with pytest.raises(UserError, match=r"sweep\(\): probe: config.sed: unknown field; did you mean 'seed'"):
        main([f'--config={bad}', f'--workdir={tmp_path}/sweep', '--mode=sweep'])
    assert not (tmp_path / 'sweep').exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--config={c}', '--workdir={w}', '--config.seed=x'], 'config.seed: must be int'),
        (['--config={c}', '--workdir={w}', '--wrkdir=x'], "unknown flag; did you mean 'workdir'"),
        (['--config={c}', '--workdir={w}', '--mode=trian'], "unknown mode 'trian'; did you mean 'train'"),
        (['--config={c}'], '--workdir: name the directory'),
        (['--config={c}', '--workdir={w}', '--mode=sweep', '--dry_run'], '--dry_run: --mode=sweep has no use for it'),
        (['--config={c}', '--workdir={w}', '--mode=sweep', '--workers=2'], '--workers: is for a search over space()'),
        (['--config={c}', '--workdir={w}', '--config.data.train=folder:nowhere'], 'nowhere'),
        (
            ['--config={c}', '--workdir={w}', '--dry_run', '--config.eval_batch_size=10', '--config.mesh.data=4'],
            'config.eval_batch_size: 10 examples cannot be split over 4',
        ),
    ],
)
def test_bad_input_is_one_line(config_file, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache'))
    with pytest.raises(UserError) as refused:
        main([a.format(c=config_file, w=tmp_path / 'run') for a in arguments])
    assert message in str(refused.value) and '\n' not in str(refused.value)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('--config.sed=1', "config.sed: unknown field; did you mean 'seed'"),
        ('--config.model.source={e}', 'evil.pth'),
    ],
)
def test_bad_input_ends_with_status_2(config_file, tmp_path, argument, message):
    evil = tmp_path / 'evil.pth'
    evil.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / 'canary').encode() + b"'\ntR.")
    done = launch(f'--config={config_file}', f'--workdir={tmp_path / "run"}', argument.format(e=evil))
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / 'run').exists() and not (tmp_path / 'canary').exists()
