"""Knowledge distillation on MNIST: mistakes among 10,000 test images of a large network, a small one, and the small one taught.

Published: Hinton, Vinyals & Dean 2015 (arXiv:1503.02531, section 3). All students share the teacher of seed 0.
"""

from experiments.table import Cell

TITLE = 'Distillation on MNIST (Hinton et al. 2015), test mistakes of 10,000'
SEEDS = 5
SELECTION = 'last'
METRIC = 'test/accuracy'
UNIT = 'mistakes of 10,000'

SOURCE = 'section 3'
TAUGHT = dict(after='teacher/1200', into='objective.distilled.teacher.source', after_seed=0)
CELLS = [
    Cell('teacher', '1200', 'configs/hinton.py:teacher', published=67, accept=(60, 80), source=SOURCE),
    Cell('plain', '800', 'configs/hinton.py:plain', published=146, accept=(130, 165), source=SOURCE),
    Cell('taught', '800', 'configs/hinton.py:taught', **TAUGHT, published=74, accept=(65, 90), source=SOURCE),
    Cell('taught', '300', 'configs/hinton.py:narrow', **TAUGHT),
    Cell('taught', '30', 'configs/hinton.py:few', **TAUGHT),
    Cell('taught without 3s', '800', 'configs/hinton.py:omitted', **TAUGHT, published=206, source=SOURCE),
]
RELATIONS = ['taught/800 < 0.65 * plain/800']
QUICK = {'stages[*].steps': 2}
