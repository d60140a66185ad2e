"""Terms of predictions, in torch."""

import numpy as np
from distillation_harness import Case, torch


def logits(seed):
    rng = np.random.default_rng(seed)
    student, teacher = (3 * rng.standard_normal((7, 10)) for _ in range(2))
    return {'logits': student}, {'logits': teacher}, {'label': rng.integers(0, 10, 7)}


def soft_targets(temperature):
    """As in RepDistiller's `DistillKL`: sums over the batch, divided by its size."""

    def reference(student, teacher, fields, params):
        p = torch.log_softmax(student['logits'] / temperature, 1)
        q = torch.softmax(teacher['logits'] / temperature, 1)
        return torch.nn.functional.kl_div(p, q, reduction='sum') * temperature**2 / len(p)

    return reference


def standardised(student, teacher, fields, params):
    z = lambda x: (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))
    p, q = (z(side['logits']) / 2 for side in (student, teacher))
    return 4 * torch.nn.functional.kl_div(p.log_softmax(1), q.softmax(1), reduction='batchmean')


def hard_targets(student, teacher, fields, params):
    return torch.nn.functional.cross_entropy(student['logits'], teacher['logits'].argmax(1))


CASES = {
    'soft_targets': Case({'name': 'soft_targets', 'temperature': 4.0}, logits, soft_targets(4.0)),
    'soft_targets_standardised': Case(
        {'name': 'soft_targets', 'temperature': 2.0, 'standardised': True}, logits, standardised
    ),
    'hard_targets': Case({'name': 'hard_targets'}, logits, hard_targets),
}
