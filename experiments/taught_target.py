"""A student taught on a target that nobody labelled, by a teacher tuned on ten labels a class: no figures are published."""

from experiments.table import Cell

TITLE = (
    'Distillation under transfer: ten labels a class for the teacher, the rest of the target unlabelled for the student'
)
SEEDS = 3
SELECTION = 'last'
METRIC = 'test/accuracy'
UNIT = '%'

TARGETS = {'usps': 'USPS', 'digits': 'digits 8×8'}
INTO = 'objective.distilled.teacher.source'
CELLS = []
for target, column in TARGETS.items():
    config, after = f'configs/taught_target.py:{target}', f'teacher, MNIST and 10 labels/{column}'
    CELLS += [
        Cell('teacher, MNIST and 10 labels', column, f'configs/shots.py:{target},10,transfer'),
        Cell('student, the 10 labels', column, f'{config},labels'),
        Cell('student, soft targets', column, f'{config},taught', after=after, into=INTO),
        Cell('student, hard targets', column, f'{config},hard', after=after, into=INTO),
    ]
RELATIONS = ['student, soft targets > student, the 10 labels', 'student, soft targets > student, hard targets']
QUICK = {'stages[*].steps': 2}
