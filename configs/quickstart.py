"""From MNIST to other people's digits: five labelled examples a class, four ways to spend them.

    make quickstart

The source network is shipped (tl_jax/pretrained/shipped/mnist_convnet.safetensors, made by configs/mnist.py). The target is
scikit-learn's embedded handwritten digits: other writers, another scanner, 8×8 pixels. 50 labelled images train, 300 others
choose the checkpoint, and the remaining 897 are looked at once, at the end.
"""

from collections.abc import Iterator

import ml_collections

FULL = dict(name='adamw', lr=1e-3, weight_decay=0.01)
PROBE = dict(name='adamw', lr=1e-2, weight_decay=0.01)
STRATEGIES = {
    'scratch': [dict(name='scratch', steps=100, train=[('.*', FULL)])],
    'probe': [dict(name='probe', steps=100, train=[('head/.*', PROBE)])],
    'full': [dict(name='full', steps=100, train=[('.*', FULL)])],
    # Kumar et al. 2022, arXiv:2202.10054: fit the head first, so that its random start does not distort the features.
    'lp_ft': [
        dict(name='probe', steps=50, train=[('head/.*', PROBE)]),
        dict(name='full', steps=50, train=[('.*', dict(FULL, lr=3e-4))]),
    ],
}


def get_config(arg: str = 'full') -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = f'MNIST → digits, {arg}'
    c.model = dict(name='convnet', widths=[16, 32, 64], source=None)
    if arg != 'scratch':
        c.model.update(source='shipped:mnist_convnet', fresh=['head/.*'])
    # A digit of MNIST fills 20 of its 28 pixels.
    place = [dict(name='resize', size=[20, 20]), dict(name='pad', padding=4), 'to_float']
    c.data = dict(
        train=dict(spec='sklearn:digits/train', shots=5),
        eval='sklearn:digits/val',
        test='sklearn:digits/test',
        train_transform=place,
        eval_transform=place,
    )
    c.batch_size = 50
    c.eval_batch_size = 300
    c.stages = STRATEGIES[arg]
    c.eval_every = 25
    c.log_every = 25
    c.select_by = 'val/accuracy'
    c.keep = 1
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    for strategy in STRATEGIES:
        for seed in range(3):
            yield strategy, {'seed': seed}


def space(arg: str = 'full') -> dict:
    """For `--mode=sweep --trials=20 --workers=2 --config=configs/quickstart.py:full`."""
    space = {
        'stages[0].train[0][1].lr': dict(low=1e-4, high=1e-1, log=True),
        'stages[0].train[0][1].weight_decay': dict(low=1e-4, high=1e-1, log=True),
        'objective.label_smoothing': [0.0, 0.1],
    }
    if arg == 'lp_ft':
        space['stages[1].train[0][1].lr'] = dict(low=1e-5, high=1e-2, log=True)
    return space
