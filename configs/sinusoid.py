"""Few-shot regression of sinusoids: MAML and its kin (Finn et al. 2017, arXiv:1703.03400, sec. 5.1).

    python launch.py --config=configs/sinusoid.py:maml --workdir=runs/sinusoid/maml

The argument is maml, metasgd, fomaml, anil, reptile or pretrained (one network for all tasks, the paper's baseline). As
the flags of cbfinn/maml: two layers of 40 ReLU, 5 points to adapt on and 5 to be judged by, one inner step of rate
0.01 (the paper's; the flag's default is 0.001), 25 tasks a step, Adam at 1e-3, 70,000 steps. Tested on 600 curves, with
5, 10 and 20 points to adapt on and 100 to be judged by; `test_5/mse_step1` is the figure of the tables, the rest the
curve of ten steps.
"""

from collections.abc import Iterator

import ml_collections

METHODS = {
    'maml': dict(name='maml'),
    'metasgd': dict(name='maml', learn_lr=True),
    'fomaml': dict(name='maml', first_order=True),
    'anil': dict(name='maml', inner_rule='head/.*'),
    'reptile': dict(name='joint'),
    'pretrained': dict(name='joint'),
}


def get_config(arg: str = 'maml') -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = f'sinusoid, {arg}'
    c.model = dict(name='mlp', dense=[40, 40], num_classes=1)
    c.objective = dict(METHODS[arg], inner_lr=0.01, eval_steps=10)
    c.data = dict(
        train=dict(spec='sinusoid:train', support=5, query=5),
        eval=dict(spec='sinusoid:val', support=5, query=100, count=600),
        test={f'test_{k}': dict(spec='sinusoid:test', support=k, query=100, count=600) for k in (5, 10, 20)},
    )
    c.batch_size = 25
    c.eval_batch_size = 600
    c.stages = [dict(name=arg, steps=70_000, train=[('.*', dict(name='adam', lr=1e-3))])]
    if arg == 'reptile':
        # As the authors' published demonstration: one pass over 50 points, ten at a time; one task a step; ε from 0.1 to 0.
        c.data.train.support = 50
        c.gradient = dict(name='reptile', inner_steps=5, inner_lr=0.02, inner_batch=10)
        c.objective.update(inner_lr=0.02, eval_steps=32)
        c.batch_size = 1
        c.stages[0] = dict(name=arg, steps=30_000, train=[('.*', dict(name='sgd', lr=dict(name='linear', peak=0.1)))])
    c.log_every = 1000
    c.eval_every = 10_000
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    for method in METHODS:
        yield method, {}
