"""MNIST with differential privacy: Opacus's example, its ε and its accuracy.

Published: pytorch/opacus, examples/mnist_README.md at a174271. Its ε after one epoch stands in the log, after 15 in the table.
"""

from experiments.table import Cell

TITLE = 'DP-SGD on MNIST (Opacus, examples/mnist_README.md)'
SEEDS = 1
SELECTION = 'last'

EPOCH = 250  # steps
FIGURES = [
    ('accuracy', 94.86, 0.7, 'test/accuracy', '%'),
    ('ε after 1 epoch', 0.71, 0.01, f'privacy/epsilon@{EPOCH}', 'ε'),
    ('ε after 15 epochs', 1.16, 0.01, 'privacy/epsilon', 'ε'),
]
CELLS = [
    Cell(
        'private',
        column,
        'configs/private_mnist.py:private',
        {'eval_every': EPOCH},
        published=figure,
        tolerance=tolerance,
        source='mnist_README.md',
        metric=metric,
        unit=unit,
    )
    for column, figure, tolerance, metric, unit in FIGURES
] + [
    Cell(
        'public',
        'accuracy',
        'configs/private_mnist.py:public',
        published=98.93,
        tolerance=0.5,
        source='mnist_README.md',
        metric='test/accuracy',
    )
]
QUICK = {'stages[*].steps': 3, 'eval_every': 1}
