"""CIFAR-100 as RepDistiller compares distillations (Tian, Krishnan & Isola 2020, arXiv:1910.10699, tables 1 and 7).

    python launch.py --config=configs/repdistiller.py:resnet56 --workdir=runs/rd/resnet56
    python launch.py --config=configs/repdistiller.py:resnet20,resnet56,crd --workdir=runs/rd/crd
    python -m experiments.run repdistiller --workdir=runs/repdistiller                   # all, with the table

The argument names a teacher trained by labels, or a student, its teacher and the method. 240 epochs of batches of 64, SGD with
momentum 0.9, rate 0.05, a tenth of it from epochs 150, 180 and 210, decay 5e-4, flips and crops out of images padded by four
pixels; shortcuts are projections, as there. Methods other than kd stand beside the labels alone, with the terms' default
weights, which are that code's. Prepare the data with TFDS: `tfds:cifar100`. Never run here: CIFAR-100 is not at hand, and a run
wants a GPU.
"""

from collections.abc import Iterator

import ml_collections

CIFAR = 'tfds:cifar100'
FINISH = ['to_float', dict(name='normalize', mean=[0.5071, 0.4867, 0.4408], std=[0.2675, 0.2565, 0.2761])]
CROPS = [dict(name='random_crop', size=32, padding=4), 'flip']
PAIRS = (
    ('resnet20', 'resnet56'),
    ('resnet32', 'resnet110'),
    ('resnet8x4', 'resnet32x4'),
    ('wrn_16_2', 'wrn_40_2'),
)
NETWORKS = tuple(dict.fromkeys(name for pair in PAIRS for name in pair))
STAGES = ['stage1', 'stage2', 'stage3']
# method -> its terms, and the labels' weight.
METHODS = {
    'kd': ([dict(name='soft_targets', temperature=4.0, weight=0.9)], 0.1),
    'fitnet': ([dict(name='hints', layers=['stage2'], weight=100.0)], 1.0),
    'at': ([dict(name='attention', layers=STAGES)], 1.0),
    'sp': ([dict(name='similarity', layers=['stage3'])], 1.0),
    'rkd': ([dict(name='rkd')], 1.0),
    'pkt': ([dict(name='pkt')], 1.0),
    'crd': ([dict(name='crd')], 1.0),
    # Zhao et al. 2022 (arXiv:2203.08679): β as of the pair, grown over 20 epochs.
    'dkd': ([dict(name='dkd', weight=dict(start=0.0, end=1.0, until=20 / 240))], 1.0),
}
BETA = {'resnet20': 2.0, 'resnet32': 2.0, 'resnet8x4': 8.0, 'wrn_16_2': 6.0}


def get_config(arg: str = 'resnet20,resnet56,kd') -> ml_collections.ConfigDict:
    student, *taught = arg.split(',')
    c = ml_collections.ConfigDict()
    c.name = f'CIFAR-100, {arg}'
    c.model = network(student)
    c.data = dict(
        train=f'{CIFAR}/train', test=f'{CIFAR}/test', train_transform=[*CROPS, *FINISH], eval_transform=FINISH
    )
    if taught:
        teacher, method = taught
        terms, label_weight = METHODS[method]
        if method == 'dkd':
            terms = [dict(terms[0], beta=BETA[student])]
        source = dict(source=f'runs/rd/{teacher}/model.safetensors')
        c.objective = dict(
            name='supervised',
            distilled=dict(teacher=network(teacher) | source, terms=terms, label_weight=label_weight),
        )
    c.batch_size = 64
    rate = dict(name='step', peak=0.05, at=[150 / 240, 180 / 240, 210 / 240], factor=0.1)
    c.stages = [dict(name='train', epochs=240, train=[('.*', dict(name='momentum', lr=rate, weight_decay=5e-4))])]
    c.log_every = 100
    c.keep = 1
    return c


def network(name: str) -> dict:
    return dict(name=name) if 'wrn' in name else dict(name=name, shortcut='projection')


def sweep() -> Iterator[tuple[str, dict]]:
    for name in NETWORKS:
        yield name, {}
    for student, teacher in PAIRS:
        for method in METHODS:
            yield f'{student},{teacher},{method}', {}
