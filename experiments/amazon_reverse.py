"""One pair of Amazon products, λ of DANN chosen by reverse validation: no label of the target has a part in it.

Published: Ganin et al. 2016 (arXiv:1505.07818), table 1, original data, whose grid was wider.
"""

from experiments.table import Cell

TITLE = 'DANN on books → dvd, λ by reverse validation (Ganin et al. 2016, table 1)'
SEEDS = 1
SELECTION = 'reverse validation'
METRIC = 'target/accuracy'
UNIT = '%'

CELLS = [
    Cell(
        'DANN',
        'B>D',
        'configs/amazon.py:books,dvd,dann',
        published=78.4,
        tolerance=2.0,
        source='table 1, DANN, original data',
        candidates=[{'objective.weight': weight} for weight in (0.01, 0.1, 1.0)],
    )
]
QUICK = {'stages[*].epochs': 1}
