"""GPT-2, LLaMA and T5: endpoints, sizes, padding, generation with a cache, config files."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.models import create_model, gpt2, llama, t5
from tl_jax.models.generate import generate, pick
from tl_jax.pretrained import maps
from tl_jax.trees import flatten

PARITY = Path(__file__).parent.parent / 'parity'
sys.path.insert(0, str(PARITY))
from parity_harness import draw  # noqa: E402

MODELS = {**gpt2.MODELS, **llama.MODELS, **t5.MODELS}
# Of the released networks: parameters, the shared table of embeddings counted once.
PARAMETERS = {
    'gpt2': 124_439_808,
    'gpt2_medium': 354_823_168,
    'gpt2_large': 774_030_080,
    'gpt2_xl': 1_557_611_200,
    'distilgpt2': 81_912_576,
    'llama': 6_738_415_616,
    'llama3_2_1b': 1_235_814_400,
    'llama3_2_3b': 3_212_749_824,
    'tinyllama': 1_100_048_384,
    'qwen2_0_5b': 494_032_768,
    'qwen2_1_5b': 1_543_714_304,
    'qwen3_0_6b': 596_049_920,
    'gemma_2b': 2_506_172_416,
    't5_small': 60_506_624,
    't5_base': 222_903_552,
    't5_large': 737_668_096,
    't5_v1_1_small': 76_961_152,
    't5_v1_1_base': 247_577_856,
}
SMALL = {
    'gpt2': dict(vocabulary=37, length=19, width=24, depth=3, heads=3),
    'llama': dict(vocabulary=37, width=24, depth=3, heads=4, kv_heads=2, mlp_width=36),
    't5_small': dict(
        vocabulary=37,
        width=24,
        depth=2,
        decoder_depth=3,
        heads=3,
        head_dim=4,
        mlp_width=28,
        buckets=12,
        max_distance=15,
    ),
}


def small(name, **fields):
    """A tiny network with random weights, the harness's."""
    module = create_model(name, **{**SMALL[name], **fields})
    return module, draw(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32)))


def prompts(side='left'):
    """The texts of live_generate.py, of 11, 9 and 7 tokens."""
    tokens = np.random.default_rng(1).integers(1, 37, (3, 11)).astype(np.int32)
    mask = np.arange(11) >= 2 * np.arange(3)[:, None]
    tokens = tokens * mask
    if side == 'right':
        tokens = np.stack([np.roll(row, -2 * i) for i, row in enumerate(tokens)])
        mask = mask[:, ::-1]
    return tokens, mask


@pytest.mark.parametrize('name', MODELS)
def test_sizes_and_endpoints(name):
    """Of one and two blocks; live_sizes.py has all of them. Every further block has what the second has."""
    tokens = jnp.zeros((2, 5), jnp.int32)
    sizes = []
    for depth in (1, 2):
        module = create_model(name, depth=depth)
        endpoints, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), tokens)
        leaves = flatten(variables['params']['backbone'])
        sizes.append(sum(leaf.size for leaf in leaves.values()))
    backbone = module.backbone
    assert sizes[0] + (create_model(name).backbone.depth - 1) * (sizes[1] - sizes[0]) == PARAMETERS[name]
    encoder_decoder = name.startswith('t5')
    for i in (1, 2):
        assert endpoints[f'encoder_block{i}' if encoder_decoder else f'block{i}'].shape == (2, 5, backbone.width)
    assert endpoints['features'].shape == (2, backbone.width)
    assert endpoints['features'].dtype == jnp.float32
    assert endpoints['lm_logits'].shape == (2, 1 if encoder_decoder else 5, backbone.vocabulary)


@pytest.mark.parametrize('name', SMALL)
def test_padding_changes_nothing(name):
    module, variables = small(name)
    outputs = {}
    for side in ('left', 'right'):
        tokens, mask = prompts(side)
        outputs[side] = module.apply(variables, {'tokens': tokens, 'mask': mask})
    tokens, mask = prompts('left')
    alone = module.apply(variables, tokens[2:, 4:])
    for side, endpoints in outputs.items():
        np.testing.assert_allclose(endpoints['features'][2:], alone['features'], rtol=1e-4, atol=2e-5, err_msg=side)


@pytest.mark.parametrize('name', SMALL)
def test_padding_of_bare_tokens_is_no_text(name):
    tokens, mask = prompts('right')
    module, variables = small(name, pad_id=0)
    bare, masked = (module.apply(variables, inputs)['features'] for inputs in (tokens, dict(tokens=tokens, mask=mask)))
    np.testing.assert_array_equal(bare, masked)
    blind = small(name)[0].apply(variables, tokens)['features']
    assert np.abs(np.asarray(blind - bare))[1:].max(1).min() > 1e-3


