"""Terms of text encoders, in torch, one text at a time without its padding; means are over the tokens of the batch."""

import numpy as np
from distillation_harness import Case, torch

LENGTHS = (7, 4, 1, 5)
MASK = np.arange(7) < np.array(LENGTHS)[:, None]


def encoders(seed):
    """Two blocks of a student and of a wider teacher, as many heads in both; padding holds numbers, as in networks."""
    rng = np.random.default_rng(seed)

    def network(width, blocks):
        projected = lambda: rng.standard_normal((4, 7, 2, width // 2))
        parts = {f'block{i}_{name}': projected() for i in blocks for name in ('query', 'key', 'value')}
        return parts | {f'block{i}': rng.standard_normal((4, 7, width)) for i in blocks}

    return {**network(4, (1, 2)), 'mask': MASK}, {**network(8, (1, 2, 4)), 'same': rng.standard_normal((4, 7, 4))}, {}


def masked_lm(seed):
    """Logits of three places of a text, of which some hid no token."""
    rng = np.random.default_rng(seed)
    student, teacher = (2 * rng.standard_normal((4, 3, 11)) for _ in range(2))
    real = np.array([[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0]], bool)
    return {'mlm_logits': student, 'mlm_real': real, 'mask': MASK}, {'mlm_logits': teacher}, {}


def every_token(seed):
    rng = np.random.default_rng(seed)
    student, teacher = (2 * rng.standard_normal((4, 7, 5)) for _ in range(2))
    return {'lm_logits': student, 'mask': MASK}, {'lm_logits': teacher}, {}


def mean_over_tokens(per_token):
    """The mean of what a function of one text, number and length, gives for each of its tokens."""
    return torch.cat([per_token(text, length) for text, length in enumerate(LENGTHS)]).mean()


def token_targets(name, real=None):
    """As in the authors' distiller.py: predictions that count are selected, then `batchmean` times τ²."""

    def reference(student, teacher, fields, params):
        wanted = student['mlm_real'] if real is None else torch.from_numpy(real)
        s, t = (side[name][wanted] / 2 for side in (student, teacher))
        return 4 * torch.nn.functional.kl_div(s.log_softmax(-1), t.softmax(-1), reduction='batchmean')

    return reference


def token_cosine(student, teacher, fields, params):
    """torch's CosineEmbeddingLoss with a target of ones, of the selected tokens."""
    s, t = student['block2'][torch.from_numpy(MASK)], teacher['same'][torch.from_numpy(MASK)]
    return torch.nn.functional.cosine_embedding_loss(s, t, torch.ones(len(s)))


def hidden_states(student, teacher, fields, params):
    def layer(s, t):
        projected = torch.nn.functional.linear(s, params['kernel'].T)
        return mean_over_tokens(lambda i, n: (projected[i, :n] - t[i, :n]).square().mean(1))

    return sum(layer(student[s], teacher[t]) for s, t in BLOCKS)


def score(x, y):
    return x @ y.transpose(-1, -2) / x.shape[-1] ** 0.5


def attention_scores(student, teacher, fields, params):
    def layer(s, t):
        def per_token(i, n):
            each = lambda side, block: score(*(side[f'{block}_{p}'][i, :n].transpose(0, 1) for p in ('query', 'key')))
            return (each(student, s) - each(teacher, t)).square().mean((0, 2))

        return mean_over_tokens(per_token)

    return sum(layer(s, t) for s, t in BLOCKS)


def minilm(relations, heads):
    def reference(student, teacher, fields, params):
        def far(one, other):
            def per_token(i, n):
                def relation(side, block):
                    split = lambda p: side[f'{block}_{p}'][i, :n].flatten(1).unflatten(1, (heads, -1)).transpose(0, 1)
                    return score(split(one), split(other))

                s, t = relation(student, 'block2'), relation(teacher, 'block4')
                return torch.nn.functional.kl_div(s.log_softmax(-1), t.softmax(-1), reduction='none').sum(-1).mean(0)

            return mean_over_tokens(per_token)

        return sum(far(one, other) for one, other in relations)

    return reference


BLOCKS = [['block1', 'block2'], ['block2', 'block4']]
OWN = minilm([('query', 'key'), ('value', 'value')], 2)
CASES = {
    'token_targets': Case({'name': 'token_targets'}, masked_lm, token_targets('mlm_logits')),
    'token_targets_everywhere': Case(
        {'name': 'token_targets', 'student': 'lm_logits', 'teacher': 'lm_logits'},
        every_token,
        token_targets('lm_logits', MASK),
    ),
    'token_cosine': Case({'name': 'token_cosine', 'layers': [['block2', 'same']]}, encoders, token_cosine),
    'hidden_states': Case({'name': 'hidden_states', 'layers': BLOCKS}, encoders, hidden_states),
    'attention_scores': Case({'name': 'attention_scores', 'layers': BLOCKS}, encoders, attention_scores),
    'minilm_v1': Case({'name': 'minilm', 'layer': ['block2', 'block4'], 'relations': ['qk', 'vv']}, encoders, OWN),
    'minilm_v2': Case(
        {'name': 'minilm', 'layer': ['block2', 'block4'], 'heads': 4},
        encoders,
        minilm([('query', 'query'), ('key', 'key'), ('value', 'value')], 4),
    ),
}
