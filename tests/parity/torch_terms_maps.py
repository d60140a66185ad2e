"""Terms of maps, in torch, as their papers and RepDistiller have them. Maps are NHWC on both sides; `nchw` turns them."""

import itertools

import numpy as np
from distillation_harness import Case, torch


def maps(seed):
    """Two stages whose sizes differ between the networks, once by a divisor and once not; rectified, as networks have them."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: np.maximum(rng.standard_normal((5, *shape)), 0)
    student = {'stage1': draw(6, 4, 3), 'stage2': draw(3, 3, 4), 'features': draw(4)}
    return student, {'stage1': draw(3, 2, 5), 'stage2': draw(5, 4, 6), 'features': draw(6)}, {}


def alike(seed):
    """Two networks of the same channels."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: np.maximum(rng.standard_normal((5, *shape)), 0)
    student = {'stem': draw(6, 6, 3), 'stage1': draw(6, 6, 3), 'stage2': draw(4, 4, 5)}
    return student, {'stem': draw(5, 5, 3), 'stage1': draw(5, 5, 3), 'stage2': draw(2, 3, 5)}, {}


def texts(seed):
    rng = np.random.default_rng(seed)
    return {'block2': rng.standard_normal((5, 7, 4))}, {'block4': rng.standard_normal((5, 7, 6))}, {}


def nchw(x):
    return x.permute(0, 3, 1, 2)


def pooled(x, y):
    """Both on the smaller one's positions, channels first."""
    x, y = nchw(x), nchw(y)
    size = [min(a, b) for a, b in zip(x.shape[2:], y.shape[2:], strict=True)]
    return [torch.nn.functional.adaptive_avg_pool2d(z, size) for z in (x, y)]


def pointwise(x, weights):
    """A 1×1 convolution; our matrix is [in, out]."""
    return torch.nn.functional.conv2d(x, weights['kernel'].T[:, :, None, None], weights.get('bias'))


def attention(form):
    def reference(student, teacher, fields, params):
        value = 0
        for name in ('stage1', 'stage2'):
            s, t = pooled(student[name], teacher[name])
            q = [torch.nn.functional.normalize(x.pow(2).mean(1).flatten(1)) for x in (s, t)]
            value += (q[0] - q[1]).pow(2).mean() if form == 'code' else (q[0] - q[1]).norm(dim=1).mean() / 2
        return value

    return reference


def cubes(student, teacher, fields, params):
    s, t = (torch.nn.functional.normalize(side['stage1'].abs().pow(3).sum(3).flatten(1)) for side in (student, teacher))
    return (s - t).pow(2).mean()


def signed(seed):
    """Maps of one size that are not rectified, so that a power's sign shows."""
    rng = np.random.default_rng(seed)
    return {'stage1': rng.standard_normal((5, 4, 3, 3))}, {'stage1': rng.standard_normal((5, 4, 3, 6))}, {}


def fsp(student, teacher, fields, params):
    def flows(side):
        layers = [side[name] for name in ('stem', 'stage1', 'stage2')]
        for below, above in itertools.pairwise(layers):
            below, above = pooled(below, above)
            yield (below.unsqueeze(2) * above.unsqueeze(1)).mean((3, 4))

    return sum((g_s - g_t).pow(2).mean() for g_s, g_t in zip(flows(student), flows(teacher), strict=True))


def hints(student, teacher, fields, params):
    value = 0
    for place, name in enumerate(('stage1', 'stage2'), start=1):
        s, t = pooled(student[name], teacher[name])
        value += torch.nn.functional.mse_loss(pointwise(s, params[f'layer{place}']['linear']), t)
    return value


def hints_normalised(student, teacher, fields, params):
    s, t = pooled(student['stage1'], teacher['stage1'])
    norm = params['layer1']['norm']
    r = pointwise(s, params['layer1']['linear'])
    r = torch.nn.functional.batch_norm(r, None, None, norm['scale'], norm['bias'], training=True)
    return torch.nn.functional.mse_loss(r, t)


def hints_of_texts(student, teacher, fields, params):
    linear = params['layer1']['linear']
    r = torch.nn.functional.linear(student['block2'], linear['kernel'].T, linear['bias'])
    return torch.nn.functional.mse_loss(r, teacher['block4'])


def hints_of_vector_and_map(student, teacher, fields, params):
    linear = params['layer1']['linear']
    r = torch.nn.functional.linear(student['features'], linear['kernel'].T, linear['bias'])
    return torch.nn.functional.mse_loss(r, teacher['stage2'].mean((1, 2)))


def vid(student, teacher, fields, params):
    value = 0
    for place, name in enumerate(('stage1', 'stage2'), start=1):
        own = params[f'layer{place}']
        s, t = pooled(student[name], teacher[name])
        mu = pointwise(pointwise(pointwise(s, own['linear1']).relu(), own['linear2']).relu(), own['linear3'])
        var = (torch.log(1 + torch.exp(own['alpha'])) + 1e-5).view(1, -1, 1, 1).expand_as(mu)
        # torch's Gaussian likelihood leaves out the constant, as the paper does.
        value += torch.nn.functional.gaussian_nll_loss(mu, t, var, eps=0)
    return value


STAGES = ['stage1', 'stage2']
CASES = {
    'attention_code': Case({'name': 'attention', 'layers': STAGES}, maps, attention('code')),
    'attention_paper': Case({'name': 'attention', 'layers': STAGES, 'form': 'paper'}, maps, attention('paper')),
    'attention_cubes': Case({'name': 'attention', 'layers': ['stage1'], 'power': 3.0}, signed, cubes),
    'fsp': Case({'name': 'fsp', 'layers': ['stem', 'stage1', 'stage2']}, alike, fsp),
    'hints': Case({'name': 'hints', 'layers': STAGES}, maps, hints),
    'hints_normalised': Case({'name': 'hints', 'layers': ['stage1'], 'norm': True}, maps, hints_normalised),
    'hints_of_texts': Case({'name': 'hints', 'layers': [['block2', 'block4']]}, texts, hints_of_texts),
    'hints_of_vector_and_map': Case(
        {'name': 'hints', 'layers': [['features', 'stage2']]}, maps, hints_of_vector_and_map
    ),
    # Without biases, where every channel of a position is below zero the next ReLU is at its kink.
    'vid': Case({'name': 'vid', 'layers': STAGES}, maps, vid, slopes=False),
}
