"""Attention transfer among wide ResNets on CIFAR-10; published: Zagoruyko & Komodakis 2017, arXiv:1612.03928, table 1.

Their figures are medians of five. Reproduced, a row gains 0.4 to 1.5 points over its student alone; see TABLES.md.
"""

from experiments.table import Cell

TITLE = 'Attention transfer among wide ResNets on CIFAR-10, test error'
SEEDS = 3
SELECTION = 'last'
METRIC = 'test/accuracy'
UNIT = 'error %'

SOURCE = 'table 1, from memory'
CONFIG = 'configs/attention_transfer.py'
ALONE = {'wrn_16_1': 8.77, 'wrn_16_2': 6.31, 'wrn_40_1': 6.58, 'wrn_40_2': 5.23}
TAUGHT = {
    ('wrn_16_1', 'wrn_16_2'): dict(at=7.93, kd=7.41, at_kd=7.51),
    ('wrn_16_1', 'wrn_40_1'): dict(at=8.25, kd=8.39, at_kd=8.01),
    ('wrn_16_2', 'wrn_40_2'): dict(at=5.85, kd=6.08, at_kd=5.71),
}
CELLS = [
    Cell('labels', network, f'{CONFIG}:{network}', published=error, tolerance=0.4, source=SOURCE)
    for network, error in ALONE.items()
] + [
    Cell(
        method,
        f'{teacher} → {student}',
        f'{CONFIG}:{student},{teacher},{method}',
        after=f'labels/{teacher}',
        into='objective.distilled.teacher.source',
        published=error,
        tolerance=0.4,
        source=SOURCE,
    )
    for (student, teacher), errors in TAUGHT.items()
    for method, error in errors.items()
]
RELATIONS = [f'at_kd/{t} → {s} < labels/{s}' for s, t in TAUGHT]
QUICK = {'stages[*].steps': 2}
