"""What learns when: every partition, recipe and sharpness-aware gradient on MNIST → digits; no figures are published for it."""

from pathlib import Path

from experiments.table import Cell
from tl_jax.config import run_file

TITLE = 'Schedules of what trains, MNIST → digits from 300 labelled images, test accuracy'
SEEDS = 3
SELECTION = ''  # the configs': val/accuracy
METRIC = 'test/accuracy'
UNIT = '%'

CONFIG = run_file(Path(__file__).resolve().parent.parent / 'configs' / 'schedules.py')
CELLS = [
    Cell(method, 'digits', f'configs/schedules.py:{method}')
    for method in (*CONFIG.PARTITIONS, *CONFIG.RECIPES, *CONFIG.SAM)
]
RELATIONS = [f'{method} > head' for method in ('all', 'lp_ft', 'gradual_unfreezing', 'layerwise_decay')]
QUICK = {'eval_every': 0}
