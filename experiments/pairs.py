"""Two towers on pairs made from what is at hand: no published figures, so ours stand against chance.

Accepted is what is far above it: ten times the chance of 0.1 % among 1,000 sentences, five times that of 10 % among digits.
"""

from experiments.table import Cell

TITLE = 'Two towers: retrieval and zero-shot recognition'
SEEDS = 1
SELECTION = 'last'
UNIT = '%'

FIGURES = [
    ('LiT', 'zero-shot digits', 'lit', 'test/zero_shot_accuracy', 50.0),
    ('CLIP', 'zero-shot digits', 'mnist', 'test/zero_shot_accuracy', 50.0),
    ('CLIP', 'en → de recall@1', 'multi30k', 'test/to_text_recall@1', 1.0),
    ('CLIP', 'de → en recall@1', 'multi30k', 'test/from_text_recall@1', 1.0),
    ('CLIP', 'zero-shot alphabets', 'omniglot', 'test/zero_shot_accuracy', 13.0),
]
CELLS = [
    Cell(row, column, f'configs/pairs.py:{arg}', accept=(least, None), source='chance', metric=metric)
    for row, column, arg, metric, least in FIGURES
]
QUICK = {'stages[*].steps': 2}
