"""Text of ours beside that of transformers: greedy generation, token by token, from padded prompts; `make parity`.

With GOLDEN=1 in the environment the golden file, which tests/models/test_decoder_models.py reads, is written anew.
"""

import functools
import os

import cases_gpt2
import cases_llama
import cases_t5
import jax
import numpy as np
import parity_harness as harness
import pytest

torch = pytest.importorskip('torch')
import safetensors.torch  # noqa: E402
import torch_side  # noqa: E402, F401

from tl_jax.models import create_model  # noqa: E402
from tl_jax.models.generate import generate  # noqa: E402
from tl_jax.models.t5 import bucket  # noqa: E402
from tl_jax.pretrained import export_pretrained  # noqa: E402

GOLDEN = harness.HERE / 'golden' / 'generated.npz'
NEW = 7
_WINDOW = dict(sliding_window=4, rms_norm_eps=1e-5)
CASES = {
    'gpt2': ('gpt2', cases_gpt2.SMALL, cases_gpt2.reference),
    'llama': ('llama', cases_llama.SMALL, functools.partial(cases_llama.reference, 'Llama', rms_norm_eps=1e-5)),
    'mistral': (
        'llama',
        cases_llama.SMALL | dict(window=4),
        functools.partial(cases_llama.reference, 'Mistral', **_WINDOW),
    ),
    # As deep on both sides: transformers' cache has as many layers as the encoder.
    't5': (
        't5_small',
        cases_t5.SMALL | dict(decoder_depth=2),
        functools.partial(cases_t5.reference, num_decoder_layers=2),
    ),
}


def prompts():
    """Tokens of three lengths, padded on the left."""
    inputs = cases_gpt2.padded('left')(np.random.default_rng(1))
    return inputs['tokens'], inputs['mask']


def created(name):
    model, fields, reference = CASES[name]
    module = create_model(model, **fields)
    return module, harness.draw(jax.eval_shape(module.init, jax.random.key(0), prompts()[0])), reference


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('eos', [None, 'third'])
def test_greedy_generation(name, eos, tmp_path):
    module, variables, build = created(name)
    tokens, mask = prompts()
    reference = build().eval()
    export_pretrained(tmp_path / 'weights.safetensors', variables, module, 'transformers')
    outcome = reference.load_state_dict(safetensors.torch.load_file(tmp_path / 'weights.safetensors'), strict=False)
    assert not outcome.unexpected_keys
    if eos:
        # What the first text writes third, so that it stops early and the others later or never.
        eos = int(generate(module, variables, tokens, mask=mask, max_new_tokens=3)[0, 2])
    theirs = reference.generate(
        input_ids=torch.from_numpy(tokens).long(),
        attention_mask=torch.from_numpy(np.ascontiguousarray(mask)).long(),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    ).numpy()
    theirs = theirs[:, 1:] if name == 't5' else theirs[:, tokens.shape[1] :]
    ours = np.asarray(generate(module, variables, tokens, mask=mask, max_new_tokens=NEW, eos_id=eos))
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
    assert not ours[:, theirs.shape[1] :].any()
    if eos is None and os.environ.get('GOLDEN'):
        known = dict(np.load(GOLDEN)) if GOLDEN.exists() else {}
        np.savez_compressed(GOLDEN, **known | {name: theirs.astype(np.int32)})


@pytest.mark.parametrize('buckets, furthest', [(32, 128), (12, 15), (16, 1000)])
@pytest.mark.parametrize('both_sides', [True, False])
def test_buckets(buckets, furthest, both_sides):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-furthest - 50, furthest + 50)
    # Theirs are of keys from queries.
    theirs = T5Attention._relative_position_bucket(-torch.from_numpy(distances), both_sides, buckets, furthest)
    np.testing.assert_array_equal(bucket(distances, buckets, furthest, both_sides), theirs.numpy())


@pytest.mark.parametrize('kind', ['Llama', 'Gemma2'])
def test_left_padding(kind, tmp_path):
    """What real tokens become behind padding, sliding windows included."""
    case = next(c for c in cases_llama.CASES if c.name == {'Llama': 'llama3', 'Gemma2': 'gemma2'}[kind])
    case = case._replace(inputs=cases_gpt2.padded('left'))
    module, variables, inputs = harness.created(case)
    reference = case.reference().eval()
    export_pretrained(tmp_path / 'weights.safetensors', variables, module, 'transformers')
    reference.load_state_dict(safetensors.torch.load_file(tmp_path / 'weights.safetensors'), strict=False)
    with torch.no_grad():
        theirs = case.outputs(reference, case.torch_inputs(inputs))
    ours = harness.evaluated(module, variables, inputs)
    for name in theirs:
        pick = (lambda x: x) if theirs[name].ndim == 2 else (lambda x: x[inputs['mask']])
        assert harness.error(pick(ours[name]), pick(theirs[name].numpy())) <= case.tolerance, name
