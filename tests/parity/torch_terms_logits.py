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


def dkd(student, teacher, fields, params):
    """The authors' sums over masked probabilities (megvii-research/mdistiller), τ = 4, α = 1, β = 8."""
    wanted = torch.nn.functional.one_hot(fields['label'], 10).bool()
    s, t = student['logits'] / 4, teacher['logits'] / 4
    both = lambda p: torch.stack([(p * wanted).sum(1), (p * ~wanted).sum(1)], 1)
    kl = lambda log_p, q: torch.nn.functional.kl_div(log_p, q, reduction='batchmean')
    target = kl(both(s.softmax(1)).log(), both(t.softmax(1)))
    rest = lambda z: z.masked_select(~wanted).reshape(len(z), 9)
    return 16 * (target + 8 * kl(rest(s).log_softmax(1), rest(t).softmax(1)))


def dist(student, teacher, fields, params):
    """By `torch.corrcoef`, pair by pair; τ = 2, inter 1.5, intra 0.5."""
    s, t = ((side['logits'] / 2).softmax(1) for side in (student, teacher))
    far = lambda a, b: torch.stack([1 - torch.corrcoef(torch.stack([x, y]))[0, 1] for x, y in zip(a, b, strict=True)])
    return 4 * (1.5 * far(s, t).mean() + 0.5 * far(s.T, t.T).mean())


def virtual_teacher(form, temperature, correct):
    def reference(student, teacher, fields, params):
        z = student['logits']
        u = torch.full_like(z, (1 - correct) / 9).scatter(1, fields['label'][:, None], correct)
        if form == 'code':  # with the authors' multiplier at C
            return torch.nn.KLDivLoss()(z.log_softmax(1), torch.softmax(u / temperature, 1)) * 10
        softened = u ** (1 / temperature) / (u ** (1 / temperature)).sum(1, keepdim=True)
        return (softened * (softened.log() - (z / temperature).log_softmax(1))).sum(1).mean()

    return reference


CASES = {
    'soft_targets': Case({'name': 'soft_targets', 'temperature': 4.0}, logits, soft_targets(4.0)),
    'soft_targets_standardised': Case(
        {'name': 'soft_targets', 'temperature': 2.0, 'standardised': True}, logits, standardised
    ),
    'hard_targets': Case({'name': 'hard_targets'}, logits, hard_targets),
    'dkd': Case({'name': 'dkd'}, logits, dkd),
    'dist': Case({'name': 'dist', 'temperature': 2.0, 'inter': 1.5, 'intra': 0.5}, logits, dist),
    'virtual_teacher': Case({'name': 'virtual_teacher'}, logits, virtual_teacher('paper', 20.0, 0.99)),
    'virtual_teacher_code': Case(
        {'name': 'virtual_teacher', 'form': 'code', 'temperature': 0.5, 'correct': 0.9},
        logits,
        virtual_teacher('code', 0.5, 0.9),
    ),
}
