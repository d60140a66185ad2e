"""From MNIST to other people's digits with every penalty and regulariser, and what is left after training to merge.

    python launch.py --config=configs/regularised.py:l2_sp --workdir=runs/l2_sp            # one of them
    python launch.py --config=configs/regularised.py --workdir=runs/regularised --mode=sweep
    python launch.py --mode=merge --method=greedy_soup --files='runs/regularised/full/seed*' --workdir=runs/soup
    python launch.py --mode=merge --method='wise_ft(alpha=[0, 0.25, 0.5, 0.75, 1])' --workdir=runs/wise_ft \\
        --start=runs/regularised/probe/seed0 --files=runs/regularised/full/seed0

The task is that of configs/quickstart.py: the shipped network of MNIST, 50 labelled digits of scikit-learn to learn from, 300
to choose the checkpoint by, 897 to be judged on. The head trains alone first (Kumar et al. 2022, arXiv:2202.10054), then
everything. Weights are of the papers' order; nothing was tuned here. Three methods want another network than the rest, so
each has that network without it beside it: `stoch_norm` is to be held against `batch_norm`, `r_drop` against `dropout` and
`stochastic_depth` against `residual`; these last two start from nothing and train everything at once. `swa` is the plain mean of
the last half of the steps, `ema` the running mean of decay 0.9. For the rows of tllib's table (ResNet-50 on CUB, Cars,
Aircraft) name that network and those images instead; its weights of penalties that sum over a batch are B times ours.
"""

from collections.abc import Iterator

import ml_collections

# The wrappers around cross-entropy; `{}` takes a method's own defaults.
METHODS = {
    'full': {},
    'label_smoothing': dict(label_smoothing=0.1),
    'l1': dict(l1=dict(weight=1e-4)),
    'l2': dict(l2=dict(weight=1e-3)),
    'l2_sp': dict(l2_sp=dict(weight=0.01, fresh_weight=0.01)),
    'delta': dict(delta=dict(weight=0.01, fresh_weight=0.01)),
    'delta_attention': dict(delta=dict(weight=0.5, fresh_weight=0.01, attention=True)),
    'bss': dict(bss=dict(weight=1e-3, k=1)),
    'co_tuning': dict(co_tuning=dict(weight=2.3, source_classes=10)),
    'lwf': dict(lwf=dict(weight=1.0, temperature=2.0, source_classes=10)),
    'bi_tuning': dict(bi_tuning=dict(keys=8, view=dict(translation=1.0))),  # five examples a class cannot fill 40
    'mixout': dict(mixout=dict(p=0.7)),
    'dropout': {},
    'r_drop': dict(r_drop=dict(weight=1.0)),
    'batch_norm': {},
    'stoch_norm': dict(stoch_norm=dict(p=0.5)),
    'residual': {},
    'stochastic_depth': {},
    'ema': {},
    'swa': {},
}
ADAM = dict(name='adam', lr=3e-4)
PROBE = dict(name='probe', steps=50, train=[('(head|source_head|projector)/.*', dict(name='adam', lr=1e-2))])
FULL = dict(name='full', steps=50, train=[('.*', ADAM)])


def get_config(arg: str = 'l2_sp') -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = f'MNIST → digits, {arg}'
    c.model = dict(name='convnet', widths=[16, 32, 64], source='shipped:mnist_convnet', fresh=['head/.*'])
    # A digit of MNIST fills 20 of its 28 pixels.
    place = [dict(name='resize', size=[20, 20]), dict(name='pad', padding=4), 'to_float']
    c.data = dict(
        train=dict(spec='sklearn:digits/train', shots=5),
        eval='sklearn:digits/val',
        test='sklearn:digits/test',
        train_transform=place,
        eval_transform=place,
    )
    c.objective = dict(name='supervised', **METHODS.get(arg, {}))
    c.stages = [PROBE] if arg == 'probe' else [PROBE, FULL]
    c.batch_size = 50
    c.eval_batch_size = 300
    c.eval_every = 25
    c.log_every = 25
    c.select_by = 'val/accuracy'
    c.keep = 1
    if arg in ('dropout', 'r_drop'):  # two passes differ by their dropout
        c.model.vector_dropout = 0.3
    if arg in (
        'batch_norm',
        'stoch_norm',
    ):  # the shipped network has no batch norm; its own begin as identities, without the biases
        c.model.update(norm='batch', fresh=['head/.*', 'backbone/norm.*'], ignore=['.*/conv./bias'])
    if arg in ('residual', 'stochastic_depth'):  # wants blocks to leave out; no residual network is shipped
        drop_path = 0.2 if arg == 'stochastic_depth' else 0.0
        small = dict(stage_sizes=[1, 1], widths=[16, 32], stem_width=16, stem='small')
        c.model = dict(name='resnet18', drop_path=drop_path, **small)
        c.stages = [dict(name='full', steps=100, train=[('.*', dict(ADAM, lr=1e-3))])]
    if arg == 'ema':
        c.ema, c.select_by = 0.9, 'last'
    if arg == 'swa':
        c.ema, c.ema_from, c.select_by = 1.0, 0.5, 'last'
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    for seed in range(3):
        for method in ('probe', *METHODS):
            yield method, {'seed': seed}
