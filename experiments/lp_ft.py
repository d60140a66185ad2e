"""LP, FT and LP-FT of CIFAR-10's ResNet-20 on 500 digits: within the set that is learnt, on the other set, and under noise.

Kumar et al. 2022 (arXiv:2202.10054, table 1) report, over ten shifts: within, LP 79.7, FT 85.1, LP-FT 85.7; out of
distribution, LP 66.2, FT 59.3, LP-FT 68.9. Networks and data are others here, so that their order alone can be compared.
Rates of tuning are chosen within the set that is learnt, for FT and LP-FT alike, and so is the checkpoint.
"""

from experiments.table import Cell, Mean

TITLE = 'LP, FT and LP-FT within and out of distribution, accuracy'
SEEDS = 3
SELECTION = 'val/accuracy'
UNIT = '%'

METHODS = {'LP': 'lp', 'FT': 'ft', 'LP-FT': 'lp_ft'}
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SPLITS = {'id': 'within', 'ood': 'other set', 'noise': 'noise'}
CELLS = [
    Cell(
        row,
        f'{learnt} {said}',
        f'configs/lp_ft.py:{learnt},{method}',
        metric=f'{split}/accuracy',
        candidates=[{'stages[-1].train[0][1].lr.peak': rate} for rate in RATES] if method != 'lp' else (),
    )
    for row, method in METHODS.items()
    for learnt in ('mnist', 'usps')
    for split, said in SPLITS.items()
]
MEANS = [Mean(row, of=f'{row}/* {said}', column=f'mean {said}') for row in METHODS for said in SPLITS.values()]
RELATIONS = [
    'FT/mean within > LP/mean within',
    'LP-FT/mean within > LP/mean within',
    'LP/mean other set > FT/mean other set',
    'LP-FT/mean other set > FT/mean other set',
    'LP-FT/mean noise > FT/mean noise',
]
QUICK = {'stages[*].steps': 2}
