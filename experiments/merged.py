"""What merging makes of finished runs: soups, WiSE-FT, task arithmetic, TIES and DARE on MNIST → digits.

    python -m experiments.run regularised
    python -m experiments.merged [runs/regularised]

A seed's ingredients are its runs under six objectives (`INGREDIENTS`), which began with the same weights and saw the same
batches; all start from that seed's probe. 300 held-out images choose a scale, 897 others judge. Writes
`experiments/results/merged/`.
"""

import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from experiments.table import load_table
from tl_jax import workdir
from tl_jax.errors import UserError
from tl_jax.merged_runs import merge_runs

INGREDIENTS = ('full', 'label_smoothing', 'l1', 'l2', 'l2_sp', 'bss')
SCALES = [0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
# What is merged by what.
SINGLE = {'WiSE-FT of full': 'wise_ft(alpha=[0.2, 0.4, 0.6, 0.8])'}
SEVERAL = {
    'uniform soup': 'uniform_soup',
    'greedy soup': 'greedy_soup',
    'task arithmetic': f'task_arithmetic(scale={SCALES})',
    'TIES': f'ties(density=0.2, scale={SCALES})',
    'DARE': f'dare(rate=0.5, scale={SCALES})',
}
WITHOUT_START = ('uniform soup', 'greedy soup')
METRIC = 'test/accuracy'
RESULTS = Path(__file__).resolve().parent / 'results' / 'merged'


def of_seed(runs: Path, seed: int) -> dict[str, float]:
    """The accuracy of what is merged, and of what it is merged from, on the test images."""
    folder = lambda method: runs / f'{method}.digits' / f'seed{seed}'
    absent = next((folder(m) for m in ('probe', *INGREDIENTS) if not (folder(m) / 'summary.json').is_file()), None)
    if absent:
        raise UserError(f'{absent}: holds no finished run; python -m experiments.run regularised makes it')
    figures = {m: workdir.read_json(folder(m) / 'summary.json')['metrics'][METRIC] for m in ('probe', *INGREDIENTS)}
    config = workdir.read_json(folder('full') / 'config.json')
    with tempfile.TemporaryDirectory() as scratch:
        for name, method in (SINGLE | SEVERAL).items():
            files = [folder('full')] if name in SINGLE else [folder(m) for m in INGREDIENTS]
            start = None if name in WITHOUT_START else folder('probe')
            summary = merge_runs(config, files, start, method, Path(scratch) / name)
            figures[name] = summary['metrics'][METRIC]
    return figures


def table(found: Mapping[int, Mapping[str, float]]) -> str:
    """The results as markdown."""
    lines = [f'# {__doc__.splitlines()[0]}', '', f'Test accuracy %, seeds {", ".join(map(str, found))}.', '']
    lines += ['| network | mean | standard deviation |', '|---|---:|---:|']
    for name in next(iter(found.values())):
        values = [100 * figures[name] for figures in found.values()]
        lines.append(f'| {name} | {statistics.mean(values):.2f} | {statistics.stdev(values):.2f} |')
    return '\n'.join(lines) + '\n'


def main(arguments: list[str]) -> int:
    runs = Path(arguments[0] if arguments else 'runs/regularised')
    found = {seed: of_seed(runs, seed) for seed in load_table('regularised').seeds}
    RESULTS.mkdir(parents=True, exist_ok=True)
    told = {'command': f'python -m experiments.merged {runs}', **workdir.environment()}
    workdir.write_json(RESULTS / 'figures.json', {'accuracy': found, **told})
    workdir.write_atomically(RESULTS / 'table.md', table(found))
    print(table(found))
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
