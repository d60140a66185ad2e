"""VTAB-1k by BiT and its hyper-rule, test accuracy after 500 steps on a thousand images.

Published: google-research/big_transfer README at 140de6e, "VTAB-1k results", re-runs of the authors, which are means over the
groups; none for R50x1. No spread is given there: the tolerance of 1.0 is ours. Not run: see configs/vtab.py for what it takes.
"""

from configs.vtab import NETWORKS, TASKS
from experiments.table import Cell, Mean

TITLE = 'VTAB-1k: BiT by its hyper-rule (Kolesnikov et al. 2020)'
SEEDS = 3
SELECTION = 'last'
METRIC = 'test/accuracy'
UNIT = '%'

README = 'big_transfer README @140de6e'
PUBLISHED = {'R101x3': {'natural': 80.29, 'specialized': 85.75, 'structured': 59.40, '': 72.65}}
CELLS = [
    Cell(network, f'{task.group}: {name}', f'configs/vtab.py:{network},{name}')
    for network in NETWORKS
    for name, task in TASKS.items()
]
MEANS = [
    Mean(
        network,
        of=f'{network}/{group}*',
        column=f'mean {group}'.strip(),
        published=PUBLISHED.get(network, {}).get(group),
        tolerance=1.0,
        source=README if network in PUBLISHED else '',
    )
    for network in NETWORKS
    for group in ('natural', 'specialized', 'structured', '')
]
QUICK = {
    'stages': [dict(name='two steps', steps=2, train=[('.*', dict(name='momentum', lr=0.003))])],
    'batch_size': 4,
    'gradient': dict(name='plain'),
}
