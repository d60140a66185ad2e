"""MNIST ↔ USPS: adapt a digit classifier to the other set's images without its labels.

    python launch.py --config=configs/digits.py:mnist,usps,full,dann --workdir=runs/digits/dann
    python -m experiments.run digits --workdir=runs/digits       # all methods, both ways, sampled and full

The argument names source, target, protocol and method: source, dann, cdan, adda, coral, dan, ddc, mcd, shot_source,
shot, shot_im or self_ensembling. `sampled` takes 2000 images of MNIST and 1800 of USPS (Long et al. 2013, as ADDA does),
`full` all training images; both are judged on all test images of the target, by the last state. Images are 28×28, USPS
enlarged from 16×16, in −1 … 1. Stages are shortened for a CPU; `--config.stages[0].steps=…` lengthens them. `shot`
starts from the network of a `shot_source` run (`--config.model.source=…/model.safetensors`) and has no source stream at all.
"""

import ml_collections

SHARED = '../shared/data'
SAMPLED = {'mnist': '[:2000]', 'usps': '[:1800]'}
CENTRE = ['to_float', dict(name='normalize', mean=[0.5], std=[0.5])]
TRANSFORM = {'mnist': CENTRE, 'usps': [dict(name='resize', size=[28, 28]), *CENTRE]}

DISCRIMINATOR = dict(name='mlp', dense=[500, 500], num_classes=1)
ADAM = dict(name='adam', lr=1e-3)
SLOW_ADAM = dict(name='adam', lr=2e-4, b1=0.5)
ANNEALED = dict(name='momentum', lr=dict(name='annealed', peak=0.01))
LENET = dict(name='lenet')
# Saito et al. 2018 (whose heads also have batch norm and drop their inputs) and French et al. 2018, for digits; Liang et al.
# 2020 with its bottleneck and weight-normalised head.
MCD_NET = dict(
    name='convnet',
    widths=[32, 48],
    kernel_size=5,
    padding=0,
    norm='batch',
    head=dict(name='mlp', widths=[100, 100], dropout=0.5),
)
ENSEMBLE_NET = dict(
    name='convnet',
    widths=[32, 64, 64],
    kernel_size=[5, 3, 3],
    padding=0,
    pool=[2, 1, 2],
    norm='batch',
    vector_dropout=0.5,
    dense=[256],
)
SHOT_NET = dict(
    name='lenet',
    conv_dropout=[0.0, 0.5],
    dense=[256],
    dense_norm='batch',
    dense_activation='none',
    dropout=0.5,
    head='weight_norm',
)
SHOT_SGD = dict(
    name='sgd', momentum=0.9, nesterov=True, weight_decay=1e-3, lr=dict(name='annealed', peak=0.01, power=0.75)
)
# Where the source is USPS, SHOT shifts and turns its images.
SHOT_USPS = [
    dict(name='resize', size=[28, 28]),
    dict(name='random_crop', size=28, padding=4),
    dict(name='rotate', degrees=10),
    *CENTRE,
]


def get_config(arg: str = 'mnist,usps,full,dann') -> ml_collections.ConfigDict:
    source, target, protocol, method = arg.split(',')
    part = SAMPLED if protocol == 'sampled' else {'mnist': '', 'usps': ''}
    steps = 1500 if protocol == 'sampled' else 2500
    c = ml_collections.ConfigDict()
    c.name = f'{source} → {target} ({protocol}), {method}'
    c.model = LENET
    labelled = f'npz:{SHARED}/{source}.npz/train{part[source]}'
    unlabelled = dict(spec=f'npz:{SHARED}/{target}.npz/train{part[target]}', unlabelled=True)
    c.data = dict(
        train=dict(source=labelled, target=unlabelled),
        test=dict(target=f'npz:{SHARED}/{target}.npz/test', source=f'npz:{SHARED}/{source}.npz/test'),
        train_transform=dict(source=TRANSFORM[source], target=TRANSFORM[target]),
        eval_transform=dict(source=TRANSFORM[source], target=TRANSFORM[target]),
    )
    c.batch_size = 64
    c.log_every = 100
    c.keep = 1
    c.report_before = method in ('adda', 'shot', 'shot_im')  # the source's network on both domains
    c.objective, c.stages = METHODS[method](c, steps)
    if method.startswith('shot') and source == 'usps':
        c.data.train_transform.source = SHOT_USPS
    if method in ('shot', 'shot_im'):
        del c.data.train['source'], c.data.test['source']
        del c.data.train_transform['source'], c.data.eval_transform['source']
    return c


