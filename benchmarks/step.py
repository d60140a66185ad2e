"""Seconds a step takes: ours, the same network in plain Linen, and torch's, side by side in one process.

    python benchmarks/step.py --case=resnet18 [--case=vit_tiny …] [--what=full,head,infer] [--repeats=5] [--json=FILE]
        [--clock=cpu] [--only=ours,torch]

A full step differentiates, and moves by SGD, every parameter; a head step only the classifier's, the backbone being in
evaluation mode; an inference is a forward pass in that mode. "linen" is our own network with `nn.Conv`, `nn.BatchNorm` and
`nn.max_pool` put in the place of ours, where it has convolutions. "torch" is torchvision's, timm's or transformers' network,
eager and channels-last, and "torch_bf16" the same under autocast; they are left out, with a line, where not installed. The
implementations take turns, so that a busy machine slows all of them; the figures are medians, and the ratios are what to
read: above 1 ours is faster. Ours in bfloat16 is `ours_bf16`. On a machine that others use too, `taskset -c 1` and
`--clock=cpu` count the seconds that one core spends on the process, whoever else runs on it.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tl_jax.models import create_model, mobilenet, resnet

CLASSES = 10
LEARNING_RATE = 0.01
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


class Case(NamedTuple):
    """A network of ours, its batch, its images' pixels or its texts' tokens, and torch's network of that name."""

    model: str
    batch: int
    size: int
    reference: Callable[[], Any]
    text: bool = False


def _torchvision(name: str) -> Callable:
    return lambda: import_torchvision().models.get_model(name, weights=None, num_classes=CLASSES)


def _timm(name: str) -> Callable:
    def build():
        import_torchvision()
        import timm

        return timm.create_model(name, num_classes=CLASSES)

    return build


def _bert_mini():
    import_torchvision()  # which transformers imports, if it is there
    import transformers

    config = transformers.BertConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, num_labels=CLASSES
    )
    for name in ('hidden_dropout_prob', 'attention_probs_dropout_prob'):
        setattr(config, name, 0.0)
    model = transformers.BertForSequenceClassification(config)
    model.forward = functools.partial(type(model).forward, model, return_dict=False)
    return model


