"""Your own folder of images: a pretrained network, and every plain way to adapt it.

    python launch.py --mode=sweep --workdir=runs/photos --config=configs/finetune.py
    python launch.py --workdir=runs/mine --config=configs/finetune.py:lp_ft \
        --config.data.train='folder:my/photos[:70%]' --config.data.eval='folder:my/photos[70%:85%]' \
        --config.data.test='folder:my/photos[85%:]'

As it stands: ImageNet MobileNetV2 (the int8 weights of ../shared/weights, dequantised) → ants and bees, 244 photos to learn
from and 153 to be judged on. A fifth of the 244 chooses the checkpoint. `make photos` unpacks the photos and runs the sweep.
"""

from collections.abc import Iterator

import ml_collections

WEIGHTS = '../shared/weights/mobilenet_tflite/mobilenet_v2_1.0_224_quant.npz'
PROBE = dict(name='adam', lr=1e-2)
FULL = dict(name='momentum', lr=dict(name='cosine', peak=3e-3, warmup=8), weight_decay=1e-4)
STRATEGIES = {
    'scratch': [dict(name='scratch', epochs=6, train=[('.*', dict(name='adamw', lr=1e-3, weight_decay=0.05))])],
    'probe': [dict(name='probe', epochs=6, train=[('head/.*', PROBE)])],
    'full': [dict(name='full', epochs=6, train=[('.*', FULL)])],
    'last_blocks': [dict(name='last', epochs=6, train=[('head/.*', FULL), ('backbone/(final|block1[4-7])/.*', FULL)])],
    # Kumar et al. 2022, arXiv:2202.10054.
    'lp_ft': [
        dict(name='probe', epochs=3, train=[('head/.*', PROBE)]),
        dict(name='full', epochs=3, train=[('.*', dict(FULL, lr=dict(name='cosine', peak=1e-3)))]),
    ],
}


def get_config(arg: str = 'lp_ft') -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = f'MobileNetV2 → photos, {arg}'
    c.model = dict(name='mobilenet_v2', norm='none', padding='same', source=WEIGHTS)
    if arg == 'scratch':  # the quantised weights have their batch norm folded in; a fresh network needs its own
        c.model = dict(name='mobilenet_v2', source=None)
    normalize = dict(name='normalize', mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
    c.data = dict(
        train='folder:runs/hymenoptera/train[:80%]',
        eval='folder:runs/hymenoptera/train[80%:]',
        test='folder:runs/hymenoptera/val',
        train_transform=[dict(name='random_resized_crop', size=224, scale=[0.5, 1.0]), 'flip', 'to_float', normalize],
        eval_transform=[dict(name='resize', size=256), dict(name='center_crop', size=224), 'to_float', normalize],
    )
    c.batch_size = 16
    c.eval_batch_size = 32
    c.stages = STRATEGIES[arg]
    c.eval_every = 12
    c.log_every = 6
    c.select_by = 'val/accuracy'
    c.keep = 1
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    for strategy in STRATEGIES:
        yield strategy, {'seed': 0}
