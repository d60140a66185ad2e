"""Terms with networks of their own between student and teacher, and with memories, in torch."""

import jax.numpy as jnp
import numpy as np
from distillation_harness import Case, torch
from torch_terms_maps import alike, maps, nchw, pointwise, pooled


def conv3(x, weights):
    return torch.nn.functional.conv2d(x, weights['kernel'].permute(3, 2, 0, 1), weights.get('bias'), padding=1)


def normed(x, norm):
    return torch.nn.functional.batch_norm(x, None, None, norm['scale'], norm['bias'], training=True)


def leaky(x, weights):
    for name in ('conv1', 'conv2', 'conv3'):
        x = torch.nn.functional.leaky_relu(conv3(x, weights[name]), 0.1)
    return x


def paraphrase(student, teacher, fields, params):
    _, t = pooled(student['stage2'], teacher['stage2'])
    return torch.nn.functional.mse_loss(leaky(leaky(t, params['encoder']), params['decoder']), t)


def transfer(student, teacher, fields, params):
    s, t = pooled(student['stage2'], teacher['stage2'])
    factors = leaky(t, params['encoder']).detach(), leaky(s, params['translator'])
    return torch.nn.functional.l1_loss(*(torch.nn.functional.normalize(f.flatten(1)) for f in factors))


def signed(seed):
    """Maps before their ReLU, of two widths."""
    rng = np.random.default_rng(seed)
    student = {'stage1': rng.standard_normal((5, 4, 4, 3)), 'stage2': rng.standard_normal((5, 3, 2, 4))}
    return student, signed_teacher(rng, 5), {}


def signed_teacher(rng, batch):
    return {'stage1': rng.standard_normal((batch, 4, 4, 5)) - 0.3, 'stage2': rng.standard_normal((batch, 3, 2, 6))}


def whole_data(seed):
    """Three batches, of the last of which half is padding."""
    rng = np.random.default_rng(100 + seed)
    masks = (np.ones(4), np.ones(4), np.array([1.0, 1.0, 0.0, 0.0]))
    return [(signed_teacher(rng, 4), {'mask': mask}) for mask in masks]


def ofd(seed_of_data):
    """As the authors' code, on margins that are counted here number by number."""

    def margin(name, seed):
        rows = np.concatenate([t[name][m['mask'] > 0] for t, m in whole_data(seed)]).reshape(
            -1, signed(0)[1][name].shape[-1]
        )
        return torch.tensor([column[column < 0].mean() for column in rows.T]).view(1, -1, 1, 1)

    def reference(student, teacher, fields, params):
        value = 0
        for place, name in enumerate(('stage1', 'stage2'), start=1):
            own = params[f'layer{place}']
            s = normed(pointwise(nchw(student[name]), own['linear']), own['norm'])
            t = torch.maximum(nchw(teacher[name]), margin(name, seed_of_data))
            loss = torch.nn.functional.mse_loss(s, t, reduction='none') * ((s > t) | (t > 0))
            value += loss.sum() / len(s) / 2 ** (2 - place)
        return value

    return reference


def levels(seed):
    student, teacher, fields = alike(seed)
    rng = np.random.default_rng(seed + 50)
    student['features'], teacher['features'] = rng.standard_normal((5, 6)), rng.standard_normal((5, 7))
    return student, teacher, fields


def review(student, teacher, fields, params):
    value, y, nearest = 0, None, torch.nn.functional.interpolate
    for place, name in reversed(list(enumerate(('stem', 'stage2', 'features'), start=1))):
        own = params[f'layer{place}']
        s, t = (nchw(x) if x.ndim == 4 else x[:, :, None, None] for x in (student[name], teacher[name]))
        x = normed(pointwise(s, own['in']['linear']), own['in']['norm'])
        if y is not None:
            y = nearest(y, x.shape[2:], mode='nearest')
            z = pointwise(torch.cat([x, y], 1), own['gate']).sigmoid()
            x = x * z[:, 0].unsqueeze(1) + y * z[:, 1].unsqueeze(1)
        y = x
        out = normed(conv3(nearest(y, t.shape[2:], mode='nearest'), own['out']), own['out_norm'])
        terms, weights = [torch.nn.functional.mse_loss(out, t)], [1.0]
        for regions in (4, 2, 1):
            if regions < min(t.shape[2:]):
                pool = torch.nn.AdaptiveAvgPool2d(regions)
                terms.append(torch.nn.functional.mse_loss(pool(out), pool(t)))
                weights.append(weights[-1] / 2)
        value += sum(w * term for w, term in zip(weights, terms, strict=True)) / sum(weights)
    return value


HEAD = np.random.default_rng(7).standard_normal((6, 10)), np.random.default_rng(8).standard_normal(10)


def with_head(seed):
    student, teacher, fields = maps(seed)
    return student, {**teacher, 'logits': teacher['features'] @ HEAD[0] + HEAD[1]}, fields


def srrl(student, teacher, fields, params):
    weights = torch.tensor(HEAD[0]), torch.tensor(HEAD[1])
    phi = normed(pointwise(nchw(student['stage2']), params['linear']), params['norm']).relu().mean((2, 3))
    h = teacher['features']
    logits = torch.nn.functional.mse_loss(phi @ weights[0] + weights[1], h @ weights[0] + weights[1])
    return 2 * torch.nn.functional.mse_loss(phi, h) + 3 * logits


CASES = {
    'factor_paraphrase': Case({'name': 'factor_transfer', 'layer': 'stage2', 'stage': 'paraphrase'}, maps, paraphrase),
    'factor_transfer': Case(
        {'name': 'factor_transfer', 'layer': 'stage2', 'stage': 'transfer'}, maps, transfer, slopes=False
    ),
    'ofd': Case({'name': 'ofd', 'layers': ['stage1', 'stage2']}, signed, ofd(0), passes=lambda seed: whole_data(0)),
    'reviewkd': Case({'name': 'reviewkd', 'layers': ['stem', 'stage2', 'features']}, levels, review),
    'srrl': Case(
        {'name': 'srrl', 'student': 'stage2', 'feature_weight': 2.0, 'prediction_weight': 3.0},
        with_head,
        srrl,
        heads=(None, lambda features: features @ jnp.asarray(HEAD[0]) + jnp.asarray(HEAD[1])),
    ),
}
