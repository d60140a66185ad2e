"""How much transfer gives as the labelled images grow: 1, 5, 10 a class and all, from scratch and from pretrained weights.

    python launch.py --config=configs/shots.py:usps,5,transfer --workdir=runs/shots/usps5
    python -m experiments.run shots --workdir=runs/shots        # every pair, number and start, 3 seeds

The argument names the pair, the shots (1, 5, 10 or full) and the start (scratch or transfer: the same network, its head
probed first and then all of it tuned). Judged on the test images by the last state. Pairs:

    digits   the shipped MNIST network → scikit-learn's digits of 8×8, a pool of 600
    usps     the same → USPS, 7291 images
    mnist    CIFAR-10's ResNet-20 → MNIST, 6000 images: far from what it has seen
    photos   MobileNetV2 of ImageNet → ants and bees at 96 pixels, 244 photos (`make photos` unpacks them)

A run takes from seconds to two minutes on one core.
"""

from collections.abc import Iterator

import ml_collections

SHARED = '../shared'
SHOTS = ('1', '5', '10', 'full')
STARTS = ('scratch', 'transfer')

TO_28 = [dict(name='resize', size=[28, 28]), 'to_float']
CIFAR = [
    dict(name='pad', padding=2),
    'to_rgb',
    'to_float',
    dict(name='normalize', mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
]
SYMMETRIC = ['to_float', dict(name='normalize', mean=[0.5], std=[0.5])]
PHOTO = [dict(name='resize', size=110), dict(name='center_crop', size=96), *SYMMETRIC]

SHIPPED = dict(name='convnet', widths=[16, 32, 64], source='shipped:mnist_convnet', ignore=['params/head/.*'])
RESNET = dict(
    name='resnet20',
    source=f'{SHARED}/weights/cifar10_resnet/resnet20-12fca82f.th',
    ignore=['module.linear.*'],
)
MOBILENET = dict(
    name='mobilenet_v2',
    norm='none',
    padding='same',
    source=f'{SHARED}/weights/mobilenet_tflite/mobilenet_v2_1.0_224_quant.npz',
)
PHOTOS = 'folder:runs/hymenoptera'
# model, training pool, test images, transforms, {all images or few: steps of tuning}
PAIRS = {
    'digits': (SHIPPED, 'sklearn:digits/train', 'sklearn:digits/test', TO_28, (200, 100)),
    'usps': (SHIPPED, f'npz:{SHARED}/data/usps.npz/train', f'npz:{SHARED}/data/usps.npz/test', TO_28, (600, 100)),
    'mnist': (
        RESNET,
        f'npz:{SHARED}/data/mnist.npz/train[:6000]',
        f'npz:{SHARED}/data/mnist.npz/test[:2000]',
        CIFAR,
        (380, 60),
    ),
    'photos': (MOBILENET, f'{PHOTOS}/train', f'{PHOTOS}/val', PHOTO, (48, 24)),
}


def get_config(arg: str = 'usps,5,transfer') -> ml_collections.ConfigDict:
    pair, shots, start = arg.split(',')
    model, pool, test, transform, (many, few) = PAIRS[pair]
    steps = many if shots == 'full' else few
    c = ml_collections.ConfigDict()
    c.name = f'{pair}, {shots} {"shot" if shots == "1" else "shots" if shots != "full" else "images"}, {start}'
    c.model = model if start == 'transfer' else scratch(model)
    c.data = dict(
        train=pool if shots == 'full' else dict(spec=pool, shots=int(shots)),
        test=test,
        train_transform=transform,
        eval_transform=transform,
    )
    c.batch_size = 16 if pair == 'photos' else 32
    tune = dict(name='adam', lr=dict(name='cosine', peak=1e-3 if start == 'scratch' else 3e-4))
    probe = dict(name='probe', steps=100, train=[('head/.*', dict(name='adam', lr=1e-2))])
    full = dict(name='full', steps=steps, train=[('.*', tune)])
    c.stages = [full] if start == 'scratch' else [probe, full]
    c.log_every = 20
    c.keep = 1
    return c


def scratch(model: dict) -> dict:
    """The architecture without the weights; with batch norm where theirs was folded in."""
    return {field: value for field, value in model.items() if field not in ('source', 'ignore', 'norm', 'padding')}


def sweep() -> Iterator[tuple[str, dict]]:
    for pair in PAIRS:
        for shots in SHOTS:
            for start in STARTS:
                yield f'{pair},{shots},{start}', {}