def supervised(label_smoothing: float = 0.0) -> dict:
    return dict(name='supervised', stream='source', label_smoothing=label_smoothing)


def one_stage(objective: dict, optimizer: dict = ADAM, model: dict = LENET, length: int = 0):
    """A method that trains everything at once from scratch."""

    def build(c, steps):
        c.model = model
        return objective, [dict(name=objective['name'], steps=length or steps, train=[('.*', optimizer)])]

    return build


def adda(c, steps):
    c.batch_size = 128
    return dict(name='adda', discriminator=DISCRIMINATOR), [
        dict(name='source', steps=steps, objective=supervised(), train=[('.*', ADAM)]),
        dict(name='adapt', steps=steps, train=[('(target|discriminator)/.*', SLOW_ADAM)]),
    ]


def shot_source(c, steps):
    c.model = SHOT_NET
    # About ten epochs of MNIST, twenty of USPS; the paper's are thirty.
    length = 10_000 if 'mnist' in c.data.train.source else steps
    return supervised(0.1), [dict(name='source', steps=length, train=[('.*', SHOT_SGD)])]


def shot(pseudo_weight: float):
    def build(c, steps):
        c.model = dict(SHOT_NET, source='runs/digits/shot_source/model.safetensors')
        # Pseudo-labels anew once an epoch of the target: 114 steps for USPS, 938 for MNIST.
        c.refresh_every = 114 if 'usps' in c.data.train.target.spec else 938
        return dict(name='shot', pseudo_weight=pseudo_weight), [
            dict(name='adapt', steps=steps + 500, train=[('backbone/.*', SHOT_SGD)])
        ]

    return build


def self_ensembling(c, steps):
    c.model = ENSEMBLE_NET
    view = dict(translation=2.0, noise=0.1, fill=-1.0)
    # The variant of their table 1 with a ramp in place of the confidence threshold (MT+TF).
    return dict(name='self_ensembling', confidence=0.0, rampup=80 / 300, class_balance=0.0, view=view), [
        dict(name='adapt', steps=1500, train=[('.*', ADAM)])
    ]


METHODS = {
    'source': one_stage(supervised()),
    'dann': one_stage(dict(name='dann', discriminator=DISCRIMINATOR, weight=0.5), ANNEALED),
    'cdan': one_stage(dict(name='cdan', discriminator=DISCRIMINATOR, weight=0.5, product='multilinear'), ANNEALED),
    'coral': one_stage(dict(name='coral', weight=1.0)),
    'dan': one_stage(dict(name='dan', gamma=10.0)),
    'ddc': one_stage(dict(name='dan', layers=['features'], bandwidths=[1.0])),
    # A step is six moves; the paper's rate is 2e-4.
    'mcd': one_stage(dict(name='mcd', repeats=4), dict(name='adam', lr=1e-3, weight_decay=5e-4), MCD_NET, length=700),
    'adda': adda,
    'shot_source': shot_source,
    'shot': shot(0.1),
    'shot_im': shot(0.0),
    'self_ensembling': self_ensembling,
}


def sweep():
    for method in METHODS:
        for pair in ('mnist,usps', 'usps,mnist'):
            for protocol in ('sampled', 'full'):
                yield f'{pair},{protocol},{method}', {}
