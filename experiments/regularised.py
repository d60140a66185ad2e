"""Every penalty and regulariser on MNIST → digits, five labelled images a class; no figures are published for it.

What is merged after training, from six of the rows here: `python -m experiments.merged`.
"""

from pathlib import Path

from experiments.table import Cell
from tl_jax.config import run_file

TITLE = 'Regularised fine-tuning, MNIST → digits from 50 labelled images, test accuracy'
SEEDS = 3
SELECTION = ''  # the configs': val/accuracy, last of the means of weights
METRIC = 'test/accuracy'
UNIT = '%'

METHODS = run_file(Path(__file__).resolve().parent.parent / 'configs' / 'regularised.py').METHODS
CELLS = [Cell(method, 'digits', f'configs/regularised.py:{method}') for method in ('probe', *METHODS)]
RELATIONS = [
    'full > probe',
    *(f'{method} > full' for method in ('l2_sp', 'delta', 'bss', 'co_tuning', 'bi_tuning')),
    'r_drop > dropout',
    'stoch_norm > batch_norm',
    'stochastic_depth > residual',
]
QUICK = {'stages[*].steps': 2}
