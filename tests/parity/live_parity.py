"""Live parity with torch, torchvision, timm and transformers: `make parity`, or for some cases

    .venv-parity/bin/python -m pytest tests/parity/live_parity.py -k vit

Figures go to `figures.json`; with GOLDEN=1 in the environment the cases' golden files are written anew.
"""

import json
import os
import re

import jax
import numpy as np
import parity_harness as harness
import pytest

torch = pytest.importorskip('torch')
import safetensors.torch  # noqa: E402
import torch_side  # noqa: E402, F401

from tl_jax.pretrained import export_pretrained, load_pretrained, maps  # noqa: E402
from tl_jax.pretrained.export import foreign_tensors  # noqa: E402
from tl_jax.trees import flatten  # noqa: E402

FIGURES = harness.HERE / 'figures.json'
GRADIENT = 1e-3
BFLOAT16 = 5e-2


@pytest.mark.parametrize('case', harness.cases(), ids=lambda case: case.name)
def test_parity(case, tmp_path):
    module, variables, inputs = harness.created(case)
    reference = given(case, module, variables, tmp_path / 'exported.safetensors').eval()
    torch_inputs = (case.torch_inputs or nchw)(inputs)

    assert_reads_back(case, module, variables, reference, tmp_path / 'saved.pth')
    with torch.no_grad():
        wanted = as_ours(case.outputs(reference, torch_inputs))
    ours = harness.evaluated(module, variables, inputs)
    missing = [name for name in wanted if name not in ours]
    assert not missing, f'our endpoints are {list(ours)}'
    figures = {name: harness.error(ours[name], value) for name, value in wanted.items()}
    assert all(figure <= case.tolerance for figure in figures.values()), figures

    half = harness.evaluated(*in_bfloat16(case, variables), inputs)
    figures_bf16 = {name: harness.error(half[name], value) for name, value in wanted.items()}
    last = list(wanted)[-1]
    assert figures_bf16[last] <= BFLOAT16, figures_bf16

    statistics = trained_error(case, module, variables, inputs, reference, torch_inputs) if case.train else None
    gradient = gradient_error(case, module, variables, inputs, reference.double(), torch_inputs, wanted)
    write_figures(
        case,
        {
            'outputs': max(figures.values()),
            'gradient': gradient,
            'bfloat16': figures_bf16[last],
            **({'training': statistics} if statistics is not None else {}),
        },
    )
    if case.golden and os.environ.get('GOLDEN'):
        harness.golden_path(case).parent.mkdir(exist_ok=True)
        np.savez_compressed(harness.golden_path(case), **{name: harness.sample(v) for name, v in wanted.items()})


def given(case, module, variables, path):
    """The reference with our weights, through a file that we exported, every tensor of its state accounted for."""
    reference = case.reference()
    export_pretrained(path, variables, module, case.origin)
    outcome = reference.load_state_dict(safetensors.torch.load_file(path), strict=False)
    assert not outcome.unexpected_keys, outcome.unexpected_keys[:10]
    allowed = (*case.absent, r'(.*\.)?num_batches_tracked')
    missing = [
        name
        for name in outcome.missing_keys
        if not any(re.fullmatch(regex, name) for regex in allowed) and case.tied.get(name) is None
    ]
    assert not missing, missing[:10]
    return reference


def assert_reads_back(case, module, variables, reference, path):
    """What the reference saves, we read, to the bit; in bfloat16 as well."""
    torch.save(reference.state_dict(), path)
    loaded = load_pretrained(case.model, path, case.num_classes, image_shape=None, **shape_of(case), **case.fields)
    jax.tree.map(np.testing.assert_array_equal, dict(loaded), dict(variables))
    half = {name: tensor.bfloat16() for name, tensor in reference.state_dict().items() if tensor.is_floating_point()}
    half_path = path.with_suffix('.safetensors')
    safetensors.torch.save_file({name: t.clone().contiguous() for name, t in half.items()}, half_path)
    loaded = load_pretrained(case.model, half_path, case.num_classes, **shape_of(case), **case.fields)
    jax.tree.map(np.testing.assert_array_equal, dict(loaded), harness.bfloat16(dict(variables)))


def shape_of(case):
    """What to initialise with."""
    return {'inputs': case.inputs(np.random.default_rng(0))}


def in_bfloat16(case, variables):
    module, _, _ = harness.created(case, dtype='bfloat16')
    return module, variables


def trained_error(case, module, variables, inputs, reference, torch_inputs):
    """The largest error of the outputs in training mode and of the statistics that it moves."""
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    with torch.no_grad():
        wanted = as_ours(case.outputs(reference.train(), torch_inputs))
    ours, statistics = harness.trained(module, variables, inputs)
    errors = [harness.error(ours[name], value) for name, value in wanted.items()]
    names = maps.name_map(case.origin, module.backbone)
    moved = reference.state_dict()
    for name, value in foreign_tensors(flatten({'batch_stats': statistics}), names).items():
        errors.append(harness.error(value, moved[name].numpy()))
    reference.load_state_dict(before)
    reference.eval()
    assert max(errors) <= 10 * case.tolerance, max(errors)
    return max(errors)


def gradient_error(case, module, variables, inputs, reference, torch_inputs, wanted):
    """The largest error of any parameter's gradient, against torch in float64."""
    doubled = jax.tree.map(lambda x: x.double() if torch.is_floating_point(x) else x, torch_inputs)
    reference.zero_grad()
    outputs = case.outputs(reference, doubled)
    harness.objective(outputs).backward()
    ours = harness.gradient(module, variables, inputs, list(wanted))
    names = maps.name_map(case.origin, module.backbone)
    parameters = dict(reference.named_parameters())
    theirs = {name: p.grad.numpy() for name, p in parameters.items() if p.grad is not None}
    scale = max(np.abs(grad).max() for grad in theirs.values())
    errors = {}
    for name, grad in foreign_tensors(flatten({'params': ours}), names).items():
        name = name if name in parameters else case.tied.get(name, name)
        if name not in theirs:
            assert not np.any(grad), f'{name}: has a gradient here and none there'
            continue
        # A gradient that is zero but for rounding is measured against the others.
        small = np.abs(theirs[name]).max() < 1e-6 * scale
        errors[name] = np.abs(grad - theirs[name]).max() / scale if small else harness.error(grad, theirs[name])
    worst = max(errors, key=errors.get)
    assert errors[worst] <= GRADIENT, (worst, errors[worst])
    return float(errors[worst])


def nchw(image):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def as_ours(outputs):
    """Torch's outputs as numpy, maps as NHWC."""
    arrays = {name: value.detach().float().numpy() for name, value in outputs.items()}
    return {name: a.transpose(0, 2, 3, 1) if a.ndim == 4 else a for name, a in arrays.items()}


def write_figures(case, figures):
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    known[case.name] = {'origin': case.origin} | {name: float(f'{value:.2g}') for name, value in figures.items()}
    partial = FIGURES.with_suffix(f'.{os.getpid()}')
    partial.write_text(json.dumps(dict(sorted(known.items())), indent=1) + '\n')
    os.replace(partial, FIGURES)
