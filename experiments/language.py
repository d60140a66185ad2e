"""A small language model taken from news to captions, and the shipped encoder taught to find names.

No figures are published for these networks; the claims are what pretraining is for. Prepare the texts first:
`python -m experiments.language_corpus runs/language`.
"""

from pathlib import Path

from experiments.table import Cell
from tl_jax.config import run_file

TITLE = 'Language models and tagged words, test perplexity and F1 of entities'
SEEDS = 3
SELECTION = ''  # the configs': val/loss, val/f1
UNIT = '%'

CONFIG = run_file(Path(__file__).resolve().parent.parent / 'configs' / 'language.py')
PERPLEXITY = dict(metric='test/perplexity', unit='perplexity')
NEWS = Cell('scratch', 'news', 'configs/language.py:news', **PERPLEXITY)
CELLS = [
    NEWS,
    *(
        Cell(
            method,
            'captions',
            f'configs/language.py:captions,{method}',
            after='' if method == 'scratch' else NEWS.name,
            **PERPLEXITY,
        )
        for method in CONFIG.LANGUAGE
    ),
    *(Cell(method, 'names', f'configs/language.py:names,{method}', metric='test/f1') for method in CONFIG.METHODS),
]
RELATIONS = [
    *(f'{method}/captions < scratch/captions' for method in ('full', 'lora')),
    *(f'{method}/names > scratch/names' for method in ('full', 'lora')),
]
QUICK = {'stages[*].epochs': 0.02}
