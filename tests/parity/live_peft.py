"""Adapters beside Hugging Face's `peft`, in both directions: `make parity`, or for some cases

    .venv-parity/bin/python -m pytest tests/parity/live_peft.py -k 'bert and dora'

A tiny network of transformers has random weights, and its adapter, made by `peft`, random ones too: at their start most
adapters do nothing. Its folder is read by us; what we write is read by `PeftModel.from_pretrained`. Logits of padded batches
agree each time.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import cases_bert
import cases_gpt2
import cases_llama
import jax
import numpy as np
import parity_harness as harness
import pytest

torch = pytest.importorskip('torch')
import torch_side  # noqa: E402, F401

peft = pytest.importorskip('peft')

from tl_jax.models import create_model  # noqa: E402
from tl_jax.objectives import Model  # noqa: E402
from tl_jax.peft import adapted, adapters_from  # noqa: E402
from tl_jax.peft.huggingface import load_peft, save_peft  # noqa: E402
from tl_jax.pretrained import account  # noqa: E402
from tl_jax.pretrained.tensors import Contents, Tensor  # noqa: E402
from tl_jax.trees import flatten, merge, unflatten  # noqa: E402

FIGURES = harness.HERE / 'figures_peft.json'
TOLERANCE = 2e-5


class Network(NamedTuple):
    """A network in both libraries.

    Attributes:
      name: of ours.
      fields: of ours.
      classes: of its head, None for none.
      reference: builds theirs.
      inputs: rng -> ours, and `torch_inputs` makes theirs of them.
      logits: our endpoint.
      task: what `peft` calls it; None for images.
      layers: names of modules for the roles in `METHODS`.
    """

    name: str
    fields: Mapping[str, Any]
    classes: int | None
    reference: Callable
    inputs: Callable
    torch_inputs: Callable
    logits: str
    task: str | None
    layers: Mapping[str, Any]


def vit():
    import transformers

    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=harness.CLASSES)
    return transformers.ViTForImageClassification(config)


def nchw(image):
    return {'pixel_values': torch.from_numpy(image.transpose(0, 3, 1, 2).copy())}


_BERT = dict(vocabulary=83, length=19, width=24, depth=3, heads=3, mlp_width=40, pool='pooler', segments=3)
_TEXTS = cases_bert.texts(3, length=13)  # and a prompt beside it
NETWORKS = {
    'bert': Network(
        'bert_tiny',
        _BERT,
        harness.CLASSES,
        lambda: cases_bert.reference('bert', 'SequenceClassification'),
        _TEXTS,
        cases_bert.torch_texts(),
        'logits',
        'SEQ_CLS',
        dict(query='query', value='value', hidden='output.dense', table='word_embeddings', head='classifier'),
    ),
    'gpt2': Network(
        'gpt2',
        {**cases_gpt2.SMALL, 'pad_id': 0},
        harness.CLASSES,
        lambda: cases_gpt2.reference(cases_gpt2.CLASSIFIER, pad_token_id=0, num_labels=harness.CLASSES),
        cases_gpt2.padded('left'),
        cases_gpt2.tensors,
        'logits',
        'SEQ_CLS',
        dict(query='attn.c_attn', value='attn.c_proj', hidden='mlp.c_proj', table='wte', head='score'),
    ),
    'llama': Network(
        'llama',
        {**cases_llama.SMALL, 'epsilon': 1e-6},
        None,
        lambda: cases_llama.reference('Llama'),
        cases_gpt2.padded('right'),
        cases_gpt2.tensors,
        'lm_logits',
        'CAUSAL_LM',
        dict(query='q_proj', value='v_proj', hidden='down_proj', table='embed_tokens', head='lm_head'),
    ),
    'vit': Network(
        'vit_base_patch16',
        dict(width=24, depth=2, heads=3, patch_size=8, image_size=32, mlp_width=40, epsilon=1e-12),
        harness.CLASSES,
        vit,
        harness.images(3, 32),
        nchw,
        'logits',
        None,
        dict(query='q_proj', value='v_proj', hidden='mlp.fc2', table='projection', head='classifier'),
    ),
}


def lora(layers, **fields):
    return peft.LoraConfig(r=3, lora_alpha=7, target_modules=[layers['query'], layers['value']], **fields)


METHODS = {
    'lora': lora,
    'rslora': lambda layers: lora(layers, use_rslora=True, modules_to_save=[layers['head']]),
    'dora': lambda layers: lora(layers, use_dora=True, use_rslora=True, bias='lora_only'),
    'patterns': lambda layers: peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=[layers['query'], layers['hidden'], layers['table']],
        rank_pattern={layers['hidden']: 2},
        alpha_pattern={layers['query']: 5},
        bias='all',
    ),
    'prompt': lambda layers: peft.PromptTuningConfig(num_virtual_tokens=4),
    'prefix': lambda layers: peft.PrefixTuningConfig(num_virtual_tokens=4),
    'prefix_projection': lambda layers: peft.PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=10
    ),
    'p_tuning': lambda layers: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=10),
    'ia3': lambda layers: peft.IA3Config(
        target_modules=[layers['query'], layers['value'], layers['hidden']],
        feedforward_modules=[layers['hidden']],
        modules_to_save=[layers['head']],
    ),
}


PROMPTS = ('prompt', 'prefix', 'prefix_projection', 'p_tuning')
CASES = [(network, method) for network in NETWORKS for method in METHODS if network != 'vit' or method not in PROMPTS]


@pytest.mark.parametrize(('network', 'method'), CASES)
def test_both_directions(network, method, tmp_path):
    case = NETWORKS[network]
    theirs, base = made(case, METHODS[method])
    inputs = case.inputs(np.random.default_rng(0))
    if method in PROMPTS and network == 'gpt2':
        # With a prompt peft drops the positions that padding on the left needs, and the classifier takes the last place.
        inputs = cases_gpt2.padded('none')(np.random.default_rng(0))
    wanted = logits(theirs, case.torch_inputs(inputs))
    theirs.save_pretrained(tmp_path / 'theirs')

    module = create_model(case.name, num_classes=case.classes, **case.fields)
    plain = harness_variables(module, inputs, base)
    ours, variables, sections = read(module, plain, inputs, tmp_path / 'theirs')
    apply = jax.jit(lambda v, x: ours.apply(v, x, train=False)[case.logits])
    mask = real(inputs, wanted)
    reading = harness.error(np.asarray(apply(variables, inputs))[mask], wanted[mask])
    assert reading <= TOLERANCE, reading
    without = logits(base_of(case, base)[0], case.torch_inputs(inputs))
    assert harness.error(without[mask], wanted[mask]) > 0.01, 'the adapter does nothing'

    # Ours differ from what was read, so that modules of theirs hold several unlike adapters of ours.
    variables = shaken(variables)
    got = np.asarray(apply(variables, inputs))
    flat = flatten(plain)
    trained = [p for p, leaf in flatten(variables).items() if p in flat and not np.array_equal(leaf, flat[p])]
    save_peft(tmp_path / 'ours', sections, variables, trained, module.backbone, sha256=64 * '0')
    loaded, _ = base_of(case, base)
    back = peft.PeftModel.from_pretrained(loaded, tmp_path / 'ours').eval()
    writing = harness.error(got[mask], logits(back, case.torch_inputs(inputs))[mask])
    assert writing <= TOLERANCE, writing
    write_figures(f'{network} {method}', {'theirs read by us': reading, 'ours read by peft': writing})


def base_of(case, state=None):
    """The network of transformers without an adapter, and its weights: random, biases and norms too, or those given."""
    model = case.reference().eval()
    if state is None:
        generator = torch.Generator().manual_seed(0)
        state = {
            name: value
            if not value.is_floating_point()
            else value + 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in model.state_dict().items()
        }
    model.load_state_dict(state)
    return model, {name: value.clone() for name, value in model.state_dict().items()}


def made(case, method):
    """`peft`'s model, whatever it trains random."""
    model, state = base_of(case)
    config = method(case.layers)
    config.task_type = case.task
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, state


