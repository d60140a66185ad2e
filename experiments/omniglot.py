"""Omniglot few-shot: ProtoNet on the split of Vinyals et al.

Published: Snell et al. 2017 (arXiv:1703.05175), table 1, after 20,000 episodes; oscarknagg/few-shot README at 672de83 reruns it
at 98.2 / 99.4 / 95.8 / 98.6. Shortened here to 800 episodes of 20 ways for a CPU, for which 5-way 5-shot ≥ 98.5 counts
as reproduced; `--only='full*'` is the whole protocol, for a GPU.
"""

from experiments.table import Cell

TITLE = 'Omniglot: ProtoNet (Snell et al. 2017, table 1)'
SEEDS = 1
SELECTION = 'val/accuracy'
UNIT = '%'

FIGURES = {(5, 1): (98.8, 0.6), (5, 5): (99.7, 0.6), (20, 1): (96.0, 1.0), (20, 5): (98.9, 0.6)}
SHORT = {(5, 5): (98.5, None)}
CELLS = [
    Cell(
        row,
        f'{ways}-way {shots}-shot',
        f'configs/omniglot.py:protonet,{shots}shot' + suffix,
        published=published,
        tolerance=tolerance,
        accept=SHORT.get((ways, shots)) if not suffix else None,
        source='table 1',
        metric=f'test_{ways}way_{shots}shot/accuracy',
    )
    for row, suffix in (('ProtoNet, 800 episodes', ''), ('full', ',full'))
    for (ways, shots), (published, tolerance) in FIGURES.items()
]
QUICK = {'stages[*].steps': 2}
