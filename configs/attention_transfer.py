"""Attention transfer and distillation among wide ResNets on CIFAR-10 (Zagoruyko & Komodakis 2017, arXiv:1612.03928, table 1).

    make cifar10
    python launch.py --config=configs/attention_transfer.py:wrn_16_2 --workdir=runs/at/wrn_16_2
    python launch.py --config=configs/attention_transfer.py:wrn_16_1,wrn_16_2,at --workdir=runs/at/taught
    python -m experiments.run attention_transfer --workdir=runs/attention_transfer       # all, with the table

The argument names a network trained by labels, or a student, its teacher and the method: at (weight 1000 of the mean squares over
three groups), kd (τ 4, nine tenths soft) or at_kd. As the authors' code: 200 epochs of batches of 128, SGD with Nesterov's
momentum, rate 0.1, a fifth of it from epochs 60, 120 and 160, decay 5e-4, flips and crops out of images reflected by four
pixels, which the teacher sees too. A run wants a GPU: minutes there, a day on two CPU cores.
"""

from collections.abc import Iterator

import ml_collections

CIFAR = 'npz:runs/cifar10.npz'
FINISH = ['to_float', dict(name='normalize', mean=[0.4914, 0.4822, 0.4465], std=[0.2470, 0.2435, 0.2616])]
CROPS = ['flip', dict(name='random_crop', size=32, padding=4, mode='reflect')]
PAIRS = (('wrn_16_1', 'wrn_16_2'), ('wrn_16_1', 'wrn_40_1'), ('wrn_16_2', 'wrn_40_2'))
NETWORKS = ('wrn_16_1', 'wrn_16_2', 'wrn_40_1', 'wrn_40_2')
AT = dict(name='attention', layers=['stage1', 'stage2', 'stage3'], weight=1000.0)
KD = dict(name='soft_targets', temperature=4.0, weight=0.9)
METHODS = {'at': ([AT], 1.0), 'kd': ([KD], 0.1), 'at_kd': ([AT, KD], 0.1)}


def get_config(arg: str = 'wrn_16_1,wrn_16_2,at_kd') -> ml_collections.ConfigDict:
    student, *taught = arg.split(',')
    c = ml_collections.ConfigDict()
    c.name = f'CIFAR-10, {arg}'
    c.model = dict(name=student)
    c.data = dict(
        train=f'{CIFAR}/train', test=f'{CIFAR}/test', train_transform=[*CROPS, *FINISH], eval_transform=FINISH
    )
    if taught:
        teacher, method = taught
        terms, label_weight = METHODS[method]
        network = dict(name=teacher, source=f'runs/at/{teacher}/model.safetensors')
        c.objective = dict(name='supervised', distilled=dict(teacher=network, terms=terms, label_weight=label_weight))
    c.batch_size = 128
    rate = dict(name='step', peak=0.1, at=[0.3, 0.6, 0.8], factor=0.2)
    nesterov = dict(name='momentum', lr=rate, weight_decay=5e-4, nesterov=True)
    c.stages = [dict(name='train', epochs=200, train=[('.*', nesterov)])]
    c.log_every = 100
    c.keep = 1
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    for network in NETWORKS:
        yield network, {}
    for student, teacher in PAIRS:
        for method in METHODS:
            yield f'{student},{teacher},{method}', {}
