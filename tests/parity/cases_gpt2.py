"""GPT-2 of transformers: with its language head and right padding, and bare with left padding."""

import numpy as np
from parity_harness import CLASSES, Case

CLASSIFIER = 'GPT2ForSequenceClassification'
SMALL = dict(vocabulary=37, length=19, width=24, depth=3, heads=3)


def padded(side, batch=3, length=11, vocabulary=37):
    """Random tokens of several lengths, 0 where there is padding, on one side; of one length where that is 'none'."""

    def inputs(rng):
        tokens = rng.integers(1, vocabulary, (batch, length)).astype(np.int32)
        mask = np.arange(length) < length - 2 * np.arange(batch)[:, None] * (side != 'none')
        mask = mask[:, ::-1] if side == 'left' else mask
        return {'tokens': tokens * mask, 'mask': mask}

    return inputs


def tensors(inputs):
    """What a decoder of transformers takes, the positions counted over real tokens."""
    import torch

    mask = torch.from_numpy(np.ascontiguousarray(inputs['mask'])).long()
    return {
        'input_ids': torch.from_numpy(np.ascontiguousarray(inputs['tokens'])).long(),
        'attention_mask': mask,
        'position_ids': (mask.cumsum(1) - 1).clamp(min=0),
    }


def last_real(hidden, mask):
    """The vector [batch, width] of each text's last real token."""
    import torch

    last = (torch.arange(mask.shape[1]) * mask).argmax(1)
    return hidden[torch.arange(len(last)), last]


def reference(model='GPT2LMHeadModel', **fields):
    import transformers

    sizes = dict(vocab_size=37, n_positions=19, n_embd=24, n_layer=3, n_head=3)
    config = transformers.GPT2Config(**{**sizes, **fields}, attn_implementation='eager')
    return getattr(transformers, model)(config)


def outputs(model, inputs):
    import torch_side

    blocks = range(len(model.transformer.h))
    modules = {f'block{i + 1}': f'transformer.h.{i}' for i in blocks} | {'hidden': 'transformer.ln_f'}
    endpoints, result = torch_side.recorded(model, modules, use_cache=False, **inputs)
    features = {'features': last_real(endpoints['hidden'], inputs['attention_mask'])}
    # The logits last: the gradients are of them.
    return endpoints | features | {'logits' if hasattr(model, 'score') else 'lm_logits': result.logits}


CASES = (
    Case(
        'gpt2_right',
        'gpt2',
        SMALL,
        'transformers',
        reference,
        outputs,
        padded('right'),
        tensors,
        num_classes=None,
        tied={'lm_head.weight': 'transformer.wte.weight'},
        golden=True,
    ),
    Case(
        'gpt2_left',
        'gpt2',
        {**SMALL, 'mlp_width': 31, 'activation': 'relu', 'depth': 2},
        'transformers',
        lambda: reference(
            CLASSIFIER, n_inner=31, activation_function='relu', n_layer=2, pad_token_id=0, num_labels=CLASSES
        ),
        outputs,
        padded('left'),
        tensors,
    ),
)


def whole(model='GPT2LMHeadModel', **fields):
    import transformers

    return getattr(transformers, model)(transformers.GPT2Config(**fields))


_TOKENS = np.zeros((1, 3), np.int32)
_FIELDS = {
    'gpt2': {},
    'gpt2_medium': dict(n_embd=1024, n_layer=24, n_head=16),
    'gpt2_large': dict(n_embd=1280, n_layer=36, n_head=20),
    'gpt2_xl': dict(n_embd=1600, n_layer=48, n_head=25),
    'distilgpt2': dict(n_layer=6),
}
SIZES = (
    *(
        (name, None, {}, 'transformers', lambda fields=fields: whole(**fields), _TOKENS, (r'lm_head\.weight',))
        for name, fields in _FIELDS.items()
    ),
    ('gpt2', 5, {}, 'transformers', lambda: whole(CLASSIFIER, num_labels=5), _TOKENS),
)
