"""Terms of a network that teaches itself, in torch. Maps are NHWC on both sides."""

import numpy as np
from distillation_harness import Case, torch


def inner(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal((6, *shape))
    student = {
        'stage1': draw(5, 4, 3),
        'block2': draw(7, 4),
        'dense1': draw(5),
        'features': draw(8),
        'logits': draw(10),
    }
    return student, {}, {'label': rng.integers(0, 10, 6)}


def exits(student, teacher, fields, params):
    """τ = 2, α = 0.3, λ = 0.05, of a map, a sequence and a vector."""
    functional, value = torch.nn.functional, 0
    for name, own in zip(('stage1', 'block2', 'dense1'), params.values(), strict=True):
        x, kernel = student[name], own['inner']['kernel']
        if x.ndim == 4:
            x = functional.conv2d(x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), padding=1)
        else:
            x = functional.linear(x, kernel.T).movedim(-1, 1)
        x = functional.batch_norm(x, None, None, own['norm']['scale'], own['norm']['bias'], training=True).relu()
        found = x.flatten(2).mean(2) if x.ndim > 2 else x
        logits = functional.linear(found, own['classifier']['kernel'].T, own['classifier']['bias'])
        value += 0.7 * functional.cross_entropy(logits, fields['label'])
        soft = functional.kl_div((logits / 2).log_softmax(1), (student['logits'] / 2).softmax(1), reduction='batchmean')
        value += 0.3 * 4 * soft + 0.05 * (found - student['features']).pow(2).sum(1).mean()
    return value


CASES = {
    'exits': Case(
        dict(name='exits', layers=['stage1', 'block2', 'dense1'], temperature=2.0, imitation=0.3, feature_weight=0.05),
        inner,
        exits,
        stopped=('logits', 'features'),
    )
}
