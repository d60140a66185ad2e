"""A tuned encoder teaches an LSTM, convolutions and shallower encoders on SST-2; a student has the teacher of its own seed.

No figures are published for these networks; the claims are the papers' (Tang et al. 2019, arXiv:1903.12136, and those that
configs/distil_text.py names): a student learns more from a teacher than from the labels alone.
"""

from experiments.table import Cell

TITLE = 'SST-2: a small encoder distilled into smaller networks, test accuracy'
SEEDS = 3
SELECTION = ''  # the configs': val/accuracy
METRIC = 'test/accuracy'
UNIT = '%'

TEACHER = Cell('teacher', 'encoder', 'configs/distil_text.py:teacher')
# student -> the ways to teach it: the field of the config that names the tuned teacher, if it learns from that.
LOGITS = 'objective.distilled.teacher.source'
STUDENTS = {
    'lstm': {'labels': '', 'logits': LOGITS, 'soft': LOGITS},
    'cnn': {'labels': '', 'logits': LOGITS, 'soft': LOGITS},
    'small': {'labels': '', 'tinybert': f'stages[*].{LOGITS}', 'minilm': ''},
    'half': {'labels': '', 'distilbert': ''},
}


def cell(student: str, method: str, into: str) -> Cell:
    learns = dict(after=TEACHER.name, into=into) if into else {}
    return Cell(method, student, f'configs/distil_text.py:{student},{method}', **learns)


CELLS = [TEACHER, *(cell(student, *way) for student, ways in STUDENTS.items() for way in ways.items())]
RELATIONS = [
    f'{method}/{student} > labels/{student}'
    for student, ways in STUDENTS.items()
    for method in ways
    if method != 'labels'
]
QUICK = {'stages[*].epochs': 0.01}
