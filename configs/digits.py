"""MNIST ↔ USPS: adapt a digit classifier to the other set's images without its labels.

    python launch.py --config=configs/digits.py:mnist,usps,full,dann --workdir=runs/digits/dann
    python -m experiments.run digits --workdir=runs/digits       # all methods, both ways, sampled and full

The argument names source, target, protocol and method. `sampled` takes 2000 images of MNIST and 1800 of USPS (Long et al. 2013,
as ADDA does), `full` all training images; both are judged on all test images of the target. Images are 28×28, USPS enlarged
from 16×16, in −1 … 1. Nothing is selected by a target label: the last state counts.
"""

import ml_collections

SHARED = '../shared/data'
SAMPLED = {'mnist': '[:2000]', 'usps': '[:1800]'}
TRANSFORM = {
    'mnist': ['to_float', dict(name='normalize', mean=[0.5], std=[0.5])],
    'usps': [dict(name='resize', size=[28, 28]), 'to_float', dict(name='normalize', mean=[0.5], std=[0.5])],
}
DISCRIMINATOR = dict(name='mlp', dense=[500, 500], num_classes=1)
ADAM = dict(name='adam', lr=1e-3)
SUPERVISED = dict(name='supervised', stream='source')


def get_config(arg: str = 'mnist,usps,full,dann') -> ml_collections.ConfigDict:
    source, target, protocol, method = arg.split(',')
    part = SAMPLED if protocol == 'sampled' else {'mnist': '', 'usps': ''}
    c = ml_collections.ConfigDict()
    c.name = f'{source} → {target} ({protocol}), {method}'
    c.model = dict(name='lenet')
    c.data = dict(
        train=dict(
            source=f'npz:{SHARED}/{source}.npz/train{part[source]}',
            target=dict(spec=f'npz:{SHARED}/{target}.npz/train{part[target]}', unlabelled=True),
        ),
        test=dict(
            target=f'npz:{SHARED}/{target}.npz/test',
            source=f'npz:{SHARED}/{source}.npz/test',
        ),
        train_transform=dict(source=TRANSFORM[source], target=TRANSFORM[target]),
        eval_transform=dict(source=TRANSFORM[source], target=TRANSFORM[target]),
    )
    c.batch_size = 64
    c.log_every = 100
    c.keep = 1
    c.objective = SUPERVISED
    c.stages = [dict(name='source', steps=1000, train=[('.*', ADAM)])]
    if method == 'dann':
        c.objective = dict(name='dann', discriminator=DISCRIMINATOR)
    return c
