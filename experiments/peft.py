"""Every adapter: digits by those that change weights, TREC's questions by all; no figures are published for it.

The same encoder probed, tuned whole and from scratch on TREC: `experiments/text.py`.
"""

from pathlib import Path

from experiments.table import Cell
from tl_jax.config import run_file

TITLE = 'Adapters on a frozen network, test accuracy'
SEEDS = 3
SELECTION = 'val/accuracy'
METRIC = 'test/accuracy'
UNIT = '%'

CONFIG = run_file(Path(__file__).resolve().parent.parent / 'configs' / 'peft.py')
VIT = Cell('vit', 'MNIST', 'configs/peft.py:mnist,vit')
TREC = (*CONFIG.WEIGHTS, *CONFIG.WORDS_TOO, *CONFIG.ACTIVATIONS)
CELLS = [
    *(Cell(method, 'digits', f'configs/peft.py:digits,{method}') for method in CONFIG.WEIGHTS),
    *(Cell(method, 'TREC', f'configs/peft.py:{method}') for method in TREC),
    VIT,
    *(Cell(method, 'USPS', f'configs/peft.py:usps,{method}', after=VIT.name) for method in CONFIG.TRANSFORMER),
]
# A base in fewer bits is to cost little.
RELATIONS = [f'{method}/TREC > lora/TREC - 2' for method in ('qlora', 'lora_int8')]
QUICK = {'stages[*].steps': 2}
