"""The encoder pretrained here at seven text tasks: from scratch, probed, tuned whole and by thin adapters.

No figures are published for this encoder; the claims are what pretraining is for.
"""

from experiments.table import Cell

TITLE = 'A small text encoder adapted, test accuracy (CoLA: Matthews’ correlation)'
SEEDS = 3
SELECTION = ''  # the configs': val/accuracy, CoLA's val/mcc
UNIT = '%'

TASKS = {'sst2': 'SST-2', 'mr': 'MR', 'subj': 'SUBJ', 'trec': 'TREC', 'cola': 'CoLA', 'mrpc': 'MRPC', 'rte': 'RTE'}
METHODS = ('scratch', 'probe', 'full', 'llrd', 'bitfit', 'lora', 'adapters', 'prefix')
CELLS = [
    Cell(method, column, f'configs/text.py:{task},{method}', metric='test/mcc' if task == 'cola' else 'test/accuracy')
    for task, column in TASKS.items()
    for method in METHODS
]
RELATIONS = [f'{method}/{column} > scratch/{column}' for method in ('full', 'lora') for column in TASKS.values()]
QUICK = {'stages[*].epochs': 0.01}
