"""A run that is killed at any moment, and started again, ends as if nothing had happened."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Slow enough to be hit in every part of its life: two stages, frequent saves, statistics, averages.
SCRIPT = """
import sys, json, jax
sys.path.insert(0, {root!r})
from tl_jax.checkpoint import checksums
from tl_jax.train import Preempted, train_and_evaluate
print('started', flush=True)
try:
    state = train_and_evaluate(json.load(open({config!r})), sys.argv[1])
except Preempted as saved:
    print(saved)
    sys.exit(0)
opt_state = {{str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}}
print('final', json.dumps(checksums(dict(params=state.params, collections=state.collections, opt_state=opt_state))))
"""


@pytest.fixture(scope='module')
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp('resume')
    sgd = {'name': 'momentum', 'lr': 0.05}
    config = {
        'model': {'name': 'convnet', 'widths': [8, 16], 'norm': 'batch'},
        'data': {
            'train': 'sklearn:digits/train',
            'eval': 'sklearn:digits/val[:101]',
            'train_transform': [{'name': 'random_crop', 'size': 8, 'padding': 1}, 'to_float'],
            'eval_transform': ['to_float'],
        },
        'stages': [
            {'steps': 60, 'train': [['head/.*', sgd]]},
            {'steps': 120, 'train': [['.*', {'name': 'adamw', 'lr': {'name': 'cosine', 'peak': 1e-3}}]]},
        ],
        'batch_size': 16,
        'eval_every': 20,
        'checkpoint_every': 5,
        'select_by': 'val/loss',
        'ema': 0.9,
    }
    (folder / 'config.json').write_text(json.dumps(config))
    script = SCRIPT.format(root=str(ROOT), config=str(folder / 'config.json'))
    (folder / 'run.py').write_text(script)

    def start(workdir):
        return subprocess.Popen(
            [sys.executable, str(folder / 'run.py'), str(workdir)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def finish(process):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output, json.loads(output.partition('final ')[2].splitlines()[0])

    begun = time.perf_counter()
    _, checksums = finish(start(folder / 'whole'))
    return start, finish, checksums, folder / 'whole', time.perf_counter() - begun


def wait_for(path, process, count):
    """Returns once the metrics file has so many lines, or the process ends."""
    while process.poll() is None and not (path.exists() and path.read_text().count('\n') >= count):
        time.sleep(0.002)


def records(workdir):
    """The evaluations and the learning rates; rates of examples a second are not repeatable."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [r for r in lines if 'val/loss' in r]


def test_killed_at_several_moments_ends_bit_equal(program, tmp_path):
    start, finish, expected, whole, _ = program
    lines = (whole / 'metrics.jsonl').read_text().count('\n')
    rng = random.Random(0)
    kills = 0
    for count in sorted(rng.sample(range(1, lines), 3)):
        process = start(tmp_path / 'run')
        wait_for(tmp_path / 'run' / 'metrics.jsonl', process, count)
        time.sleep(rng.random() * 0.05)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    _, checksums = finish(start(tmp_path / 'run'))
    assert kills >= 2
    assert checksums == expected
    assert records(tmp_path / 'run') == records(whole)


def test_killed_during_a_save_ends_bit_equal(program, tmp_path):
    start, finish, expected, _, _ = program
    run = tmp_path / 'run'
    process = start(run)
    # A checkpoint being written is a directory with a temporary name.
    seen = None
    while process.poll() is None and not seen:
        seen = next((p for p in run.glob('checkpoints/*tmp*')), None)
    process.kill()
    process.communicate()
    assert seen is not None
    assert finish(start(run))[1] == expected


def test_sigterm_saves_and_exits_0_and_the_same_command_resumes(program, tmp_path):
    start, finish, expected, _, _ = program
    run = tmp_path / 'run'
    process = start(run)
    wait_for(run / 'metrics.jsonl', process, 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and 'resume with the same command' in output, output
    output, checksums = finish(start(run))
    assert 'resuming' in output and checksums == expected
