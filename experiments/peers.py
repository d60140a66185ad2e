"""Networks without a stronger teacher, on digits; no figures are published for it. A teacher is of the same seed."""

from pathlib import Path

from experiments.table import Cell
from tl_jax.config import run_file

TITLE = 'Mutual learning, self-distillation, born-again networks: 100 labelled digits, test accuracy'
SEEDS = 3
SELECTION = 'last'
METRIC = 'test/accuracy'
UNIT = '%'

CONFIG = run_file(Path(__file__).resolve().parent.parent / 'configs' / 'peers.py')
CELLS = [
    Cell(
        method,
        'digits',
        f'configs/peers.py:{method}',
        after=f'{CONFIG.TEACHER[method]}/digits' if method in CONFIG.TEACHER else '',
        into='objective.distilled.teacher.source',
    )
    for method in CONFIG.METHODS
]
RELATIONS = [f'{method} > labels' for method in ('mutual', 'born_again', 'own_teacher')] + ['token_soft > token_labels']
QUICK = {'stages[*].steps': 2}
