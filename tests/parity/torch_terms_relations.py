"""Terms of relations, in torch: loops over examples and pairs, or what the authors' code computes."""

import math

import numpy as np
from distillation_harness import Case, torch


def features(seed):
    """Students of 5 features, teachers of 8: in a batch of 6."""
    rng = np.random.default_rng(seed)
    return {'features': rng.standard_normal((6, 5))}, {'features': 2 + rng.standard_normal((6, 8))}, {}


def maps(seed):
    """Students of 4 channels on 6 × 4 positions, teachers of 3 on 3 × 2."""
    rng = np.random.default_rng(seed)
    return {'stage2': rng.standard_normal((4, 6, 4, 4))}, {'block1': rng.standard_normal((4, 3, 2, 3))}, {}


def lengths(x):
    return x / x.norm(dim=-1, keepdim=True)


def pkt_code(student, teacher, fields, params):
    """Over all pairs, as RepDistiller's."""
    p, q = ((1 + lengths(side['features']) @ lengths(side['features']).T) / 2 for side in (student, teacher))
    p, q = (x / x.sum(1, keepdim=True) for x in (p, q))
    return (q * torch.log((q + 1e-7) / (p + 1e-7))).mean()


def pkt_paper(student, teacher, fields, params):
    """Example by example, over the others."""
    value = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        near = [lengths(side['features']) @ lengths(side['features'])[i] for side in (student, teacher)]
        p, q = ((1 + x[others]) / (1 + x[others]).sum() for x in near)
        value = value + (q * (q / p).log()).sum()
    return value / 6


def rkd(distance, angle):
    def reference(student, teacher, fields, params):
        pairs, triples = [], []
        for side in (student, teacher):
            x = side['features']
            apart = torch.cdist(x, x) if side is teacher else torch.stack([(x - y + 1e-30).norm(dim=1) for y in x])
            pairs.append(apart / (apart.sum() / 30))
            angles = []
            for j in range(6):
                ways = torch.nn.functional.normalize(x - x[j], dim=1)
                angles.append(ways @ ways.T)
            triples.append(torch.stack(angles))
        huber = torch.nn.functional.smooth_l1_loss
        return distance * huber(*pairs) + angle * huber(*triples)

    return reference


def similarity(student, teacher, fields, params):
    s, t = student['stage2'].flatten(1), teacher['block1'].flatten(1)
    s, t = (torch.nn.functional.normalize(x @ x.T) for x in (s, t))
    return (s - t).square().sum() / 16


def correlation(student, teacher, fields, params):
    """Of order 3, γ = 0.7."""
    value = 0.0
    for i in range(6):
        for j in range(6):
            s, t = (lengths(side['features'])[i] @ lengths(side['features'])[j] for side in (student, teacher))
            kernel = lambda x: math.exp(-1.4) * (1 + 1.4 * x + 1.4**2 * x**2 / 2 + 1.4**3 * x**3 / 6)
            value = value + (kernel(s) - kernel(t)) ** 2
    return value / 36


def correlation_code(student, teacher, fields, params):
    own = params['layer1']
    s = student['features'] @ own['student']['kernel'] + own['student']['bias']
    t = teacher['features'] @ own['teacher']['kernel'] + own['teacher']['bias']
    delta = (s - t).abs()
    return (delta[:-1] * delta[1:]).sum(1).mean()


def ickd(student, teacher, fields, params):
    """The authors', a convolution and batch normalisation of torch's before it."""
    own, nchw = params['layer1'], lambda x: x.permute(0, 3, 1, 2)
    s = torch.nn.functional.conv2d(nchw(student['stage2']), own['linear']['kernel'].T[:, :, None, None])
    s = torch.nn.functional.batch_norm(s, None, None, own['norm']['scale'], own['norm']['bias'], training=True)
    s, t = s.flatten(2), nchw(teacher['block1']).flatten(2)
    s, t = (torch.nn.functional.normalize(x @ x.transpose(1, 2), dim=2) for x in (s, t))
    return (s - t).square().sum() / (3 * len(s))


def nst(student, teacher, fields, params):
    """RepDistiller's, channel by channel."""
    s = torch.nn.functional.adaptive_avg_pool2d(student['stage2'].permute(0, 3, 1, 2), (3, 2))
    s, t = (torch.nn.functional.normalize(x.flatten(2), dim=2) for x in (s, teacher['block1'].permute(0, 3, 1, 2)))
    kernel = lambda a, b: (a[:, :, None] * b[:, None]).sum(-1).pow(2).mean()
    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


BOTH = [['stage2', 'block1']]

CASES = {
    # The floor under a vector's length is not the authors'.
    'pkt_code': Case({'name': 'pkt'}, features, pkt_code, tolerance=1e-6),
    # Neither is the number that keeps its logarithms finite.
    'pkt_paper': Case({'name': 'pkt', 'form': 'paper'}, features, pkt_paper, tolerance=1e-5),
    'rkd': Case({'name': 'rkd'}, features, rkd(25.0, 50.0)),
    'rkd_distance': Case({'name': 'rkd', 'distance': 3.0, 'angle': 0.0}, features, rkd(3.0, 0.0)),
    'similarity': Case({'name': 'similarity', 'layers': BOTH}, maps, similarity),
    'correlation': Case({'name': 'correlation', 'gamma': 0.7, 'order': 3}, features, correlation),
    'correlation_code': Case({'name': 'correlation_code', 'width': 7}, features, correlation_code),
    'ickd': Case({'name': 'ickd', 'layers': BOTH}, maps, ickd),
    'nst': Case({'name': 'nst', 'layers': BOTH}, maps, nst),
}
