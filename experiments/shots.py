"""Accuracy by shots (1, 5, 10, all images), from scratch and with transfer; a relation that fails is negative transfer."""

from experiments.table import Cell

TITLE = 'Accuracy by labelled images a class, from scratch and with transfer'
SEEDS = 3
SELECTION = 'last'
METRIC = 'test/accuracy'
UNIT = '%'

PAIRS = {
    'digits': 'MNIST → digits 8×8',
    'usps': 'MNIST → USPS',
    'mnist': 'CIFAR-10 → MNIST',
    'photos': 'ImageNet → ants, bees',
}
SHOTS = ('1', '5', '10', 'full')
STARTS = ('scratch', 'transfer')
CELLS = [
    Cell(f'{said}, {start}', shots, f'configs/shots.py:{pair},{shots},{start}')
    for pair, said in PAIRS.items()
    for start in STARTS
    for shots in SHOTS
]
RELATIONS = [f'{said}, transfer/{shots} > {said}, scratch/{shots}' for said in PAIRS.values() for shots in SHOTS]
QUICK = {'stages[*].steps': 2}
