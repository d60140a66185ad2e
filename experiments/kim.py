"""CNN-rand: what a network of the sets themselves, without any transfer, reaches; the baseline of configs/text.py.

The network and the protocol, ten-fold cross-validation but for SST-2 and TREC, are Kim's (2014, arXiv:1408.5882); the figures
those of the authors' group's own code, harvardnlp/sent-conv-torch (README, column rand). The paper's table 2 has, in the
order below, 76.1, 82.7, 89.6, 79.8, 83.4 and 91.2 [mem]: 0.2 to 3.0 away from them. A seed is a fold here: `--seeds=10` is
the paper's protocol, fewer are so many of its folds, and the table says how many were run.
"""

from pathlib import Path

from experiments.table import Cell
from tl_jax.config import run_file

TITLE = 'CNN-rand (Kim 2014, as harvardnlp/sent-conv-torch has it); a seed is a fold of ten'
SEEDS = 3
SELECTION = ''
METRIC = 'test/accuracy'
UNIT = '%'

KIM = run_file(Path(__file__).resolve().parent.parent / 'configs' / 'kim.py')
FIGURES = {'MR': 75.9, 'SST2': 83.5, 'Subj': 89.2, 'CR': 78.3, 'MPQA': 84.6, 'TREC': 88.2}


def fold_of(name: str):
    """The overrides of a seed: its fold, where the set has folds."""
    if name not in KIM.FOLDED:
        return None
    spec = KIM.get_config(name).data.test.spec.partition('[')[0]
    return lambda seed: {f'data.{split}.spec': part for split, part in KIM.parts(spec, seed % KIM.FOLDS + 1).items()}


CELLS = [
    Cell(
        'CNN-rand',
        name,
        f'configs/kim.py:{name}',
        fold_of(name),
        published=figure,
        tolerance=1.0,
        source='harvardnlp/sent-conv-torch, README',
    )
    for name, figure in FIGURES.items()
]
QUICK = {'stages[*].epochs': 0.01, 'eval_every': 0}
