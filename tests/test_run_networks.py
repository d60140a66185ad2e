"""What a run says of the networks that its objective asks but that never learn."""

import json

import numpy as np
import pytest
from scipy.special import rel_entr, softmax
from sklearn.metrics import accuracy_score

from tl_jax.config import resolve
from tl_jax.experiment import build
from tl_jax.networks import module_from
from tl_jax.train import train_and_evaluate

CLASSES = [3, 11, 0, 7, 1, 9, 2, 4, 10, 5]
TEACHER = {'name': 'convnet', 'widths': [4], 'num_classes': 12}
SOFT = {'name': 'soft_targets', 'temperature': 2.0}


def summary_of(config, workdir, rule='.*', **distilled):
    data = config()['data'] | {'train': 'sklearn:digits/train[:32]'}
    stage = {'steps': 2, 'train': [[rule, {'name': 'adam', 'lr': 3e-2}]]}
    config = config(objective={'name': 'supervised', 'distilled': distilled}, stages=[stage], data=data)
    state = train_and_evaluate(config, workdir)
    return config, state, json.loads((workdir / 'summary.json').read_text())


def test_teachers_are_stored_and_measured_beside_the_student(digits_config, tmp_path):
    # Only the head learns: the stage itself sees features, from which no teacher could say anything.
    config, state, summary = summary_of(
        digits_config, tmp_path, 'head/.*', teacher=[TEACHER, TEACHER], classes=CLASSES, terms=[SOFT]
    )
    # 3×3 convolutions and their biases, halved sides of 8×8 pixels, a head of 10 or 12 classes.
    student = (9 * 8 + 8) + (9 * 8 * 16 + 16) + (2 * 2 * 16 * 10 + 10)
    teacher = (9 * 4 + 4) + (4 * 4 * 4 * 12 + 12)
    found = summary['networks']
    assert [found[name]['parameters'] for name in ('student', 'teacher', 'teacher2')] == [student, teacher, teacher]
    assert [found[name]['bytes'] for name in ('student', 'teacher', 'teacher2')] == [
        4 * student,
        4 * teacher,
        4 * teacher,
    ]
    assert all(network['examples_per_second'] > 0 and network['batch'] == 64 for network in found.values())

    data = build(resolve(config)).data
    images = np.concatenate([batch['image'][batch['mask'] > 0] for batch in data.batches('val', data.eval['val'])])
    module = module_from(**TEACHER, classes=12)
    for role in ('teacher', 'teacher2'):
        logits = module.apply({'params': state.params[role]}, images)['logits']
        stored = np.load(tmp_path / f'predictions/{role}/val.npz')
        np.testing.assert_allclose(stored['probabilities'], softmax(np.asarray(logits)[:, CLASSES], -1), atol=1e-6)
        mine = np.load(tmp_path / 'predictions/val.npz')
        assert (stored['index'] == mine['index']).all() and (stored['class_names'] == mine['class_names']).all()
        accuracy = np.mean(stored['probabilities'].argmax(1) == stored['label'])
        assert found[role]['metrics']['val/accuracy'] == pytest.approx(accuracy)
        both = stored['probabilities'], mine['probabilities']
        agreement = accuracy_score(*(probabilities.argmax(1) for probabilities in both))
        assert found[role]['metrics']['val/agreement'] == pytest.approx(agreement)
        assert found[role]['metrics']['val/kl'] == pytest.approx(rel_entr(*both).sum(1).mean(), rel=1e-5)
    assert found['teacher']['metrics']['val/agreement'] != found['teacher2']['metrics']['val/agreement']
    assert not any(key.startswith('teacher') for key in summary['metrics'])


def test_teachers_of_other_classes_are_only_weighed(digits_config, tmp_path):
    backbone = {'name': 'convnet', 'widths': [8, 16]}
    label = {'name': 'hard_targets', 'student': 'features', 'teacher': 'features'}
    teachers = [{**backbone, 'num_classes': 12}, {**backbone, 'num_classes': 0}]
    _, _, summary = summary_of(digits_config, tmp_path, teacher=teachers, terms=[label])
    headless = (9 * 8 + 8) + (9 * 8 * 16 + 16)
    whole = headless + 2 * 2 * 16 * 12 + 12
    assert summary['networks']['teacher'] == {'parameters': whole, 'bytes': 4 * whole}
    assert summary['networks']['teacher2'] == {'parameters': headless, 'bytes': 4 * headless}
    assert not (tmp_path / 'predictions/teacher').exists()
