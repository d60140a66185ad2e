"""Seconds a training step takes: ours, the same network in plain Linen, and torch's, side by side in one process.

    python benchmarks/step.py --case=resnet18 [--case=resnet50 …] [--what=full,head] [--repeats=5] [--json=FILE]

A full step differentiates, and moves by SGD, every parameter; a head step only the classifier's, the backbone being in
evaluation mode. "Linen" is our own network with `nn.Conv`, `nn.BatchNorm` and `nn.max_pool` put in the place of ours. torch
(torchvision's network, channels-last) is left out, with a line, where it is not installed. The implementations take turns, so
that a busy machine slows all of them; the figures are medians, and the ratios are what to read. Float32.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
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


class Case(NamedTuple):
    model: str
    batch: int
    size: int  # pixels


CASES = {
    'resnet18': Case('resnet18', 32, 64),
    'resnet50': Case('resnet50', 16, 224),
    'mobilenet_v2': Case('mobilenet_v2', 16, 224),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', action='append', choices=list(CASES), help='all of them unless given')
    parser.add_argument('--what', default='full,head')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--json', type=Path, help='also write the figures here')
    options = parser.parse_args()
    results = []
    for name in options.case or CASES:
        for what in options.what.split(','):
            results.append(run(name, what, options.repeats))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + '\n')


def run(name: str, what: str, repeats: int) -> dict:
    """Measures one case, prints a line and returns the figures."""
    case = CASES[name]
    rng = np.random.default_rng(0)
    image = rng.standard_normal((case.batch, case.size, case.size, 3), np.float32)
    label = rng.integers(0, CLASSES, case.batch)
    steps, flops = {}, None
    steps['ours'], flops = jax_step(case, what, image, label)
    with plain_linen():
        steps['linen'], _ = jax_step(case, what, image, label)
    try:
        steps['torch'] = torch_step(case, what, image, label)
    except ImportError as error:
        print(f'torch is left out: {error}')
    seconds = {implementation: [] for implementation in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for implementation, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[implementation].append(time.perf_counter() - start)
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    parts = [f'{k} {medians[k]:.3f} s (min {min(v):.3f})' for k, v in seconds.items()]
    ratios = [f'{k}/ours {medians[k] / medians["ours"]:.2f}' for k in medians if k != 'ours']
    print(
        f'{name} {what}, {case.size} px, batch {case.batch}, {flops / 1e9:.1f} GFLOP: ' + ', '.join(parts + ratios),
        flush=True,
    )
    return {'case': name, 'what': what, 'flops': flops, 'seconds': seconds, 'median': medians}


def jax_step(case: Case, what: str, image: np.ndarray, label: np.ndarray) -> tuple[Callable, float]:
    """Returns a function that makes one step and waits for it, and XLA's count of the step's FLOPs."""
    model = create_model(case.model, num_classes=CLASSES)
    variables = jax.jit(lambda key: model.init(key, jnp.zeros(image.shape)))(jax.random.key(0))
    train = what == 'full'
    frozen = {} if train else {'backbone': variables['params']['backbone']}
    trainable = {k: v for k, v in variables['params'].items() if k not in frozen}

    def loss(trainable, frozen, batch_stats, image, label):
        variables = {'params': {**frozen, **trainable}, 'batch_stats': batch_stats}
        endpoints, updates = model.apply(variables, image, train=train, mutable=['batch_stats'])
        losses = optax.softmax_cross_entropy_with_integer_labels(endpoints['logits'], label)
        return losses.mean(), updates['batch_stats']

    def step(trainable, frozen, batch_stats, image, label):
        grads, batch_stats = jax.grad(loss, has_aux=True)(trainable, frozen, batch_stats, image, label)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, trainable, grads), batch_stats

    state = (trainable, variables['batch_stats'])
    image, label = jnp.asarray(image), jnp.asarray(label)
    compiled = jax.jit(step).lower(state[0], frozen, state[1], image, label).compile()

    def run_step():
        nonlocal state
        state = jax.block_until_ready(compiled(state[0], frozen, state[1], image, label))

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
def import_torch() -> tuple:
    """Returns torch, torchvision and what must live as long as they do."""
    import torch

    # A torchvision from another index than torch's comes without its compiled operators, and asks for these.
    operators = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
        if not hasattr(torch.ops.torchvision, name):
            operators.define(f'{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor')
    import torchvision

    return torch, torchvision, operators


def torch_step(case: Case, what: str, image: np.ndarray, label: np.ndarray) -> Callable:
    """Returns a function that makes one step with torchvision's network."""
    torch, torchvision = import_torch()[:2]
    model = getattr(torchvision.models, case.model)(num_classes=CLASSES).to(memory_format=torch.channels_last)
    train = what == 'full'
    model.train(train)
    if not train:
        classifier = model.fc if hasattr(model, 'fc') else model.classifier
        model.requires_grad_(False)
        classifier.requires_grad_(True)
    x = torch.from_numpy(image).permute(0, 3, 1, 2)  # channels-last already
    y = torch.from_numpy(label)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)

    def run_step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run_step


if __name__ == '__main__':
    main()
