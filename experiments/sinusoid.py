"""Few-shot regression of sinusoids: the meta-learned start against one network for all curves.

Published: Li et al. 2017 (Meta-SGD, arXiv:1707.09835), table 1, one adaptation step; trained on 5 points, judged with 5, 10 and
20; ± is their 95 % interval over curves. From memory of the paper; not confirmed.
"""

from experiments.table import Cell

TITLE = 'Sinusoid regression after one step of adaptation, mean squared error (Meta-SGD, table 1)'
SEEDS = 3
SELECTION = 'last'
UNIT = 'MSE'

PUBLISHED = {
    'MAML': ('maml', {5: (1.13, 0.18), 10: (0.85, 0.14), 20: (0.71, 0.12)}),
    'Meta-SGD': ('metasgd', {5: (0.90, 0.16), 10: (0.63, 0.12), 20: (0.50, 0.10)}),
    'one network': ('pretrained', {5: (None, None), 10: (None, None), 20: (None, None)}),
}
# Meta-SGD's protocol for both, also from memory: curves that differ in frequency, 60,000 steps of four curves (MAML's own:
# one frequency, 70,000 of 25).
PROTOCOL = {
    **{f'data.{part}.frequency': [0.8, 1.2] for part in ('train', 'eval', *(f'test.test_{k}' for k in (5, 10, 20)))},
    'batch_size': 4,
    'stages[0].steps': 60_000,
}
CELLS = [
    Cell(
        row,
        f'{shots}-shot',
        f'configs/sinusoid.py:{method}',
        PROTOCOL,
        published=figure,
        tolerance=interval,
        source='Meta-SGD, table 1, from memory' if figure else '',
        metric=f'test_{shots}/mse_step1',
    )
    for row, (method, figures) in PUBLISHED.items()
    for shots, (figure, interval) in figures.items()
]
RELATIONS = [f'MAML/{k}-shot < 0.5 * one network/{k}-shot' for k in (5, 10, 20)] + ['Meta-SGD < MAML']
QUICK = {'stages[*].steps': 20}
