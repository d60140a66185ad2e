"""Decoders of the LLaMA kind of transformers: what sets each apart, grouped heads, padding, long RoPE.

Padding stands on the right, or there is none beside sliding windows: in float64 their softmax, which is float32, gives NaN
for padding on the left. What real tokens see behind such padding, live_generate.py compares.
"""

import functools

import numpy as np
from cases_gpt2 import last_real, padded, tensors
from parity_harness import CLASSES, Case

SMALL = dict(vocabulary=37, width=24, depth=3, heads=4, kv_heads=2, mlp_width=36)
_SIZES = dict(
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=36,
)
TIED = {'lm_head.weight': 'model.embed_tokens.weight'}


def reference(kind, **fields):
    import transformers

    classifier = 'num_labels' in fields
    # Their embeddings of padding have no gradient, and only the classifiers need to know what padding is.
    config = getattr(transformers, f'{kind}Config')(
        **{**_SIZES, **fields}, pad_token_id=0 if classifier else None, attn_implementation='eager'
    )
    return getattr(transformers, f'{kind}For{"SequenceClassification" if classifier else "CausalLM"}')(config)


def outputs(model, inputs):
    import torch_side

    blocks = range(len(model.model.layers))
    modules = {f'block{i + 1}': f'model.layers.{i}' for i in blocks} | {'hidden': 'model.norm'}
    endpoints, result = torch_side.recorded(model, modules, use_cache=False, **inputs)
    features = {'features': last_real(endpoints['hidden'], inputs['attention_mask'])}
    # The logits last: the gradients are of them.
    return endpoints | features | {'logits' if hasattr(model, 'score') else 'lm_logits': result.logits}


def case(name, kind, side, ours, theirs, **more):
    tied = TIED if ours.get('output') == 'tied' and 'num_labels' not in theirs else {}
    more = {'num_classes': None, 'tied': tied} | more
    build = functools.partial(reference, kind, **theirs)
    return Case(name, 'llama', {**SMALL, **ours}, 'transformers', build, outputs, padded(side), tensors, **more)


_GEMMA = dict(
    output='tied', zero_centered=True, scale_embeddings=True, activation='gelu_tanh', head_dim=8, epsilon=1e-6
)
CASES = (
    case(
        'llama3',
        'Llama',
        'right',
        dict(rope_theta=100.0, rope_scaling='llama3', rope_factor=5.0, rope_high=3.0, rope_length=11),
        dict(
            rms_norm_eps=1e-5,
            rope_parameters=dict(
                rope_type='llama3',
                rope_theta=100.0,
                factor=5.0,
                low_freq_factor=1.0,
                high_freq_factor=3.0,
                original_max_position_embeddings=11,
            ),
        ),
        golden=True,
    ),
    case(
        'llama_linear_biased',
        'Llama',
        'right',
        dict(
            rope_scaling='linear',
            rope_factor=4.0,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            head_dim=10,
            output='none',
        ),
        dict(
            rms_norm_eps=1e-5,
            attention_bias=True,
            mlp_bias=True,
            head_dim=10,
            rope_parameters=dict(rope_type='linear', rope_theta=10000.0, factor=4.0),
            num_labels=CLASSES,
        ),
        num_classes=CLASSES,
    ),
    case(
        'mistral_window',
        'Mistral',
        'none',
        dict(window=4, kv_heads=1, output='none'),
        dict(sliding_window=4, rms_norm_eps=1e-5, num_key_value_heads=1, num_labels=CLASSES),
        num_classes=CLASSES,
    ),
    case(
        'qwen2',
        'Qwen2',
        'right',
        dict(output='tied', qkv_bias=True, epsilon=1e-6, rope_theta=1000.0),
        dict(tie_word_embeddings=True, rope_parameters=dict(rope_type='default', rope_theta=1000.0)),
    ),
    case('qwen3', 'Qwen3', 'right', dict(qk_norm=True, head_dim=10, epsilon=1e-6), dict(head_dim=10)),
    case(
        'gemma',
        'Gemma',
        'right',
        dict(**_GEMMA, kv_heads=1, depth=2),
        dict(head_dim=8, num_key_value_heads=1, num_hidden_layers=2),
    ),
    case(
        'gemma2',
        'Gemma2',
        'none',
        dict(
            **_GEMMA, post_norms=True, query_scale=12.0, score_cap=20.0, logit_cap=10.0, window=4, window_blocks=(1, 3)
        ),
        dict(
            head_dim=8,
            query_pre_attn_scalar=12,
            attn_logit_softcapping=20.0,
            final_logit_softcapping=10.0,
            sliding_window=4,
            num_labels=CLASSES,
        ),
        num_classes=CLASSES,
    ),
    case(
        'gemma2_caps',
        'Gemma2',
        'right',
        dict(**_GEMMA, post_norms=True, query_scale=8.0, score_cap=20.0, logit_cap=10.0, depth=2),
        dict(
            head_dim=8,
            num_hidden_layers=2,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=20.0,
            final_logit_softcapping=10.0,
        ),
    ),
)


def whole(kind, **fields):
    import transformers

    return getattr(transformers, f'{kind}ForCausalLM')(getattr(transformers, f'{kind}Config')(**fields))


def sizes(width, depth, heads, kv_heads, mlp_width, vocabulary, **more):
    return dict(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp_width,
        vocab_size=vocabulary,
        **more,
    )


TIE = dict(tie_word_embeddings=True)
SIZES = tuple(
    (
        name,
        None,
        {},
        'transformers',
        functools.partial(whole, kind, **fields),
        np.zeros((1, 3), np.int32),
        (r'lm_head\.weight',) if fields.get('tie_word_embeddings') else (),
    )
    for name, kind, fields in (
        ('llama', 'Llama', {}),
        ('llama3_2_1b', 'Llama', sizes(2048, 16, 32, 8, 8192, 128256, **TIE)),
        ('llama3_2_3b', 'Llama', sizes(3072, 28, 24, 8, 8192, 128256, **TIE)),
        ('tinyllama', 'Llama', sizes(2048, 22, 32, 4, 5632, 32000)),
        ('qwen2_0_5b', 'Qwen2', sizes(896, 24, 14, 2, 4864, 151936, **TIE)),
        ('qwen2_1_5b', 'Qwen2', sizes(1536, 28, 12, 2, 8960, 151936, **TIE)),
        ('qwen3_0_6b', 'Qwen3', sizes(1024, 28, 16, 8, 3072, 151936, head_dim=128, **TIE)),
        ('gemma_2b', 'Gemma', sizes(2048, 18, 8, 1, 16384, 256000, head_dim=256, **TIE)),
    )
)
