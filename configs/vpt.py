"""Visual prompt tuning of ViT-B/16 of ImageNet-21k: prompts before every block, before the first, or everything tuned.

    python launch.py --config=configs/vpt.py:vtab/dtd,deep --workdir=runs/vpt/dtd,deep       # one setting of one task
    python -m experiments.run vpt --workdir=runs/vpt --only='deep/VTAB*'                    # tuned, then the figure

Jia et al. 2022 (arXiv:2203.12119, table 1) on five fine-grained sets and the nineteen tasks of VTAB-1k, by the settings of
their code (KMnP/vpt at 4410440: tune_fgvc.py, tune_vtab.py, configs/base-{prompt,finetune}.yaml, demo.ipynb). For each task
the table chooses prompts' number, learning rate and weight decay by the validation images, all of its grid, and of VTAB's
it then trains once more on all 1000 (argument `vtab/TASK,METHOD,all`). Not run here: it wants the data, the weights and a large
GPU, 240 settings a task for prompts. FGVC's 10 % for validation are of our draw, its figures the network's on the other 90 %.

Prepared by TensorFlow Datasets as in configs/vtab.py, whose tasks these are, and in the same way caltech_birds2011,
oxford_flowers102, stanford_dogs, cars196; NABirds, which TFDS has not, as folder:data/nabirds/{train,test}/CLASS/*.jpg by its
train_test_split.txt. The weights come from the hub: timm/vit_base_patch16_224.orig_in21k, which are those of
vit_models/imagenet21k/ViT-B_16.npz (to read that file: model.name vit_base_patch16, and source).

Batches are of 64 throughout (theirs of 128 below 100 prompts; the rate is in proportion). Their AdamW decays by 0.01 whatever
their grid says; ours has only that.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from configs.vtab import TASKS, source

WEIGHTS = 'timm/vit_base_patch16_224.orig_in21k'
BATCH = 64
EPOCHS = 100
# name -> training images, those of them to learn from, test images.
FGVC = {
    'cub': ('tfds:caltech_birds2011/train', 5394, 'tfds:caltech_birds2011/test'),
    'nabirds': ('folder:data/nabirds/train', 21536, 'folder:data/nabirds/test'),
    'flowers': ('tfds:oxford_flowers102/train', 1020, 'tfds:oxford_flowers102/test'),
    'dogs': ('tfds:stanford_dogs/train', 10800, 'tfds:stanford_dogs/test'),
    'cars': ('tfds:cars196/train', 7329, 'tfds:cars196/test'),
}
METHODS = ('shallow', 'deep', 'full')
TOKENS = (1, 5, 10, 50, 100, 200)
RATES = {'prompts': (50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05), 'full': (5e-3, 1e-3, 5e-4, 1e-4)}  # of 256 images
DECAYS = (0.01, 0.001, 0.0001, 0.0)

# Not the mean and deviation of 0.5 that the network learnt with: theirs.
NORMALIZED = ['to_float', dict(name='normalize', mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])]
SQUARE = dict(name='resize', size=[224, 224])
SHORT_SIDE = dict(name='resize', size=256)


def get_config(arg: str = 'vtab/dtd,deep') -> ml_collections.ConfigDict:
    name, method, *rest = arg.split(',')
    benchmark, task = name.split('/')
    c = ml_collections.ConfigDict()
    c.name = f'VPT, {name}, {method}'
    c.model = dict(name=WEIGHTS)
    c.data, examples = vtab(task, bool(rest)) if benchmark == 'vtab' else fgvc(task)
    warmup = (5 if method == 'full' else 10) * examples // BATCH
    if method == 'full':
        adamw = dict(name='adamw', lr=dict(name='cosine', peak=scaled(1e-3), warmup=warmup))
        rules = [('.*/bias', adamw), ('.*', dict(adamw, weight_decay=0.01))]
    else:
        dropout = 0.1 if method == 'deep' else 0.0
        c.model.peft = dict(name='vpt', tokens=10, deep=method == 'deep', dropout=dropout)
        sgd = dict(name='momentum', lr=dict(name='cosine', peak=scaled(1.0), warmup=warmup), weight_decay=0.001)
        rules = [('head/bias', dict(sgd, weight_decay=0.0)), ('(adapters|head)/.*', sgd)]
    c.stages = [dict(name=method, epochs=EPOCHS, train=rules)]
    c.batch_size = BATCH
    c.eval_every = EPOCHS * examples // BATCH // 10
    c.select_by = 'last' if rest else 'val/accuracy'
    c.log_every = 50
    c.keep = 1
    return c


def scaled(rate: float) -> float:
    """The learning rate of our batch, of one that is theirs for 256 images."""
    return rate * BATCH / 256


def vtab(task: str, whole: bool) -> tuple[dict[str, Any], int]:
    """The data of a task of VTAB-1k, 800 images of it or all, and their number."""
    parts = TASKS[task]
    transform = [*parts.before, SQUARE, *NORMALIZED]
    data = dict(
        train=source(parts, f'{parts.train}+{parts.val}' if whole else parts.train),
        test=source(parts, parts.test),
        train_transform=transform,
        eval_transform=transform,
    )
    return (data, 1000) if whole else (dict(data, eval=source(parts, parts.val)), 800)


def fgvc(name: str) -> tuple[dict[str, Any], int]:
    """The data of a fine-grained set, and the number of images to learn from."""
    train, examples, test = FGVC[name]
    own = name == 'flowers'  # has validation images of its own
    data = dict(
        train=train if own else f'{train}[:90%]',
        eval='tfds:oxford_flowers102/validation' if own else f'{train}[90%:]',
        test=test,
        train_transform=[SHORT_SIDE, dict(name='random_crop', size=224), 'flip', *NORMALIZED],
        eval_transform=[SHORT_SIDE, dict(name='center_crop', size=224), *NORMALIZED],
    )
    return data, examples


def grid(method: str) -> list[dict[str, Any]]:
    """The overrides that the authors choose among."""
    peaks = lambda rate: {f'stages[0].train[{i}][1].lr.peak': scaled(rate) for i in (0, 1)}
    if method == 'full':
        return [peaks(rate) for rate in RATES['full']]
    return [
        {'model.peft.tokens': tokens, **peaks(rate), 'stages[0].train[1][1].weight_decay': weight}
        for tokens in TOKENS
        for rate in RATES['prompts']
        for weight in DECAYS
    ]


def sweep() -> Iterator[tuple[str, dict]]:
    for method in METHODS:
        for name in FGVC:
            yield f'fgvc/{name},{method}', {'seed': 0}
        for task in TASKS:
            yield f'vtab/{task},{method}', {'seed': 0}
            yield f'vtab/{task},{method},all', {'seed': 0}
