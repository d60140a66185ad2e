"""A small convnet on MNIST: the source network of the quickstart.

    python launch.py --config=configs/mnist.py --workdir=runs/mnist

Reads ../shared/data/mnist.npz (60,000 / 10,000 images); `--config.data.train=idx:DIR/train` takes the published files.
The network that the project ships, and the figures of the run that made it, are in tl_jax/pretrained/shipped/.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    mnist = arg or '../shared/data/mnist.npz'
    c = ml_collections.ConfigDict()
    c.name = 'convnet on MNIST'
    c.model = dict(name='convnet', widths=[16, 32, 64])
    c.data = dict(
        train=f'npz:{mnist}/train[5000:]',
        eval=f'npz:{mnist}/train[:5000]',
        test=f'npz:{mnist}/test',
        train_transform=[
            dict(name='rotate', degrees=15),
            dict(name='zoom', scale=[0.8, 1.1]),
            dict(name='random_crop', size=28, padding=2),
            'to_float',
        ],
        eval_transform=['to_float'],
    )
    c.batch_size = 128
    c.stages = [
        dict(
            name='train',
            epochs=4,
            train=[('.*', dict(name='adamw', lr=dict(name='cosine', peak=2e-3), weight_decay=0.01))],
        )
    ]
    c.eval_every = 400
    c.log_every = 100
    return c
