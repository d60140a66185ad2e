"""What a fine-tuning step costs: seconds, memory and optimizer bytes of full, head-only, bias-only, LoRA and QLoRA steps.

    taskset -c 1 python benchmarks/finetune.py [--case=bert_mini] [--what=full,head,…] [--repeats=7] [--clock=cpu] [--json=FILE]

Ours is the library's own step (`create_train_step`) with Adam on what the rules train, LoRA of rank 8 on queries and values;
beside it torch's eager network with the same parameters free, `peft`'s LoRA where that is installed. torch has no 4-bit
layers on a CPU, so QLoRA stands alone. Everything takes turns in one process, so that a busy machine slows all of it; the
figures are medians, and the ratios to the full step of the same implementation are what to read:

    step        share of the full step's seconds; targets: lora and bias ≤ 0.70, head ≤ 0.36
    kept        MB of activations held for the backward pass, without parameters
    peak        MB of everything at once, as XLA plans it or torch's allocator has it: parameters, optimizer, gradients,
                activations
    optimizer   MB of Adam's moments
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step import CASES, CLASSES, Case
from tl_jax import trees
from tl_jax.config import call
from tl_jax.experiment import bytes_of
from tl_jax.gradients import GRADIENTS
from tl_jax.networks import model_from
from tl_jax.objectives import supervised
from tl_jax.optimizers import create_partition
from tl_jax.state import create_state, enter_stage
from tl_jax.step import create_train_step, progress

ADAM = {'name': 'adam', 'lr': 1e-4}
LORA = {'name': 'lora', 'rank': 8}
# name: fields of the model, regex of what learns
WHAT = {
    'full': ({}, '.*'),
    'head': ({}, 'head/.*'),
    'bias': ({}, '.*/bias|head/.*'),
    'lora': ({'peft': LORA}, '(adapters|head)/.*'),
    'qlora': ({'peft': LORA, 'quantize': {'name': 'nf4'}}, '(adapters|head)/.*'),
}
TARGETS = {'head': 0.36, 'bias': 0.70, 'lora': 0.70}
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


class Step(NamedTuple):
    """A function that makes one step and waits for it, and bytes: activations kept, all at once, moments."""

    run: Callable[[], None]
    kept: int
    peak: int
    optimizer: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', action='append', choices=['bert_mini', 'vit_tiny'], help='both unless given')
    parser.add_argument('--what', default=','.join(WHAT))
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--clock', choices=CLOCKS, default='wall', help='what counts as a second')
    parser.add_argument('--json', type=Path, help='also write the figures here')
    options = parser.parse_args()
    results = [
        row
        for name in options.case or ('bert_mini', 'vit_tiny')
        for row in measure(name, options.what.split(','), options.repeats, CLOCKS[options.clock])
    ]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + '\n')


def measure(name: str, kinds: list[str], repeats: int, clock: Callable[[], float]) -> list[dict]:
    """Measures a case, prints a line for each kind of step and implementation, and returns the figures."""
    case = CASES[name]
    rng = np.random.default_rng(0)
    shape = (case.batch, case.size) if case.text else (case.batch, case.size, case.size, 3)
    inputs = rng.integers(1, 30000, shape, np.int32) if case.text else rng.standard_normal(shape, np.float32)
    label = rng.integers(0, CLASSES, case.batch).astype(np.int32)
    steps = {}
    for kind in kinds:
        steps['ours', kind] = our_step(case, kind, inputs, label)
        try:
            steps['torch', kind] = torch_step(case, kind, inputs, label)
        except (ImportError, NotImplementedError) as error:
            print(f'{name} {kind}: torch is left out: {error}', flush=True)
    for step in steps.values():
        step.run()
    seconds = {which: [] for which in steps}
    for _ in range(repeats):
        for which, step in steps.items():
            start = clock()
            step.run()
            seconds[which].append(clock() - start)
    rows = []
    for (who, kind), step in steps.items():
        median = statistics.median(seconds[who, kind])
        share = median / statistics.median(seconds[who, 'full']) if (who, 'full') in seconds else None
        rows.append({'case': name, 'who': who, 'what': kind, 'median': median, 'share_of_full': share, **_bytes(step)})
        rows[-1]['seconds'] = seconds[who, kind]
        print(_line(rows[-1]), flush=True)
    return rows


def _bytes(step: Step) -> dict[str, int]:
    return {'kept': step.kept, 'peak': step.peak, 'optimizer': step.optimizer}


def _line(row: dict) -> str:
    share, target = row['share_of_full'], TARGETS.get(row['what']) if row['who'] == 'ours' else None
    of_full = '' if share is None else f'  {share:.2f} of full'
    met = '' if target is None or share is None else f' (target ≤ {target:.2f}{"" if share <= target else ", MISSED"})'
    return (
        f'{row["case"]:9} {row["who"]:5} {row["what"]:5} {1e3 * row["median"]:8.1f} ms{of_full}{met}'
        f'  kept {row["kept"] / 1e6:.1f} MB  peak {row["peak"] / 1e6:.1f} MB  optimizer {row["optimizer"] / 1e6:.2f} MB'
    )


def our_step(case: Case, kind: str, inputs: np.ndarray, label: np.ndarray) -> Step:
    """The library's step of one kind."""
    fields, rule = WHAT[kind]
    section = {'name': case.model, **fields}
    model = call(model_from, section, 'config.model', classes=CLASSES, dtype=jnp.dtype('float32'), load=False)
    objective = supervised(model, num_classes=CLASSES)
    batch = {'train': {'tokens' if case.text else 'image': jnp.asarray(inputs), 'label': jnp.asarray(label)}}
    variables = objective.init(jax.random.key(0), batch)
    partition = create_partition([(rule, ADAM)], variables['params'], steps=1000)
    state = enter_stage(create_state(variables, 0), partition, ema=0.0)
    step = create_train_step(objective, GRADIENTS['plain'](), partition, 0.0, 0.0, steps=1000)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    plan = compiled.memory_analysis()
    peak = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    held = [state]

    def run():
        held[0], _ = jax.block_until_ready(compiled(held[0], batch))

    return Step(run, _residuals(objective, variables, partition, batch), peak, bytes_of(state.opt_state))


