"""ResNet-56 teaches ResNet-20 on CIFAR-10 in every way there is, under one short budget; no figures are published for it."""

from pathlib import Path

from experiments.table import Cell
from tl_jax.config import run_file

TITLE = 'Distillation of CIFAR-10’s ResNet-56 into a ResNet-20: 1,250 images, four epochs, test accuracy'
SEEDS = 3
SELECTION = 'last'
METRIC = 'test/accuracy'
UNIT = '%'

METHODS = run_file(Path(__file__).resolve().parent.parent / 'configs' / 'distill.py').METHODS
CELLS = [Cell(method, 'CIFAR-10', f'configs/distill.py:{method}') for method in METHODS]
RELATIONS = [f'{method} > labels' for method in ('soft_targets', 'attention', 'similarity', 'rkd', 'crd', 'dkd')]
QUICK = {'stages[*].steps': 2}
