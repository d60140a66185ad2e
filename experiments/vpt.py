"""Visual prompt tuning on FGVC and VTAB-1k, test accuracy, each task's setting chosen on its validation images.

Published: Jia et al. 2022 (arXiv:2203.12119, table 1), means over the sets of a group; the figures are from memory and to be
checked against the paper ([mem]), and those of shallow prompts are left out for that. The authors tune once and report the
mean of five more runs; here each seed is tuned anew. Not run: see configs/vpt.py for what it takes.
"""

from configs.vpt import FGVC, METHODS, grid
from configs.vtab import TASKS
from experiments.table import Cell, Mean

TITLE = 'Visual prompt tuning of ViT-B/16 (Jia et al. 2022, table 1)'
SEEDS = 1
SELECTION = 'val/accuracy'
METRIC = 'test/accuracy'
UNIT = '%'

GROUPS = {'FGVC': 'FGVC', 'natural': 'VTAB natural', 'specialized': 'VTAB specialized', 'structured': 'VTAB structured'}
PUBLISHED = {'deep': (89.11, 78.48, 82.43, 54.98), 'full': (88.54, 75.88, 83.36, 47.64)}
CELLS = [
    Cell(method, f'FGVC: {name}', f'configs/vpt.py:fgvc/{name},{method}', candidates=grid(method))
    for method in METHODS
    for name in FGVC
] + [
    Cell(
        method,
        f'{GROUPS[task.group]}: {name}',
        f'configs/vpt.py:vtab/{name},{method}',
        candidates=grid(method),
        refit=f'configs/vpt.py:vtab/{name},{method},all',
    )
    for method in METHODS
    for name, task in TASKS.items()
]
MEANS = [
    Mean(
        method,
        of=f'{method}/{group}: *',
        column=f'mean {group}',
        published=PUBLISHED[method][i] if method in PUBLISHED else None,
        tolerance=1.0,
        source='table 1 [mem]' if method in PUBLISHED else '',
    )
    for method in METHODS
    for i, group in enumerate(GROUPS.values())
]
RELATIONS = [f'deep/mean {group} > full/mean {group}' for group in ('FGVC', 'VTAB natural', 'VTAB structured')]
QUICK = {'stages[*].steps': 2, **{f'stages[*].train[{i}][1].lr.warmup': 0 for i in (0, 1)}}