def harness_variables(module, inputs, state):
    """Our variables with their weights."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    tensors = {k: Tensor(tuple(v.shape), np.dtype(np.float32), v.float().numpy) for k, v in state.items()}
    return account.fill(shapes, Contents(tensors), backbone=module.backbone)[0]


def read(module, plain, inputs, folder):
    """Our network with the adapter of a folder: the model, its variables, and the adapters' sections."""
    imported = load_peft(str(folder), module.backbone)
    base = Model(lambda key, inputs: plain, module.apply, None)
    ours = adapted(base, adapters_from(imported.adapters, type(module.backbone).__name__))
    variables = ours.init(jax.random.key(0), inputs)
    there = flatten(variables)
    for path, leaf in imported.leaves.items():
        assert there[path].shape == leaf.shape, path
    adapter_leaves = {path for path in there if '/adapters/' in path and path.startswith('params')}
    assert adapter_leaves <= set(imported.leaves)
    return ours, merge(variables, unflatten(imported.leaves)), imported.adapters


def shaken(variables):
    rng = np.random.default_rng(3)
    adapters = jax.tree.map(
        lambda x: np.asarray(x + 0.05 * rng.standard_normal(x.shape), np.float32), variables['params']['adapters']
    )
    return {**variables, 'params': {**variables['params'], 'adapters': adapters}}


def real(inputs, wanted):
    """Which logits count: not those at padding."""
    return np.asarray(inputs['mask']) if wanted.ndim == 3 else np.ones(len(wanted), bool)


def logits(model, arguments):
    """Their logits, of a text's tokens not those of a prompt before it."""
    with torch.no_grad():
        found = model(**arguments).logits.numpy()
    return found[:, -arguments['input_ids'].shape[1] :] if found.ndim == 3 else found


def write_figures(name, figures):
    stored = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    stored[name] = {key: float(f'{value:.1e}') for key, value in figures.items()}
    FIGURES.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + '\n')
