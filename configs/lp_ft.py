"""LP, FT and LP-FT within and out of distribution, with a real network: CIFAR-10's ResNet-20 tuned on 500 digits.

    python launch.py --config=configs/lp_ft.py:mnist,lp_ft --workdir=runs/lp_ft/mnist
    python -m experiments.run lp_ft --workdir=runs/lp_ft        # all methods, both sets, 3 seeds

The question of Kumar et al. 2022 (arXiv:2202.10054): tuning everything fits the data at hand better than a probe, and may
distort the features that others need; a probe first keeps them. The argument names the set that is learnt (mnist or usps,
50 images a class) and the method: lp, ft or lp_ft. Fifty images a class more, of that set, choose the checkpoint,
and in the table the rate of tuning, for each method by itself, as there. Judged on three splits: `id`, test images of that
set; `ood`, those of the other set; `noise`, those of `id` with Gaussian noise of 0.3. Images are 32×32, as CIFAR's. The
weights are akamaster's (../shared/weights/cifar10_resnet). A run takes a minute on one core; the probe alone, on cached
features, less.
"""

from collections.abc import Iterator

import ml_collections

SHARED = '../shared'
OTHER = {'mnist': 'usps', 'usps': 'mnist'}
SIZE = {
    'mnist': [dict(name='pad', padding=2)],
    'usps': [dict(name='resize', size=[28, 28]), dict(name='pad', padding=2)],
}
FINISH = ['to_rgb', 'to_float', dict(name='normalize', mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])]

PROBE = dict(name='probe', epochs=40, train=[('head/.*', dict(name='adam', lr=1e-2))])
FULL = dict(name='full', epochs=12, train=[('.*', dict(name='adam', lr=dict(name='cosine', peak=1e-3)))])
METHODS = {'lp': [PROBE], 'ft': [FULL], 'lp_ft': [PROBE, FULL]}


def get_config(arg: str = 'mnist,lp_ft') -> ml_collections.ConfigDict:
    learnt, method = arg.split(',')
    other = OTHER[learnt]
    c = ml_collections.ConfigDict()
    c.name = f'CIFAR-10 → 500 images of {learnt}, {method}'
    c.model = dict(
        name='resnet20',
        source=f'{SHARED}/weights/cifar10_resnet/resnet20-12fca82f.th',
        ignore=['module.linear.*'],  # CIFAR's classes are ten, too
    )
    c.data = dict(
        train=dict(spec=f'npz:{SHARED}/data/{learnt}.npz/train[:80%]', shots=50),
        eval=dict(val=dict(spec=f'npz:{SHARED}/data/{learnt}.npz/train[80%:]', shots=50)),
        test=dict(
            id=f'npz:{SHARED}/data/{learnt}.npz/test[:2000]',
            ood=f'npz:{SHARED}/data/{other}.npz/test[:2000]',
            noise=f'npz:{SHARED}/data/{learnt}.npz/test[:2000]',
        ),
        train_transform=[*SIZE[learnt], *FINISH],
        eval_transform=dict(
            val=[*SIZE[learnt], *FINISH],
            id=[*SIZE[learnt], *FINISH],
            ood=[*SIZE[other], *FINISH],
            noise=[*SIZE[learnt], dict(name='noise', stddev=0.3), *FINISH],
        ),
    )
    c.batch_size = 50
    c.stages = METHODS[method]
    c.eval_every = 40
    c.log_every = 20
    c.select_by = 'val/accuracy'
    c.keep = 1
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    for learnt in OTHER:
        for method in METHODS:
            yield f'{learnt},{method}', {}