def _residuals(objective: Any, variables: Any, partition: Any, batch: Any) -> int:
    """Bytes that the backward pass keeps from the forward pass, before XLA fuses any away."""
    trained, frozen = trees.split(variables['params'], partition.trainable.__contains__)

    def residuals(trained, frozen, batch):
        others = {name: tree for name, tree in variables.items() if name != 'params'}
        loss = lambda trained: objective.loss(
            {'params': trees.merge(frozen, trained), **others, **progress(0, 1)}, batch, jax.random.key(0)
        )[0]
        return jax.vjp(loss, trained)[1]

    kept = jax.eval_shape(residuals, trained, frozen, batch)
    return max(bytes_of(kept) - bytes_of(variables['params']), 0)


def torch_step(case: Case, kind: str, inputs: np.ndarray, label: np.ndarray) -> Step:
    """torch's step of one kind."""
    import torch

    if kind == 'qlora':
        raise NotImplementedError('it has no 4-bit layers on a CPU')
    network = case.reference()
    names = dict(network.named_parameters())
    head = next(name for name in ('classifier', 'head', 'fc') if any(p.startswith(f'{name}.') for p in names))
    if kind == 'lora':
        import peft

        targets = ['query', 'value'] if case.text else ['qkv']  # timm's is one product, of which LoRA moves all three
        network = peft.get_peft_model(
            network, peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets, modules_to_save=[head])
        )
    else:
        free = {'full': lambda n: True, 'head': lambda n: n.startswith(f'{head}.')}
        free['bias'] = lambda n: n.endswith('.bias') or n.startswith(f'{head}.')
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(free[kind](name))
    network.train()
    x = torch.from_numpy(inputs).long() if case.text else torch.from_numpy(inputs).permute(0, 3, 1, 2)
    y = torch.from_numpy(label).long()
    learning = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, 1e-4)

    def forward():
        result = network(x)
        return torch.nn.functional.cross_entropy(result[0] if isinstance(result, tuple) else result, y)

    def run():
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    run()
    moments = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
    before = moments + sum(t.nbytes for t in (*network.parameters(), *network.buffers(), *(p.grad for p in learning)))
    return Step(run, _saved(forward, network), before + _most(run), moments)


def _most(run: Callable[[], None]) -> int:
    """The most bytes that torch's allocator has at once during a step, beyond those it had before."""
    import torch

    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


def _saved(forward: Callable, network: Any) -> int:
    """Bytes of the tensors that torch's graph holds, each storage once, without the network's own."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    held: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
        total = sum(held.values())
        del loss
    return total


if __name__ == '__main__':
    main()
