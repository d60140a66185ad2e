"""Milliseconds a convolution and its two gradients take on this CPU in each form: what `layers.choose_forms` goes by.

    python benchmarks/conv.py [--seconds=0.5]

For each shape and form: the output, the gradient with respect to the input, and that with respect to the kernel, each on its
own, the fastest of as many runs as fit in the seconds. The forms that the rule chooses are starred.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tl_jax.models.layers import Forms, Window, choose_forms, convolve

FORMS = ('xla', 'patches', 'taps', 'images')


class Case(NamedTuple):
    batch: int
    size: int
    channels: int
    features: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1


CASES = [
    Case(16, 56, 64, 256, kernel=1),
    Case(16, 14, 1024, 256, kernel=1),
    Case(32, 2, 512, 512),
    Case(32, 4, 256, 512, stride=2),
    Case(32, 4, 256, 256),
    Case(16, 7, 512, 512),
    Case(32, 8, 128, 128),
    Case(16, 14, 256, 256),
    Case(32, 16, 64, 64),
    Case(16, 56, 64, 64),
    Case(128, 32, 16, 16),
    Case(32, 64, 3, 64, kernel=7, stride=2),
    Case(16, 56, 144, 144, groups=144),
    Case(16, 7, 960, 960, groups=960),
    Case(16, 14, 256, 256, groups=32),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=0.5, help='spent on each figure')
    options = parser.parse_args()
    for case in CASES:
        print(describe(case), measure(case, options.seconds), sep='  ', flush=True)


def describe(case: Case) -> str:
    kind = f'{case.kernel}×{case.kernel}' + (f'/{case.stride}' if case.stride > 1 else '')
    groups = f', {case.groups} groups' if case.groups > 1 else ''
    return f'{kind}, {case.size}, {case.channels}→{case.features}, {case.batch}{groups}'.ljust(40)


def measure(case: Case, seconds: float) -> str:
    """Returns one line: for each form the three times."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((case.batch, case.size, case.size, case.channels), np.float32)
    kernel_shape = (case.kernel, case.kernel, case.channels // case.groups, case.features)
    kernel = rng.standard_normal(kernel_shape, np.float32)
    window = Window((case.stride,) * 2, ((case.kernel // 2,) * 2,) * 2, (1, 1), case.groups)
    chosen = choose_forms(x.shape, kernel.shape, window)
    parts = []
    for form in FORMS:

        def apply(x, kernel, form=form):
            return convolve(x, kernel, window, Forms(form, form, form))

        def input_gradient(g, kernel, apply=apply):
            return jax.vjp(lambda x: apply(x, kernel), jnp.zeros(x.shape))[1](g)

        def kernel_gradient(x, g, apply=apply):
            return jax.vjp(lambda kernel: apply(x, kernel), jnp.zeros(kernel.shape))[1](g)

        g = np.ones(jax.eval_shape(apply, x, kernel).shape, np.float32)
        runs = ((apply, (x, kernel)), (input_gradient, (g, kernel)), (kernel_gradient, (x, g)))
        times = [fastest(jax.jit(f), map(jnp.asarray, operands), seconds) for f, operands in runs]
        stars = ['*' if c == form else ' ' for c in chosen]
        parts.append(f'{form} ' + ' '.join(f'{t:6.1f}{star}' for t, star in zip(times, stars, strict=True)))
    return ' | '.join(parts)


def fastest(function, operands, seconds: float) -> float:
    """Returns milliseconds."""
    operands = tuple(operands)
    jax.block_until_ready(function(*operands))
    best, end = float('inf'), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        jax.block_until_ready(function(*operands))
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            return 1000 * best


if __name__ == '__main__':
    main()
