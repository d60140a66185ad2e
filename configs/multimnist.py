"""MultiMNIST: two overlaid digits, a task each; seven ways to train them on one LeNet (Sener & Koltun 2018, arXiv:1810.04650).

    python launch.py --config=configs/multimnist.py:mgda --workdir=runs/multimnist/mgda
    python launch.py --config=configs/multimnist.py:mgda_full --workdir=runs/multimnist/mgda_full

Methods: single_left, single_right, uniform, uncertainty, gradnorm, pcgrad, mgda. As they are 15 epochs, with `_full` the 100
of the paper; `mgda` is MGDA-UB. Every image of ../shared/data/mnist.npz is the left digit of one example, another one
drawn by a fixed seed its right digit; the published set is another draw. Batch 256, SGD with momentum 0.9, the rate
times 0.85 after every tenth. The authors' dropout, of channels and in the heads, is left out.

Published test accuracy, left/right: single 97.23/95.90, uniform 96.46/94.99, uncertainty 96.47/95.29, GradNorm 96.27/94.84,
MGDA-UB 97.26/95.90.
"""

from collections.abc import Iterator

import ml_collections

METHODS = {
    'single_left': dict(tasks=['left']),
    'single_right': dict(tasks=['right']),
    'uniform': dict(),
    'uncertainty': dict(weights='uncertainty'),
    'gradnorm': dict(weights='gradnorm', shared_layer='backbone/dense1/kernel', asymmetry=0.5),
    'pcgrad': dict(),
    'mgda': dict(weights='mgda_ub'),
}
GRADIENTS = {'pcgrad': dict(name='pcgrad')}


def get_config(arg: str = 'mgda') -> ml_collections.ConfigDict:
    method = arg.removesuffix('_full')
    c = ml_collections.ConfigDict()
    c.name = f'MultiMNIST, {arg}'
    c.model = dict(
        name='lenet', widths=[10, 20], dense=[50], num_classes=10, head=dict(name='mlp', widths=[50], dropout=0.0)
    )
    floats = [dict(name='normalize', mean=[0.1307], std=[0.3081])]
    c.data = dict(
        train='multimnist:../shared/data/mnist.npz/train',
        test='multimnist:../shared/data/mnist.npz/test',
        train_transform=floats,
        eval_transform=floats,
    )
    c.objective = {'name': 'multitask', 'tasks': ['left', 'right'], **METHODS[method]}
    c.gradient = GRADIENTS.get(method, dict(name='plain'))
    c.batch_size = 256
    c.eval_batch_size = 1000
    # The weights of `mgda` sum to 1, the others' to the number of tasks: the same rate a task.
    rate = dict(name='step', peak=0.05 if method == 'mgda' else 0.025, at=[k / 10 for k in range(1, 10)], factor=0.85)
    rules = [('.*', dict(name='momentum', lr=rate))]
    if method == 'gradnorm':
        rules = [('task_weights/.*', dict(name='sgd', lr=0.025)), *rules]
    c.stages = [dict(name=method, epochs=100 if arg.endswith('_full') else 15, train=rules)]
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    for method in METHODS:
        for seed in range(5):
            yield method, {'seed': seed}
