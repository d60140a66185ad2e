"""Your own folder of images: a pretrained network, and every plain way to adapt it.

    python launch.py --workdir=runs/photos --config=configs/finetune.py --mode=sweep      # all strategies, one table
    python launch.py --workdir=runs/probe --config=configs/finetune.py:probe              # one of them

For your own, copy this file and change MODEL, DATA, MEAN and STD, or set them on the command line. As it stands: ImageNet
MobileNetV2 (the int8 weights of ../shared/weights, dequantised) → ants and bees, 244 photos of 160 pixels to learn from, a
fifth of which choose the checkpoint, and 153 to be judged on. `make photos` unpacks the photos and runs the sweep.
"""

from collections.abc import Iterator

import ml_collections

# norm='none': these weights have their batch norm folded in; torchvision's take dict(name='mobilenet_v2', source=…).
MODEL = dict(
    name='mobilenet_v2',
    norm='none',
    padding='same',
    source='../shared/weights/mobilenet_tflite/mobilenet_v2_1.0_224_quant.npz',
)
SCRATCH = {field: value for field, value in MODEL.items() if field not in ('source', 'norm', 'padding')}
DATA = dict(
    train='folder:runs/hymenoptera/train[:80%]',
    eval='folder:runs/hymenoptera/train[80%:]',
    test='folder:runs/hymenoptera/val',
)
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]  # torchvision's and timm's: [.485, .456, .406], [.229, .224, .225]
SIZE = 160

PROBE = dict(name='adam', lr=1e-2)
FULL = dict(name='adamw', lr=dict(name='cosine', peak=1e-4, warmup=8), weight_decay=1e-4)
STRATEGIES = {
    'scratch': [dict(name='scratch', epochs=4, train=[('.*', dict(name='adamw', lr=1e-3, weight_decay=0.05))])],
    'probe': [dict(name='probe', epochs=4, train=[('head/.*', PROBE)])],
    'full': [dict(name='full', epochs=4, train=[('.*', FULL)])],
    'last_blocks': [dict(name='last', epochs=4, train=[('head/.*', FULL), ('backbone/(final|block1[4-7])/.*', FULL)])],
    # Kumar et al. 2022, arXiv:2202.10054.
    'lp_ft': [
        dict(name='probe', epochs=2, train=[('head/.*', PROBE)]),
        dict(name='full', epochs=2, train=[('.*', dict(FULL, lr=dict(name='cosine', peak=5e-5)))]),
    ],
}


def get_config(arg: str = 'lp_ft') -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = f'{MODEL["name"]} → photos, {arg}'
    c.model = SCRATCH if arg == 'scratch' else MODEL
    finish = ['to_float', dict(name='normalize', mean=MEAN, std=STD)]
    c.data = dict(
        **DATA,
        train_transform=[dict(name='random_resized_crop', size=SIZE, scale=[0.5, 1.0]), 'flip', *finish],
        eval_transform=[dict(name='resize', size=SIZE * 8 // 7), dict(name='center_crop', size=SIZE), *finish],
    )
    c.batch_size = 16
    c.eval_batch_size = 32
    c.stages = STRATEGIES[arg]
    c.eval_every = 24
    c.log_every = 12
    c.select_by = 'val/accuracy'
    c.keep = 1
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    for strategy in STRATEGIES:
        yield strategy, {'seed': 0}
