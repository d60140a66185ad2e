"""Task adaptation of ImageNet's ResNet-50 to birds, cars and aircraft, with 15 % or all of the labels, by seven methods.

    python launch.py --config=configs/task_adaptation.py:CUB,15,delta --workdir=runs/task_adaptation/CUB,15,delta
    python -m experiments.run task_adaptation --workdir=runs/task_adaptation --only='*/CUB 100 %'

The protocol is that of tllib (thuml/Transfer-Learning-Library at c4aa59e, examples/task_adaptation/image_classification, its
shell scripts): 10,000 steps of 48 images by SGD with Nesterov's momentum, weight decay 5e-4, the rate 0.01 of the head, a tenth
of it for the backbone, both times 0.1 after six tenths. Published for CUB-200-2011 with all labels: 81.8 (ERM) to 83.1. Not
run here: it wants the images and a GPU, some hours a run by estimate.

The images and the lists of 15, 30, 50 and 100 % are tllib's own: make its data sets once (`CUB200('data/cub200', 'train',
download=True)`, `StanfordCars('data/stanford_cars', …)`, `Aircraft('data/aircraft', …)` of tllib.vision.datasets) and put the
lists beside what they name: `for d in data/*; do cp $d/image_list/*.txt $d; done`. The weights are torchvision's of 2016
(IMAGENET1K_V1), by the hub's timm/resnet50.tv_in1k.

Where ours differs: DELTA compares the stages' outputs and not the last convolutions', and has its head learn by itself before
the channels are weighed, as its paper says (tllib tunes everything for that). LwF hears what the old network says of the
image at hand, tllib of one crop drawn at the start. Bi-tuning's keys see a mirrored, shifted and warped copy of the queries'
crop, tllib's another crop. Weights that tllib multiplies with a sum over the batch are here 48 times as large.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

WEIGHTS = 'timm/resnet50.tv_in1k'
SETS = {'CUB': 'data/cub200', 'Cars': 'data/stanford_cars', 'Aircraft': 'data/aircraft'}
SHARES = ('100', '15')
STEPS = 20 * 500
BATCH = 48
NORMALIZED = ['to_float', dict(name='normalize', mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])]
VIEW = dict(flip=True, translation=28.0, affine=0.1)
SOURCE = dict(source_classes=1000)
# What stands around the cross-entropy.
METHODS = {
    'erm': {},
    'lwf': dict(lwf=dict(weight=4.0, temperature=3.0, **SOURCE)),
    'bss': dict(bss=dict(weight=1e-3, k=1)),
    'delta': dict(
        delta=dict(
            weight=0.01 * BATCH,
            fresh_weight=0.01,
            layers=['stage1', 'stage2', 'stage3', 'stage4'],
            attention=True,
            attention_batches=10,
        )
    ),
    'stoch_norm': dict(stoch_norm=dict(p=0.5)),
    'co_tuning': dict(co_tuning=dict(weight=2.3, **SOURCE)),
    'bi_tuning': dict(bi_tuning=dict(weight=1.0, keys=40, momentum=0.999, temperature=0.07, dim=128, view=VIEW)),
}


# What else learns, as the backbone does.
EXTRA = {'co_tuning': 'source_head/.*', 'bi_tuning': 'projector/.*'}
# Where lwf.sh has a tenth of the others' rate.
LOWER = {('CUB', '15'), ('Aircraft', '15'), ('Aircraft', '100')}


def images(folder: str, name: str) -> dict[str, Any]:
    """A list of tllib's: `path label` a line."""
    return dict(spec=f'tsv:{folder}/{name}.txt', pattern=r'(?P<image>.*\S)\s+(?P<label>\d+)', image='image')


def get_config(arg: str = 'CUB,100,erm') -> ml_collections.ConfigDict:
    name, share, method = arg.split(',')
    c = ml_collections.ConfigDict()
    c.name = f'{name}, {share} % of the labels, {method}'
    c.model = dict(name=WEIGHTS)
    crop = dict(name='random_resized_crop', size=224, scale=[0.2, 1.0])
    c.data = dict(
        train=images(SETS[name], f'train_{share}'),
        test=images(SETS[name], 'test'),
        train_transform=[crop, 'flip', *NORMALIZED],
        eval_transform=[dict(name='resize', size=256), dict(name='center_crop', size=224), *NORMALIZED],
    )
    c.objective = dict(name='supervised', **METHODS[method])
    rate = 0.001 if method == 'lwf' and (name, share) in LOWER else 0.01
    decay = 0.0 if method == 'delta' else 5e-4  # its penalties stand in for it
    stepped = lambda peak: sgd(dict(name='step', peak=peak, at=[0.6], factor=0.1), decay)
    rules = [('head/.*', stepped(rate)), ('backbone/.*', stepped(rate / 10))]
    if method in EXTRA:
        rules.append((EXTRA[method], stepped(rate / 10)))
    c.stages = [dict(name=method, steps=STEPS, train=rules)]
    if method == 'delta':
        falling = sgd(dict(name='exponential', peak=rate, end=rate * 0.1 ** (10 / 6)), decay)
        head = dict(name='head', epochs=10, train=[('head/.*', falling)], objective=dict(name='supervised'))
        c.stages = [head, *c.stages]
    c.batch_size = BATCH
    c.log_every = 100
    c.keep = 1
    return c


def sgd(lr: dict[str, Any], decay: float) -> dict[str, Any]:
    return dict(name='momentum', nesterov=True, lr=lr, weight_decay=decay)


def sweep() -> Iterator[tuple[str, dict]]:
    for name in SETS:
        for share in SHARES:
            for method in METHODS:
                yield f'{name},{share},{method}', {'seed': 0}
