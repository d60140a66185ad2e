"""A tuned encoder teaches an LSTM and convolutions on SST-2; every student has the teacher of its own seed.

No figures are published for these networks; the claims are the paper's (Tang et al. 2019, arXiv:1903.12136): a student learns
more from the teacher's logits than from the labels.
"""

from experiments.table import Cell

TITLE = 'SST-2: a small encoder distilled into an LSTM and a CNN, test accuracy'
SEEDS = 3
SELECTION = ''  # the configs': val/accuracy
METRIC = 'test/accuracy'
UNIT = '%'

STUDENTS = ('lstm', 'cnn')
METHODS = ('labels', 'logits', 'soft')
TEACHER = Cell('teacher', 'encoder', 'configs/distil_text.py:teacher')


def taught(student: str, method: str) -> Cell:
    config = f'configs/distil_text.py:{student},{method}'
    if method == 'labels':
        return Cell(method, student, config)
    return Cell(method, student, config, after=TEACHER.name, into='objective.distilled.teacher.source')


CELLS = [TEACHER, *(taught(student, method) for student in STUDENTS for method in METHODS)]
RELATIONS = [f'{method}/{student} > labels/{student}' for student in STUDENTS for method in METHODS[1:]]
QUICK = {'stages[*].epochs': 0.01}
