"""Prototypes of a teacher's features, in torch, class by class."""

import numpy as np
from distillation_harness import Case, torch

TEMPERATURE = 0.3


def batch(seed):
    """Students of 5 features, teachers of 4."""
    rng = np.random.default_rng(seed)
    student = {'features': rng.standard_normal((6, 5))}
    teacher = {'features': rng.standard_normal((6, 4)), 'logits': 2 * rng.standard_normal((6, 10))}
    return student, teacher, {'label': rng.integers(0, 9, 6)}


def mapped(seed):
    """The student's a map of the teacher's width."""
    _, teacher, fields = batch(seed)
    return {'stage2': np.random.default_rng(seed + 50).standard_normal((6, 3, 2, 4))}, teacher, fields


def passes(seed):
    """Three batches of the whole data, of which the last is not full; class 9 has no example."""
    found = []
    for place in range(3):
        rng = np.random.default_rng(100 + place)
        teacher = {'features': 1 + rng.standard_normal((8, 4)), 'logits': 2 * rng.standard_normal((8, 10))}
        mask = np.ones(8) if place < 2 else np.array([1.0, 1, 1, 0, 0, 0, 0, 0])
        found.append((teacher, {'label': np.arange(8 * place, 8 * place + 8) % 9, 'mask': mask}))
    return found


def seen():
    """Features, logits and labels of the examples that the passes hold."""
    kept = [(fields['mask'] > 0, teacher, fields) for teacher, fields in passes(0)]
    arrays = [
        (teacher['features'][mask], teacher['logits'][mask], fields['label'][mask]) for mask, teacher, fields in kept
    ]
    return [torch.from_numpy(np.concatenate(parts)) for parts in zip(*arrays, strict=True)]


def nearness(x, centres):
    return torch.nn.functional.cosine_similarity(x[:, None], centres[None], dim=-1) / TEMPERATURE


def labelled(student, teacher, fields, params):
    features, _, label = seen()
    centres = torch.stack([features[label == k].mean(0) for k in range(9)])
    s = student['features'] @ params['linear']['kernel'] + params['linear']['bias']
    return torch.nn.functional.cross_entropy(nearness(s, centres), fields['label'])


def assigned(student, teacher, fields, params):
    features, logits, _ = seen()
    shares = logits.softmax(1)
    centres = torch.stack([(shares[:, k, None] * features).sum(0) / shares[:, k].sum() for k in range(10)])
    s, t = nearness(student['stage2'].mean((1, 2)), centres), nearness(teacher['features'], centres)
    return torch.nn.functional.kl_div(s.log_softmax(1), t.softmax(1), reduction='batchmean')


CASES = {
    'prototypes_labels': Case({'name': 'prototypes', 'temperature': TEMPERATURE}, batch, labelled, passes=passes),
    'prototypes_teacher': Case(
        {
            'name': 'prototypes',
            'layer': ['stage2', 'features'],
            'targets': 'teacher',
            'temperature': TEMPERATURE,
        },
        mapped,
        assigned,
        passes=passes,
    ),
}
