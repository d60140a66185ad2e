"""CIFAR-100 distillation; published: the READMEs of RepDistiller (Tian et al. 2020) and mdistiller (Zhao et al. 2022)."""

from experiments.table import Cell

TITLE = 'Distillation on CIFAR-100, test accuracy'
SEEDS = 3
SELECTION = 'last'
METRIC = 'test/accuracy'
UNIT = '%'

CONFIG = 'configs/repdistiller.py'
RD, MD = 'HobbitLong/RepDistiller README', 'megvii-research/mdistiller README'
# student, teacher -> (the teacher's figure, the student's alone, by method).
PUBLISHED = {
    ('resnet20', 'resnet56'): (
        72.34,
        69.06,
        dict(kd=70.66, fitnet=69.21, at=70.55, sp=69.67, rkd=69.61, pkt=70.34, crd=71.16, dkd=71.97),
    ),
    ('resnet32', 'resnet110'): (None, None, dict(dkd=74.11)),
    ('resnet8x4', 'resnet32x4'): (79.42, 72.50, dict(kd=73.33, fitnet=73.50, at=73.44, crd=75.51, dkd=76.32)),
    ('wrn_16_2', 'wrn_40_2'): (75.61, 73.26, dict(kd=74.92, crd=75.48, dkd=76.23)),
}


def cell(row: str, column: str, arg: str, figure: float | None, **taught: str) -> Cell:
    source = MD if row == 'dkd' else RD
    known = dict(published=figure, tolerance=0.4, source=source) if figure else {}
    return Cell(row, column, f'{CONFIG}:{arg}', **known, **taught)


CELLS = []
for (student, teacher), (own, alone, taught) in PUBLISHED.items():
    column, into = f'{teacher} → {student}', 'objective.distilled.teacher.source'
    CELLS += [cell('teacher', column, teacher, own), cell('labels', column, student, alone)]
    CELLS += [
        cell(method, column, f'{student},{teacher},{method}', figure, after=f'teacher/{column}', into=into)
        for method, figure in taught.items()
    ]
RELATIONS = [f'{method}/{t} → {s} > labels/{t} → {s}' for (s, t), (*_, by) in PUBLISHED.items() for method in by]
QUICK = {'stages[*].steps': 2}
