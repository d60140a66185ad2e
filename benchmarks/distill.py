"""What a teacher costs a step: seconds of the student's plain step, with the teacher's word cached, and with the teacher asked.

    taskset -c 0 python benchmarks/distill.py [--teacher=resnet56] [--student=resnet20] [--batch=64] [--repeats=15]
        [--clock=cpu] [--json=FILE]

CIFAR's images, soft targets at temperature 4 beside the labels, SGD with momentum on every parameter of the student; each step
is the library's own (`create_train_step`).

    plain     the student on labels alone
    cached    the teacher's logits are a field of the batch; target: ≤ 1.05 × plain
    online    the teacher sees the batch too; target: ≤ 1.10 × (plain + teacher)
    teacher   its forward pass in evaluation mode alone

They take turns in one process, so that a busy machine slows all of them. Seconds are medians over the turns; so are the ratios,
of the seconds of one turn.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tl_jax.config import call
from tl_jax.experiment import learnable
from tl_jax.gradients import GRADIENTS
from tl_jax.networks import model_from
from tl_jax.objectives import Model, Objective, supervised, without_endpoints
from tl_jax.objectives.distillation.distilled import distilled
from tl_jax.optimizers import create_partition
from tl_jax.state import create_state, enter_stage
from tl_jax.step import create_train_step

CLASSES, SIZE = 10, 32
SGD = {'name': 'sgd', 'lr': 0.05, 'momentum': 0.9}
SOFT = {'name': 'soft_targets', 'temperature': 4.0, 'weight': 0.9}
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}
TARGETS = {'cached / plain': 1.05, 'online / (plain + teacher)': 1.10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--teacher', default='resnet56')
    parser.add_argument('--student', default='resnet20')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--clock', choices=CLOCKS, default='wall', help='what counts as a second')
    parser.add_argument('--json', type=Path, help='also write the figures here')
    options = parser.parse_args()
    steps = steps_of(options.teacher, options.student, options.batch)
    seconds = in_turns(steps, options.repeats, CLOCKS[options.clock])
    found = {'seconds': {name: statistics.median(turns) for name, turns in seconds.items()}, **ratios(seconds)}
    print(f'{options.teacher} → {options.student}, {options.batch} examples a step')
    for name, median in found['seconds'].items():
        print(f'{name:9} {1e3 * median:8.1f} ms')
    for name, target in TARGETS.items():
        print(f'{name} {found[name]:.3f} (target ≤ {target:.2f}{"" if found[name] <= target else ", MISSED"})')
    if options.json:
        options.json.write_text(json.dumps({**vars(options), **found, 'turns': seconds}, indent=1, default=str) + '\n')


def steps_of(teacher: str, student: str, examples: int) -> dict[str, Callable[[], Any]]:
    """Functions that make one step each, and wait for it."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((examples, SIZE, SIZE, 3), np.float32)
    batch = {'image': jnp.asarray(image), 'label': jnp.asarray(rng.integers(0, CLASSES, examples), jnp.int32)}
    pupil = network(student)
    plain = supervised(pupil, num_classes=CLASSES)
    names = tuple(map(str, range(CLASSES)))
    facts = {'model': pupil, 'num_classes': CLASSES, 'class_names': names, 'num_examples': {'train': examples}}
    taught = distilled(plain, **facts, terms=[SOFT], teacher=(network(teacher),), label_weight=0.1)
    variables = taught.init(jax.random.key(0), {'train': batch})
    (fixed,) = taught.fixed
    ask = jax.jit(fixed.endpoints)
    told = {f'teacher/{name}': said for name, said in ask(variables, batch).items() if name in fixed.reads}
    return {
        'plain': step_of(plain, plain.init(jax.random.key(0), {'train': batch}), batch),
        'cached': step_of(taught, variables, {**batch, **told}),
        'online': step_of(taught, variables, batch),
        'teacher': lambda: jax.block_until_ready([ask(variables, batch)[name] for name in fixed.reads]),
    }


def network(name: str) -> Model:
    return call(model_from, {'name': name}, 'config.model', classes=CLASSES, dtype=jnp.dtype('float32'), load=False)


def step_of(objective: Objective, variables: Mapping[str, Any], batch: Mapping[str, Any]) -> Callable[[], Any]:
    """The library's step of an objective."""
    partition = create_partition([('.*', SGD)], learnable(variables['params'], objective), steps=1000)
    state = enter_stage(create_state(variables, 0), partition, ema=0.0)
    step = create_train_step(without_endpoints(objective), GRADIENTS['plain'](), partition, 0.0, 0.0, steps=1000)
    compiled, held = jax.jit(step, donate_argnums=0), [jax.tree.map(jnp.copy, state)]

    def run():
        held[0], _ = jax.block_until_ready(compiled(held[0], {'train': batch}))

    return run


def in_turns(steps: Mapping[str, Callable], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """The seconds of each step in each turn, after one that compiles."""
    seconds = {name: [] for name in steps}
    for step in steps.values():
        step()
    for turn in range(repeats):
        for name in sorted(
            steps, reverse=turn % 2 == 1
        ):  # what a step finds in the processor's cache is not always the same
            start = clock()
            steps[name]()
            seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Medians over the turns of what the targets are about."""
    turns = [dict(zip(seconds, turn, strict=True)) for turn in zip(*seconds.values(), strict=True)]
    return {
        'cached / plain': statistics.median(t['cached'] / t['plain'] for t in turns),
        'online / (plain + teacher)': statistics.median(t['online'] / (t['plain'] + t['teacher']) for t in turns),
    }


if __name__ == '__main__':
    main()
