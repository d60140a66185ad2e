"""The BiT-HyperRule beside its source, at every boundary: `experiments/results/bit_hyperrule.md`.

    python -m experiments.bit_hyperrule

The source is google-research/big_transfer at 140de6e: `bit_hyperrule.py` (sizes, mixup, schedule), `bit_jax/train.py` (its
step s uses the rate of s, from 0) and `bit_common.py` (batch of 512); its figures are written below as published. Ours are
what `tl_jax.stages` gives a run: `bit_rule`, and the learning rate of the stage that `recipe='bit_hyperrule'` stands for.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from tl_jax.optimizers import create_schedule
from tl_jax.stages import bit_hyperrule, bit_rule
from tl_jax.workdir import write_atomically

OUTPUT = Path(__file__).resolve().parent / 'results' / 'bit_hyperrule.md'
# Least number of examples -> steps, warm-up, decays after, mixup.
PUBLISHED = {
    0: (500, 100, (200, 300, 400), 0.0),
    20_000: (10_000, 500, (3_000, 6_000, 9_000), 0.1),
    500_000: (20_000, 500, (6_000, 12_000, 18_000), 0.1),
}
# Height, width -> sides before and after the crop.
SIDES = {(32, 32): (160, 128), (95, 97): (160, 128), (96, 95): (160, 128), (96, 96): (512, 480), (224, 224): (512, 480)}
SIZES = (1, 10, 1_000, 19_999, 20_000, 50_000, 499_999, 500_000, 1_281_167)


def published_of(num_examples: int) -> tuple[int, int, tuple[int, ...], float]:
    return PUBLISHED[max(least for least in PUBLISHED if least <= num_examples)]


def published_rate(step: int, num_examples: int) -> float:
    """The learning rate that the source takes at a step, from 0."""
    _, warmup, decays, _ = published_of(num_examples)
    return 0.003 * step / warmup if step < warmup else 0.003 / 10 ** sum(decay < step for decay in decays)


def rate_of(num_examples: int) -> Callable[[int], float]:
    """Ours."""
    (stage,) = bit_hyperrule(num_examples=num_examples)
    schedule = create_schedule(stage['train']['optimizer']['lr'], steps=stage['steps'])
    return lambda step: float(schedule(step))


def rows() -> Iterable[tuple[str, str, str, str]]:
    """What is asked, published, ours, and whether they agree."""
    for size in SIZES:
        rule, theirs = bit_rule(size), published_of(size)
        ours = rule.steps, rule.warmup, rule.decays, rule.mixup
        yield f'{size:,} examples: steps, warm-up, decays, mixup', *map(str, (theirs, ours)), _mark(theirs == ours)
    for (height, width), theirs in SIDES.items():
        rule = bit_rule(1, height, width)
        yield f'{height}×{width}: resize, crop', *map(str, (theirs, rule[:2])), _mark(theirs == rule[:2])
    yield 'batch size', '512', str(rule.batch_size), _mark(rule.batch_size == 512)
    for size in PUBLISHED:
        steps, warmup, decays, _ = published_of(size)
        ours = rate_of(size)
        for step in (0, 1, warmup - 1, warmup, *(d + i for d in decays for i in (0, 1)), steps - 1):
            pair = published_rate(step, size), ours(step)
            # float32 rounds the warm-up to a ten-millionth of the peak.
            yield (
                f'{size:,} examples: rate of step {step:,}',
                *(f'{x:.7f}' for x in pair),
                _mark(abs(pair[0] - pair[1]) < 1e-9),
            )


def main() -> None:
    lines = ['# BiT-HyperRule (Kolesnikov et al. 2020, arXiv:1912.11370): the rule itself', '']
    lines += ['| | published (big_transfer @140de6e) | ours | |', '| --- | --- | --- | --- |']
    found = list(rows())
    lines += [f'| {" | ".join(row)} |' for row in found]
    lines += [
        '',
        f'{sum(row[-1] == _mark(True) for row in found)} of {len(found)} agree; made by `python -m experiments.bit_hyperrule`.',
    ]
    text = '\n'.join(lines) + '\n'
    write_atomically(OUTPUT, text)
    print(text)


def _mark(same: bool) -> str:
    return '✓' if same else '✗'


if __name__ == '__main__':
    main()
