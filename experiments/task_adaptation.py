"""Seven ways of task adaptation on CUB-200-2011, Stanford Cars and FGVC Aircraft, test accuracy after the last step.

Published: thuml/Transfer-Learning-Library at c4aa59e, examples/task_adaptation/image_classification/README.md, tables "on
ResNet-50 (Supervised Pre-trained)", one seed. Its scripts print the best of twenty evaluations on the test images; here the
last state counts, which can only be lower. Not run: see configs/task_adaptation.py for what it takes.
"""

from experiments.table import Cell, Mean

TITLE = 'Task adaptation of ResNet-50 (tllib)'
SEEDS = 3
SELECTION = 'last'
METRIC = 'test/accuracy'
UNIT = '%'

METHODS = {
    'ERM': 'erm',
    'LwF': 'lwf',
    'BSS': 'bss',
    'DELTA': 'delta',
    'StochNorm': 'stoch_norm',
    'Co-Tuning': 'co_tuning',
    'Bi-Tuning': 'bi_tuning',
}
# Set and share of the labels -> figures in the order of METHODS.
PUBLISHED = {
    ('CUB', 100): (81.8, 81.5, 82.0, 82.3, 82.2, 82.5, 83.1),
    ('Cars', 100): (87.8, 87.5, 88.0, 88.4, 87.9, 89.1, 90.2),
    ('Aircraft', 100): (80.2, 82.4, 81.2, 82.7, 81.5, 82.2, 84.3),
    ('CUB', 15): (51.2, 56.7, 53.4, 54.8, 54.8, 57.6, 55.8),
    ('Cars', 15): (41.1, 44.9, 43.3, 45.0, 44.4, 49.0, 48.3),
    ('Aircraft', 15): (41.6, 44.1, 43.6, 44.4, 44.3, 45.9, 47.2),
}
TOLERANCES = {100: 0.7, 15: 1.5}
CELLS = [
    Cell(
        row,
        f'{name} {share} %',
        f'configs/task_adaptation.py:{name},{share},{method}',
        published=published,
        tolerance=TOLERANCES[share],
        source='tllib README @c4aa59e',
    )
    for (name, share), figures in PUBLISHED.items()
    for (row, method), published in zip(METHODS.items(), figures, strict=True)
]
MEANS = [Mean(row, of=f'{row}/*{share} %', column=f'mean {share} %') for row in METHODS for share in TOLERANCES]
RELATIONS = [f'{row}/mean 15 % > ERM/mean 15 %' for row in METHODS if row != 'ERM']
QUICK = {'stages[*].steps': 2, 'batch_size': 8}
