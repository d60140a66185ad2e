"""MultiMNIST: ways to weigh two tasks that share a LeNet, shortened to 15 of the paper's 100 epochs.

Published: Sener & Koltun 2018 (arXiv:1810.04650), table 2, after 100 epochs on their own draw of the set; from memory of the
paper. The tolerance of 0.6 is meant for 100 epochs; here the distance is shown against the same figures.
"""

from experiments.table import Cell

TITLE = 'MultiMNIST, 15 epochs (Sener & Koltun 2018, table 2, 100 epochs)'
SEEDS = 1
SELECTION = 'last'
UNIT = '%'

SHARED = {
    'uniform': ('uniform', 96.46, 94.99),
    'Kendall': ('uncertainty', 96.47, 95.29),
    'GradNorm': ('gradnorm', 96.27, 94.84),
    'PCGrad': ('pcgrad', None, None),
    'MGDA-UB': ('mgda', 97.26, 95.90),
}
FIGURES = [
    ('single', 'left', 'single_left', 97.23),
    ('single', 'right', 'single_right', 95.90),
    *(
        (row, task, method, figure)
        for row, (method, *figures) in SHARED.items()
        for task, figure in zip(('left', 'right'), figures, strict=True)
    ),
]
CELLS = [
    Cell(
        row,
        task,
        f'configs/multimnist.py:{method}',
        published=figure,
        tolerance=0.6,
        source='table 2, from memory' if figure else '',
        metric=f'test/{task}/accuracy',
    )
    for row, task, method, figure in FIGURES
]
RELATIONS = ['MGDA-UB >= uniform']
QUICK = {'stages[*].steps': 2}