CASES = {
    'resnet18': Case('resnet18', 32, 64, _torchvision('resnet18')),
    'resnet50': Case('resnet50', 16, 224, _torchvision('resnet50')),
    'mobilenet_v2': Case('mobilenet_v2', 16, 224, _torchvision('mobilenet_v2')),
    'vit_tiny': Case('vit_tiny_patch16', 16, 224, _timm('vit_tiny_patch16_224')),
    'bert_mini': Case('bert_mini', 32, 128, _bert_mini, text=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', action='append', choices=list(CASES), help='all of them unless given')
    parser.add_argument('--what', default='full,head,infer')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--clock', choices=CLOCKS, default='wall', help='what counts as a second')
    parser.add_argument('--only', help='these implementations and ours; all of them unless given')
    parser.add_argument('--json', type=Path, help='also write the figures here')
    options = parser.parse_args()
    results = []
    for name in options.case or CASES:
        for what in options.what.split(','):
            results.append(run(name, what, options.repeats, options.clock, options.only))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + '\n')


def run(name: str, what: str, repeats: int, clock: str = 'wall', only: str | None = None) -> dict:
    """Measures one case, prints a line and returns the figures."""
    case = CASES[name]
    rng = np.random.default_rng(0)
    shape = (case.batch, case.size) if case.text else (case.batch, case.size, case.size, 3)
    inputs = rng.integers(1, 30000, shape, np.int32) if case.text else rng.standard_normal(shape, np.float32)
    label = rng.integers(0, CLASSES, case.batch)
    wanted = only.split(',') if only else ['ours', 'ours_bf16', 'linen', 'torch', 'torch_bf16']
    steps, now = {}, CLOCKS[clock]
    steps['ours'], flops = jax_step(case, what, inputs, label)
    if 'ours_bf16' in wanted:
        steps['ours_bf16'], _ = jax_step(case, what, inputs, label, dtype='bfloat16')
    if 'linen' in wanted and case.model.startswith(('resnet', 'mobilenet')):
        with plain_linen():
            steps['linen'], _ = jax_step(case, what, inputs, label)
    try:
        if 'torch' in wanted:
            steps['torch'] = torch_step(case, what, inputs, label)
        if 'torch_bf16' in wanted:
            steps['torch_bf16'] = torch_step(case, what, inputs, label, autocast=True)
    except ImportError as error:
        print(f'torch is left out: {error}')
    seconds = {implementation: [] for implementation in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for implementation, step in steps.items():
            start = now()
            step()
            seconds[implementation].append(now() - start)
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    parts = [f'{k} {medians[k]:.3f} s (min {min(v):.3f})' for k, v in seconds.items()]
    ratios = [f'{k}/ours {medians[k] / medians["ours"]:.2f}' for k in medians if k != 'ours']
    size = f'{case.size} {"tokens" if case.text else "px"}'
    print(
        f'{name} {what}, {size}, batch {case.batch}, {flops / 1e9:.1f} GFLOP: ' + ', '.join(parts + ratios), flush=True
    )
    return {'case': name, 'what': what, 'flops': flops, 'seconds': seconds, 'median': medians}


def jax_step(
    case: Case, what: str, inputs: np.ndarray, label: np.ndarray, dtype: str = 'float32'
) -> tuple[Callable, float]:
    """Returns a function that makes one step and waits for it, and XLA's count of the step's FLOPs."""
    model = create_model(case.model, num_classes=CLASSES, dtype=dtype)
    variables = jax.jit(lambda key: model.init(key, jnp.zeros(inputs.shape, inputs.dtype)))(jax.random.key(0))
    train = what == 'full'
    frozen = {} if train else {'backbone': variables['params']['backbone']}
    trainable = {k: v for k, v in variables['params'].items() if k not in frozen}

    def loss(trainable, frozen, batch_stats, inputs, label):
        variables = {'params': {**frozen, **trainable}, 'batch_stats': batch_stats}
        endpoints, updates = model.apply(variables, inputs, train=train, mutable=['batch_stats'])
        losses = optax.softmax_cross_entropy_with_integer_labels(endpoints['logits'], label)
        return losses.mean(), updates.get('batch_stats', {})

    def step(trainable, frozen, batch_stats, inputs, label):
        if what == 'infer':
            variables = {'params': {**frozen, **trainable}, 'batch_stats': batch_stats}
            return model.apply(variables, inputs)['logits']
        grads, batch_stats = jax.grad(loss, has_aux=True)(trainable, frozen, batch_stats, inputs, label)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, trainable, grads), batch_stats

    state = (trainable, variables.get('batch_stats', {}))
    inputs, label = jnp.asarray(inputs), jnp.asarray(label)
    compiled = jax.jit(step).lower(state[0], frozen, state[1], inputs, label).compile()

    def run_step():
        nonlocal state
        result = jax.block_until_ready(compiled(state[0], frozen, state[1], inputs, label))
        state = state if what == 'infer' else result

    return run_step, compiled.cost_analysis()['flops']


def plain_linen():
    """Puts Linen's own layers in the place of ours, in the families that are measured here."""

    def conv(features, kernel_size=3, strides=1, padding=0, *, groups=1, use_bias=False, dtype=None, name=None):
        return nn.Conv(
            features,
            (kernel_size, kernel_size),
            strides,
            padding,
            feature_group_count=groups,
            use_bias=use_bias,
            name=name,
        )

    def batch_norm(*, dtype=None, name=None):
        norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5, name=name)
        return lambda x, train: norm(x, use_running_average=not train)

    def max_pool(x, window, stride, padding=0):
        return nn.max_pool(x, (window, window), (stride, stride), ((padding, padding),) * 2)

    class Patches:
        def __enter__(self):
            self.patches = [
                mock.patch.multiple(resnet, Conv=conv, BatchNorm=batch_norm, max_pool=max_pool),
                mock.patch.multiple(mobilenet, Conv=conv, BatchNorm=batch_norm),
            ]
            for patch in self.patches:
                patch.start()

        def __exit__(self, *_):
            for patch in self.patches:
                patch.stop()

    return Patches()


@functools.cache
def import_torchvision() -> Any:
    """Returns torchvision; also where it came from another index than torch's, without its compiled operators."""
    import torch

    operators = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
        if not hasattr(torch.ops.torchvision, name):
            operators.define(f'{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor')
    import torchvision

    torchvision.operators = operators  # they live as long as the module does
    return torchvision


def torch_step(case: Case, what: str, inputs: np.ndarray, label: np.ndarray, autocast: bool = False) -> Callable:
    """Returns a function that makes one step with torch's network."""
    import torch

    model = case.reference()
    if not case.text:
        model = model.to(memory_format=torch.channels_last)
    train = what == 'full'
    model.train(train)
    if not train:
        classifier = next(getattr(model, n) for n in ('fc', 'classifier', 'head') if hasattr(model, n))
        model.requires_grad_(False)
        classifier.requires_grad_(True)
    x = torch.from_numpy(inputs).long() if case.text else torch.from_numpy(inputs).permute(0, 3, 1, 2)
    y = torch.from_numpy(label)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)

    def logits():
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            result = model(x)
        return (result[0] if isinstance(result, tuple) else result).float()

    def run_step():
        if what == 'infer':
            with torch.inference_mode():
                logits()
            return
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(), y).backward()
        optimizer.step()

    return run_step


if __name__ == '__main__':
    main()