@pytest.mark.parametrize('name, fields', [('gpt2', {}), ('llama', {}), ('llama', dict(window=4)), ('t5_small', {})])
def test_cached_logits_are_the_uncached(name, fields):
    """The logits of a text given whole, and of the same text in pieces."""
    module, variables = small(name, **fields)
    tokens, mask = prompts()
    whole = np.asarray(_logits(module, variables, tokens, mask))
    backbone = module.backbone.clone(cache_length=11)
    params, collections = variables['params']['backbone'], {}
    step = jax.jit(lambda c, inputs: backbone.apply({'params': params, **c}, inputs, mutable=['cache']))
    for begin, end in ((0, 6), *((i, i + 1) for i in range(6, 11))):
        if name == 't5_small':
            inputs = {'decoder_tokens': tokens[:, begin:end], 'decoder_mask': mask[:, begin:end]}
            inputs |= {} if begin else {'tokens': tokens, 'mask': mask}
        else:
            inputs = {'tokens': tokens[:, begin:end], 'mask': mask[:, begin:end]}
        endpoints, collections = step(collections, inputs)
        cached = np.asarray(endpoints['lm_logits'])[:, 0]
        assert np.abs(cached - whole[:, end - 1]).max() <= 1e-5 * np.abs(whole).max()


def _logits(module, variables, tokens, mask):
    inputs = {'tokens': tokens, 'mask': mask}
    if hasattr(module.backbone, 'start_id'):
        inputs |= {'decoder_tokens': tokens, 'decoder_mask': mask}
    return module.apply(variables, inputs)['lm_logits']


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'mistral', 't5'])
def test_generates_what_transformers_does(name):
    model = {'mistral': 'llama', 't5': 't5_small'}.get(name, name)
    fields = {'mistral': dict(window=4), 't5': dict(decoder_depth=2)}.get(name, {})
    module, variables = small(model, **fields)
    with np.load(PARITY / 'golden' / 'generated.npz') as golden:
        expected = golden[name]
    for side in ('left', 'right'):
        tokens, mask = prompts(side)
        new = generate(module, variables, tokens, mask=mask, max_new_tokens=expected.shape[1])
        np.testing.assert_array_equal(new, expected, err_msg=side)


def test_generation_stops_and_draws():
    module, variables = small('gpt2')
    tokens, mask = prompts()
    free = np.asarray(generate(module, variables, tokens, mask=mask, max_new_tokens=6))
    eos = int(free[0, 2])
    ended = np.asarray(generate(module, variables, tokens, mask=mask, max_new_tokens=6, eos_id=eos, pad_id=36))
    for row, wanted in zip(ended, free, strict=True):
        stop = list(wanted).index(eos) + 1 if eos in wanted else 6
        assert row.tolist() == wanted[:stop].tolist() + [36] * (6 - stop)
    keys = jax.random.split(jax.random.key(0))
    draws = [generate(module, variables, tokens, max_new_tokens=6, temperature=2.0, key=key) for key in keys]
    assert np.any(draws[0] != draws[1])
    np.testing.assert_array_equal(
        draws[0], generate(module, variables, tokens, max_new_tokens=6, temperature=2.0, key=keys[0])
    )


