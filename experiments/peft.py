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
CELLS = [
    *(Cell(method, 'digits', f'configs/peft.py:digits,{method}') for method in CONFIG.WEIGHTS),
    *(Cell(method, 'TREC', f'configs/peft.py:{method}') for method in (*CONFIG.WEIGHTS, *CONFIG.ACTIVATIONS)),
    Cell('vpt', 'USPS', 'configs/peft.py:vpt'),
]
# A base in fewer bits is to cost little.
RELATIONS = [f'{method}/TREC > lora/TREC - 2' for method in ('qlora', 'lora_int8')]
QUICK = {'stages[*].steps': 2}
