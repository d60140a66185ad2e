"""RoBERTa-base on GLUE's development sets: LoRA against everything tuned; biases and bottlenecks beside them.

Published: microsoft/LoRA README at c4593f0 (Hu et al. 2021, arXiv:2106.09685, table 2); its figures of full tuning are those of
Liu et al. 2019 and have no spread, so no tolerance here. LoRA's tolerance is twice the spread given, of the average twice that of
a mean of eight independent ones. BitFit's and Houlsby's own figures are BERT's and are left out. The best epoch on the
development set is chosen and reported, there as here. Not run: see configs/glue.py for what it takes.
"""

from configs.glue import FROM_MNLI, TASKS
from experiments.table import Cell, Mean

TITLE = 'LoRA of RoBERTa-base on GLUE (Hu et al. 2021, table 2); CoLA: Matthews’, STS-B: Pearson’s correlation'
SEEDS = 5
SELECTION = ''  # the configs': the development set by the task's own metric
UNIT = '%'

README = 'microsoft/LoRA README @c4593f0'
COLUMNS = {
    'mnli': 'MNLI',
    'sst2': 'SST-2',
    'mrpc': 'MRPC',
    'cola': 'CoLA',
    'qnli': 'QNLI',
    'qqp': 'QQP',
    'rte': 'RTE',
    'stsb': 'STS-B',
}
ROWS = {'full': 'full', 'lora': 'LoRA', 'bitfit': 'BitFit', 'houlsby': 'Houlsby'}
FULL = {'mnli': 87.6, 'sst2': 94.8, 'mrpc': 90.2, 'cola': 63.6, 'qnli': 92.8, 'qqp': 91.9, 'rte': 78.7, 'stsb': 91.2}
LORA = {
    'mnli': (87.5, 0.3),
    'sst2': (95.1, 0.2),
    'mrpc': (89.7, 0.7),
    'cola': (63.4, 1.2),
    'qnli': (93.3, 0.3),
    'qqp': (90.8, 0.1),
    'rte': (86.6, 0.7),
    'stsb': (91.5, 0.2),
}
RATES = [{f'stages[0].train[{i}][1].lr.peak': rate for i in (0, 1)} for rate in (1e-5, 2e-5, 3e-5)]


def cell(task: str, method: str) -> Cell:
    made = Cell(ROWS[method], COLUMNS[task], f'configs/glue.py:{task},{method}', metric=f'dev/{TASKS[task].metric}')
    if method == 'lora':
        figure, spread = LORA[task]
        after = 'LoRA/MNLI' if task in FROM_MNLI else ''
        return made._replace(published=figure, tolerance=2 * spread, source=README, after=after)
    if method == 'full':
        return made._replace(published=FULL[task], source=README, candidates=RATES)
    return made


CELLS = [cell(task, method) for method in ROWS for task in COLUMNS]
AVERAGES = {'full': (86.40, None), 'lora': (87.24, 0.41)}
MEANS = [
    Mean(
        row,
        of=f'{row}/*',
        published=AVERAGES.get(method, (None, None))[0],
        tolerance=AVERAGES.get(method, (None, None))[1],
        source=README if method in AVERAGES else '',
    )
    for method, row in ROWS.items()
]
RELATIONS = ['LoRA/mean > full/mean']
QUICK = {'stages[*].steps': 2, **{f'stages[*].train[{i}][1].lr.warmup': 0 for i in (0, 1)}}
