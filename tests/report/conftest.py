"""Synthetic run directories: small, seeded, and as train.py writes them."""

import json

import numpy as np
import pytest


def write_run(path, *, accuracy=0.75, seed=0, strategy='full', class_names=('cat', 'dog', 'eel'), count=40, **changes):
    """A finished run whose stored predictions have exactly `accuracy` on `count` examples."""
    random = np.random.default_rng(seed)
    classes = len(class_names)
    label = np.arange(count) % classes
    wrong = np.arange(count) >= round(accuracy * count)
    predicted = np.where(wrong, (label + 1) % classes, label)
    probabilities = np.full((count, classes), 0.2 / (classes - 1), np.float32)
    probabilities[np.arange(count), predicted] = 0.8
    worst = np.flatnonzero(wrong)[:6]
    (path / 'predictions').mkdir(parents=True)
    np.savez(
        path / 'predictions/test.npz',
        index=np.arange(count) + 100,
        label=label,
        probabilities=probabilities,
        features=random.normal(size=(count, 8)).astype(np.float16) + label[:, None],
        class_names=np.array(class_names),
        worst_index=worst + 100,
        worst_images=random.integers(0, 256, (len(worst), 8, 8, 1)).astype(np.uint8),
    )
    records = [
        {'step': step, 'stage': step // 21, 'train/loss': 1 / step, 'train/accuracy': 0.5, 'lr': 0.1, 'seconds': 1.0}
        for step in range(10, 50, 10)
    ]
    records += [{'step': step, 'stage': step // 21, 'val/loss': 0.5, 'val/accuracy': step / 50} for step in (20, 40)]
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    (path / 'config.json').write_text(json.dumps({'model': {'name': 'lenet'}, 'stages': [{'steps': 40}]}))
    summary = {
        'name': strategy,
        'seed': seed,
        'select_by': 'val/accuracy',
        'selected_step': 40,
        'steps': 40,
        'metrics': {'test/accuracy': accuracy, 'test/macro_f1': accuracy - 0.05, 'test/loss': 0.5},
        'parameters': {'total': 61706, 'trainable': [850, 61706], 'bytes_optimizer': [6800, 493648]},
        'seconds': 2.0 + seed,
        'started': '2025-11-21T07:00:00',
        'device': 'cpu',
        'versions': {'jax': '0.10.2'},
        'commit': 'abcdef0123456789',
        'command': 'python launch.py --mode=train',
        'pretrained': None,
    }
    (path / 'summary.json').write_text(json.dumps(summary | changes))
    return path


@pytest.fixture
def make_run():
    return write_run


@pytest.fixture
def sweep(tmp_path):
    """scratch 50, 60, 70 %; full 80, 85, 90 %."""
    for seed, (low, high) in enumerate([(0.5, 0.8), (0.6, 0.85), (0.7, 0.9)]):
        write_run(tmp_path / f'sweep/scratch/seed{seed}', accuracy=low, seed=seed, strategy='scratch')
        write_run(tmp_path / f'sweep/full/seed{seed}', accuracy=high, seed=seed, strategy='full')
    return tmp_path / 'sweep'
