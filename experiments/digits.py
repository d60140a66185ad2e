"""MNIST ↔ USPS, sampled and full: source only, DANN, ADDA, CORAL, MMD, MCD, SHOT, self-ensembling; stages shortened for a CPU.

Published, sampled: Tzeng et al. 2017 (ADDA, arXiv:1702.05464, table 2), as jindongwang/transferlearning data/benchmark.md
at f951df1 has it. Full: tim-learn/SHOT results.md at f7d555a; Saito et al. 2018 (MCD, arXiv:1712.02560, table 1, from memory);
French et al. 2018 (arXiv:1706.05208, table 1, MT+TF); corenel/pytorch-adda README. Where there is no figure, ours stands
alone. SHOT and MCD divide USPS otherwise (7438 / 1860 images; here the usual 7291 / 2007).
"""

from experiments.table import Cell

TITLE = 'MNIST ↔ USPS, accuracy on the target'
SEEDS = 1
SELECTION = 'last'
METRIC = 'target/accuracy'
UNIT = '%'

PAIRS = {'M>U': 'mnist,usps', 'U>M': 'usps,mnist'}
ADDA = 'ADDA, table 2'
# method of the config: row, {protocol: (published M>U, published U>M, tolerance, source)}
FIGURES = {
    'source': ('source', {'sampled': (75.2, 57.1, 4.0, ADDA), 'full': (None, None, None, '')}),
    'dann': ('DANN', {'sampled': (77.1, 73.0, 2.0, ADDA), 'full': (None, None, None, '')}),
    'adda': ('ADDA', {'sampled': (89.4, 90.1, 3.0, ADDA), 'full': (97.63, None, 2.0, 'pytorch-adda README')}),
    'coral': ('CORAL', {'sampled': (None, None, None, ''), 'full': (None, None, None, '')}),
    'ddc': ('DDC', {'sampled': (79.1, 66.5, 2.0, ADDA)}),
    'dan': ('MMD', {'sampled': (None, None, None, ''), 'full': (None, None, None, '')}),
    'mcd': ('MCD', {'sampled': (94.2, 94.1, 1.5, 'MCD, table 1'), 'full': (96.5, None, 1.5, 'MCD, table 1')}),
    'shot_source': ('source (SHOT)', {'full': (79.7, 88.0, 4.0, 'SHOT results.md')}),
    'shot_im': ('SHOT-IM', {'full': (97.7, 97.6, 0.8, 'SHOT results.md')}),
    'shot': ('SHOT', {'full': (97.9, 98.0, 0.8, 'SHOT results.md')}),
    'self_ensembling': ('self-ensembling', {'full': (98.26, 98.07, 0.7, 'table 1')}),
}
AFTER = {'shot': 'source (SHOT)', 'shot_im': 'source (SHOT)'}
CELLS = [
    Cell(
        row,
        f'{pair} {protocol}',
        f'configs/digits.py:{PAIRS[pair]},{protocol},{method}',
        published=figure,
        tolerance=tolerance if figure else None,
        source=source if figure else '',
        after=f'{AFTER[method]}/{pair} {protocol}' if method in AFTER else '',
    )
    for method, (row, protocols) in FIGURES.items()
    for protocol, (*figures, tolerance, source) in protocols.items()
    for pair, figure in zip(PAIRS, figures, strict=True)
]
RELATIONS = [
    *(
        f'{row}/{pair} {p} > source/{pair} {p}'
        for row in ('DANN', 'ADDA', 'MCD')
        for pair in PAIRS
        for p in ('sampled', 'full')
    ),
    *(f'{row}/{pair} full > source (SHOT)/{pair} full' for row in ('SHOT-IM', 'SHOT') for pair in PAIRS),
]
QUICK = {'stages[*].steps': 2}
