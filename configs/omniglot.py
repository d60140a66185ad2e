"""Few-shot recognition of Omniglot's characters: ProtoNet, MAML, first-order MAML, ANIL, Reptile.

    python launch.py --config=configs/omniglot.py:protonet --workdir=runs/omniglot/protonet
    python launch.py --config=configs/omniglot.py:protonet,full --workdir=runs/omniglot/protonet_full

Arguments: METHOD[,5shot][,20way][,full]. What the shots and ways are: `protonet` learns from 60-way episodes of one
shot, or of five, and is tested on 5 and 20 ways; the others learn the number of ways that they are tested on (5, or 20).

Without `full` it is shortened for a CPU: ProtoNet takes 800 episodes of 20 ways (paper: 20,000 of 60), the others the
fully connected network of Finn et al. 2017. With `full` it is the papers' protocol, for a GPU:

  protonet          Snell et al. 2017 (arXiv:1703.05175): four blocks of 64, Adam 1e-3 halved every 2,000 episodes
  maml fomaml anil  Finn et al. 2017 (arXiv:1703.03400), flags of cbfinn/maml: four strided convolutions of 64, 60k steps
  reptile           Nichol et al. 2018 (arXiv:1803.02999), flags of openai/supervised-reptile, transductive

All use the split of Vinyals et al. 2016 with rotations as classes (MAML's own split is a random one).
"""

from collections.abc import Iterator

import ml_collections

OMNIGLOT = 'omniglot:../shared/data'
CONV = dict(name='convnet', widths=[64, 64, 64, 64], norm='batch')
# Each task has weights of its own: as products of patches they are batched, as convolutions they would be grouped.
STRIDED = dict(CONV, strides=2, pool=1, reduce='mean', conv_form='patches')
DENSE = dict(name='mlp', dense=[256, 128, 64, 64], dense_norm='batch')


def get_config(arg: str = 'protonet') -> ml_collections.ConfigDict:
    method, *words = arg.split(',')
    full, ways, shots = 'full' in words, 20 if '20way' in words else 5, 5 if '5shot' in words else 1
    c = ml_collections.ConfigDict()
    c.name = f'Omniglot, {arg}'
    c.log_every = 100
    if method == 'protonet':
        protonet(c, shots, full)
    else:
        adaptation(c, method, ways, shots, full)
    c.eval_every = c.stages[0]['steps'] // 10
    c.select_by = 'val/accuracy'
    c.keep = 1
    return c


def protonet(c: ml_collections.ConfigDict, shots: int, full: bool) -> None:
    c.model = dict(CONV, num_classes=0)
    c.objective = dict(name='protonet')
    c.data = dict(
        train=episodes('train', ways=60 if full else 20, shots=shots, queries=5, count=1_000_000),
        eval=episodes('val', ways=5, shots=shots, queries=15, count=200 if full else 100),
        test={
            f'test_{n}way_{shots}shot': episodes('test', ways=n, shots=shots, queries=15, count=1000 if full else 400)
            for n in (5, 20)
        },
    )
    steps = 20_000 if full else 800
    halved = dict(name='step', peak=1e-3, at=list(range(2_000, steps, 2_000)), factor=0.5)
    adam = dict(name='adam', lr=halved if full else dict(name='cosine', peak=1e-3))
    c.batch_size, c.eval_batch_size = 1, 4
    c.stages = [dict(name='protonet', steps=steps, train=[('.*', adam)])]


def adaptation(c: ml_collections.ConfigDict, method: str, ways: int, shots: int, full: bool) -> None:
    c.model = dict(STRIDED if full else DENSE, num_classes=ways)
    held_out = dict(ways=ways, shots=shots, queries=shots, interpolation='lanczos')
    c.data = dict(
        train=episodes('train', count=1_000_000, **held_out),
        eval=episodes('val', count=200, **held_out),
        test=episodes('test', count=600, **held_out),
    )
    c.eval_batch_size = 50
    if method == 'reptile':
        reptile(c, ways)
    else:
        variants = {'maml': {}, 'fomaml': dict(first_order=True), 'anil': dict(inner_rule='head/.*')}
        inner = dict(inner_lr=0.4, inner_steps=1, eval_steps=3) if ways == 5 else dict(inner_lr=0.1, inner_steps=5)
        c.objective = dict(name='maml', **inner, **variants[method])
        c.batch_size = 32 if ways == 5 else 16
        steps = 60_000 if full else 20_000
        c.stages = [dict(name=method, steps=steps, train=[('.*', dict(name='adam', lr=1e-3))])]
    if method == 'reptile' and not full:
        c.stages[0]['steps'] = 2_000


def reptile(c: ml_collections.ConfigDict, ways: int) -> None:
    """5 ways: k = 3 steps of Adam (b1 = 0) on 25 of 75 images; 20 ways: 12 steps on 15 of 180."""
    k, batch, lr, shots = (3, 25, 1e-3, 15) if ways == 5 else (12, 15, 4.6e-4, 9)
    c.data.train.episodes.shots, c.data.train.episodes.queries = shots, 0
    c.objective = dict(name='joint', inner_optimizer='adam', inner_lr=lr, eval_steps=5 if ways == 5 else 50)
    c.gradient = dict(name='reptile', inner_steps=k, inner_batch=batch, inner_lr=lr, inner_optimizer='adam')
    c.batch_size = 10 if ways == 5 else 3
    # The outer rate is the ε of the paper, from 1 to 0.
    outer = dict(name='sgd', lr=dict(name='linear', peak=1.0))
    c.stages = [dict(name='reptile', steps=100_000 if ways == 5 else 200_000, train=[('.*', outer)])]


def episodes(split: str, *, interpolation: str = 'nearest', **fields) -> dict:
    return dict(spec=f'{OMNIGLOT}/{split}', interpolation=interpolation, episodes=dict(fields, transform=['to_float']))


def sweep() -> Iterator[tuple[str, dict]]:
    for method in ('protonet', 'protonet,5shot', 'maml', 'fomaml', 'anil', 'reptile'):
        for size in ('', ',full'):
            yield method + size, {}
