"""Twelve pairs of Amazon products: the shallow network and DANN on the original features.

Published: Ganin et al. 2016 (arXiv:1505.07818), table 1, as reprinted in PMC8323662, table 4. The mean of NN is from memory of
the paper and not confirmed. Their λ and width were chosen by reverse validation; here they are the authors' code's defaults.
"""

from experiments.table import Cell, Mean

TITLE = 'DANN on Amazon reviews, raw features (Ganin et al. 2016, table 1)'
SEEDS = 3
SELECTION = 'source_val/accuracy'
METRIC = 'target/accuracy'
UNIT = '%'

DOMAINS = {'B': 'books', 'D': 'dvd', 'E': 'electronics', 'K': 'kitchen'}
DANN = {
    'B>D': 78.4,
    'B>E': 73.3,
    'B>K': 77.9,
    'D>B': 72.3,
    'D>E': 75.4,
    'D>K': 78.3,
    'E>B': 71.3,
    'E>D': 73.8,
    'E>K': 85.4,
    'K>B': 70.9,
    'K>D': 74.0,
    'K>E': 84.3,
}
CELLS = [
    Cell(
        row,
        pair,
        f'configs/amazon.py:{DOMAINS[pair[0]]},{DOMAINS[pair[2]]},{method}',
        published=published,
        tolerance=2.0,
        source='table 1, DANN, original data' if published else '',
    )
    for pair, dann in DANN.items()
    for row, method, published in (('NN', 'source', None), ('DANN', 'dann', dann))
]
MEANS = [
    Mean('NN', of='NN/*', published=76.1, tolerance=0.7, source='table 1, NN, from memory'),
    Mean('DANN', of='DANN/*', published=76.3, tolerance=0.7, source='mean of table 1, DANN, original data'),
]
QUICK = {'stages[*].epochs': 1}
