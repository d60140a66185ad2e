"""T5 of transformers: version 1.0 tied, and 1.1 with gates and a table of its own; both sides padded."""

import numpy as np
from parity_harness import Case

SMALL = dict(
    vocabulary=37, width=24, depth=2, decoder_depth=3, heads=3, head_dim=4, mlp_width=28, buckets=12, max_distance=15
)
_SIZES = dict(
    vocab_size=37,
    d_model=24,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=3,
    d_kv=4,
    d_ff=28,
    relative_attention_num_buckets=12,
    relative_attention_max_distance=15,
    decoder_start_token_id=0,
)
TABLES = {'encoder.embed_tokens.weight': 'shared.weight', 'decoder.embed_tokens.weight': 'shared.weight'}
TIED = {**TABLES, 'lm_head.weight': 'shared.weight'}


def inputs(rng):
    """Texts long enough for the widest bucket; padded on the left in the encoder, on the right in the decoder."""
    mask = np.arange(21) >= np.array([0, 3, 9])[:, None]
    decoder_mask = np.arange(18) < np.array([18, 5, 11])[:, None]
    return {
        'tokens': (rng.integers(1, 37, mask.shape) * mask).astype(np.int32),
        'mask': mask,
        'decoder_tokens': (rng.integers(1, 37, decoder_mask.shape) * decoder_mask).astype(np.int32),
        'decoder_mask': decoder_mask,
    }


def tensors(inputs):
    import torch

    names = {
        'tokens': 'input_ids',
        'mask': 'attention_mask',
        'decoder_tokens': 'decoder_input_ids',
        'decoder_mask': 'decoder_attention_mask',
    }
    return {name: torch.from_numpy(inputs[ours].astype(np.int64)) for ours, name in names.items()}


def reference(**fields):
    import torch
    import transformers

    config = transformers.T5Config(**{**_SIZES, **fields}, attn_implementation='eager')
    model = transformers.T5ForConditionalGeneration(config)
    if fields.get('tie_word_embeddings') is False:
        # What transformers 5 ties though version 1.1 has two tables.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def outputs(model, inputs):
    import torch_side

    modules = {}
    for stack in ('encoder', 'decoder'):
        blocks = range(len(getattr(model, stack).block))
        modules |= {f'{stack}_block{i + 1}': f'{stack}.block.{i}' for i in blocks}
    modules |= {'encoder': 'encoder.final_layer_norm', 'hidden': 'decoder.final_layer_norm'}
    endpoints, result = torch_side.recorded(model, modules, use_cache=False, **inputs)
    mask = inputs['attention_mask'].unsqueeze(-1)
    features = (endpoints['encoder'] * mask).sum(1) / mask.sum(1)
    return endpoints | {'features': features, 'lm_logits': result.logits}


# Shallower and narrower: without a scale of the scores, random weights magnify what bfloat16 rounds.
SMALL_V1_1 = SMALL | dict(depth=1, decoder_depth=2, head_dim=2)
_V1_1 = dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False)
CASES = (
    Case(
        't5',
        't5_small',
        SMALL,
        'transformers',
        reference,
        outputs,
        inputs,
        tensors,
        num_classes=None,
        tied=TIED,
        golden=True,
    ),
    Case(
        't5_v1_1',
        't5_v1_1_small',
        SMALL_V1_1,
        'transformers',
        lambda: reference(**_V1_1, num_layers=1, num_decoder_layers=2, d_kv=2),
        outputs,
        inputs,
        tensors,
        num_classes=None,
        tied=TABLES,
    ),
)


def whole(**fields):
    import transformers

    return transformers.T5ForConditionalGeneration(transformers.T5Config(**fields))


_COPIES = r'(encoder|decoder)\.embed_tokens\.weight'
SIZES = tuple(
    (
        name,
        None,
        {},
        'transformers',
        lambda fields=fields: whole(**fields),
        np.zeros((1, 3), np.int32),
        (_COPIES, *([] if 'v1_1' in name else [r'lm_head\.weight'])),
    )
    for name, fields in {
        't5_small': {},
        't5_base': dict(d_model=768, num_layers=12, num_heads=12, d_ff=3072),
        't5_large': dict(d_model=1024, num_layers=24, num_heads=16, d_ff=4096),
        't5_v1_1_small': dict(d_ff=1024, num_layers=8, num_heads=6, **_V1_1),
        't5_v1_1_base': dict(d_model=768, num_layers=12, num_heads=12, **_V1_1),
    }.items()
)