def test_top_k_and_top_p():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    keys = jax.random.split(jax.random.key(0), 200)

    def drawn(**rule):
        return set(np.asarray(jax.vmap(lambda key: pick(logits, key, 1.0, **rule)[0])(keys)).tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_p=0.65) == {1, 3}
    assert drawn(top_p=0.75) == {1, 2, 3}
    assert drawn(top_p=0.01) == {1}
    assert drawn(top_k=3, top_p=0.5) == {1, 3}


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(max_new_tokens=0), 'generate.max_new_tokens: must be at least 1'),
        (dict(max_new_tokens=2.5), 'generate.max_new_tokens: must be an integer'),
        (dict(max_new_tokens=1, temperature='hot'), 'generate.temperature: must be a number'),
        (dict(max_new_tokens=1, temperature=float('nan')), 'generate.temperature: must not be negative'),
        (dict(max_new_tokens=1, top_k=3), 'generate.top_k: nothing is drawn at temperature 0'),
        (dict(max_new_tokens=1, top_p=0.5), 'generate.top_p: nothing is drawn at temperature 0'),
        (dict(max_new_tokens=1, eos_id='x'), 'generate.eos_id: must be an integer'),
        (dict(max_new_tokens=1, mask=np.ones((3, 4), bool)), r'generate.mask: is \[3, 4\], and the prompt \[3, 11\]'),
        (dict(max_new_tokens=1, temperature=1.0, key=3), 'generate.key: must be one key'),
        (dict(max_new_tokens=1, temperature=1.0), 'generate.key: drawing tokens needs one'),
        (dict(max_new_tokens=1, temperature=-1.0), 'generate.temperature: must not be negative'),
        (dict(max_new_tokens=1, top_k=38), r'generate.top_k: must be 1 … 37'),
        (dict(max_new_tokens=1, top_p=0.0), 'generate.top_p: must be above 0'),
        (dict(max_new_tokens=10), 'model.length: texts of 20 tokens'),
    ],
)
def test_generation_refuses(arguments, message):
    module, variables = small('gpt2')
    with pytest.raises(UserError, match=message):
        generate(module, variables, prompts()[0], **arguments)


@pytest.mark.parametrize(
    'name, fields, message',
    [
        ('gpt2', dict(heads=5), 'model.heads: 5 does not divide the width 24'),
        ('gpt2', dict(length=2), 'model.length: texts of 3 tokens'),
        ('gpt2', dict(activation='gelo'), "model.activation: there is no 'gelo'"),
        ('llama', dict(kv_heads=3), 'model.kv_heads: 3 does not divide the 4 heads'),
        ('llama', dict(head_dim=5), 'model.head_dim: 5 is odd'),
        ('llama', dict(rope_scaling='yarn'), 'model.rope_scaling'),
        ('t5_small', dict(buckets=64), 'model.buckets: 64'),
    ],
)
def test_fields_are_checked(name, fields, message):
    with pytest.raises(UserError, match=message):
        small(name, **fields)


@pytest.mark.parametrize('prompt', [np.zeros(4, np.int32), np.zeros((1, 4)), np.zeros((1, 0), np.int32)])
def test_a_prompt_is_a_batch_of_ids(prompt):
    module, variables = small('gpt2')
    with pytest.raises(UserError, match='generate.prompt: must be integers'):
        generate(module, variables, prompt, max_new_tokens=1)


def fields_of(**config):
    name = {'gpt2': 'gpt2', 't5': 't5_small'}.get(config['model_type'], 'llama')
    return maps.family_of(create_model(name).backbone).fields(config)


def test_config_files():
    assert fields_of(model_type='gpt2', n_embd=24, n_layer=3)['width'] == 24
    llama3 = dict(
        rope_type='llama3',
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    sizes = dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8)
    fields = fields_of(
        model_type='llama',
        vocab_size=128256,
        intermediate_size=8192,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=llama3,
        tie_word_embeddings=True,
        **sizes,
    )
    stated, named = create_model('llama', **fields).backbone, create_model('llama3_2_1b').backbone
    assert stated.clone(head_dim=None, name=None, parent=None) == named.clone(name=None, parent=None)
    assert fields_of(model_type='mistral')['window'] == 4096
    assert 'window' not in fields_of(model_type='qwen2', use_sliding_window=False)
    assert fields_of(model_type='gemma2', num_hidden_layers=4)['window_blocks'] == (1, 3)
    assert fields_of(model_type='llama', architectures=['LlamaForSequenceClassification'])['output'] == 'none'
    v1_1 = fields_of(model_type='t5', feed_forward_proj='gated-gelu', tie_word_embeddings=False)
    assert (v1_1['gated'], v1_1['activation'], v1_1['output']) == (True, 'gelu_tanh', 'dense')
    assert fields_of(model_type='bert') is None


@pytest.mark.parametrize(
    'config, message',
    [
        (dict(model_type='gpt2', scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx = True'),
        (dict(model_type='gpt2', activation_function='mish'), "activation_function 'mish' is unknown"),
        (dict(model_type='llama', rope_scaling=dict(rope_type='yarn', factor=2.0)), "rope_type 'yarn'"),
        (dict(model_type='llama', partial_rotary_factor=0.5), 'partial_rotary_factor'),
        (dict(model_type='gemma', use_bidirectional_attention=True), 'use_bidirectional_attention'),
        (dict(model_type='t5', is_encoder_decoder=False), 'is_encoder_decoder'),
    ],
)
def test_config_files_are_refused(config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        fields_of(**config)
