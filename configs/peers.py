"""Networks without a stronger teacher: they learn with one another, from their own earlier selves, or from their own end.

    python launch.py --config=configs/peers.py:mutual --workdir=runs/peers/mutual
    python launch.py --config=configs/peers.py:labels --workdir=runs/peers/labels
    python launch.py --config=configs/peers.py:born_again --workdir=runs/peers/born_again    # reads runs/peers/labels
    python -m experiments.run peers --workdir=runs/peers                                     # all of them, with the table

Ten labels a class of scikit-learn's digits, a convnet from scratch, judged by the last state on 897 others; seconds each. The
argument names the method:

- `labels`: the network alone.
- `mutual`, `mutual_of_three`: deep mutual learning by algorithm 1 (Zhang et al. 2018, arXiv:1706.00384); `together`: with all
  updates from one pass.
- `exits`: be your own teacher (Zhang et al. 2019, arXiv:1905.08094).
- `virtual_teacher`, `own_teacher`: teacher-free distillation, Tf-KD_reg and Tf-KD_self (Yuan et al. 2020, arXiv:1909.11723).
- `born_again`, `born_again_2`: the second and third generation of one architecture, with labels (Furlanello et al. 2018,
  arXiv:1805.04770, BAN+L).
- `follower`: the moving average of the student's weights teaches it (Tarvainen & Valpola 2017, arXiv:1703.01780, with labels
  for all images and its weight growing over half of the steps).
- `token_labels`, `token_soft`, `token_hard`: a small DeiT from labels alone, and with the convnet of `labels` teaching its
  distillation token (Touvron et al. 2020, arXiv:2012.12877).

Temperatures and weights are of the papers' order; nothing was tuned here. DML's CIFAR-100 pairs, say, are these sections with
`resnet32` in place of the convnet, that data, and the paper's 200 epochs.
"""

from collections.abc import Iterator

import ml_collections

CONVNET = dict(name='convnet', widths=[8, 16], norm='batch')
DEIT = dict(name='deit_tiny_distilled_patch16', width=32, depth=2, heads=2, image_size=8, patch_size=2)
# Methods with a teacher of an earlier run -> that run.
TEACHER = {
    'own_teacher': 'labels',
    'born_again': 'labels',
    'born_again_2': 'born_again',
    'token_soft': 'labels',
    'token_hard': 'labels',
}


def soft(temperature: float, weight: float | dict, **fields: str) -> dict:
    return dict(name='soft_targets', temperature=temperature, weight=weight, **fields)


# Within config.objective.distilled, but for the teacher.
DISTILLED = {
    'exits': dict(terms=[dict(name='exits', layers=['conv1'])]),
    'virtual_teacher': dict(terms=[dict(name='virtual_teacher', temperature=20.0, weight=0.9)], label_weight=0.1),
    'own_teacher': dict(terms=[soft(6.0, 0.9)], label_weight=0.1),
    'born_again': dict(terms=[soft(1.0, 1.0)]),
    'born_again_2': dict(terms=[soft(1.0, 1.0)]),
    'follower': dict(terms=[soft(1.0, dict(start=0.0, end=1.0, until=0.5))], decay=0.98),
    'token_soft': dict(terms=[soft(3.0, 0.5, student='distillation_logits')], label_weight=0.5),
    'token_hard': dict(terms=[dict(name='hard_targets', student='distillation_logits', weight=0.5)], label_weight=0.5),
}
MUTUAL = {
    'mutual': dict(peers=[CONVNET]),
    'mutual_of_three': dict(peers=[CONVNET, CONVNET]),
    'together': dict(peers=[CONVNET], order='together'),
}
METHODS = ('labels', *MUTUAL, *DISTILLED, 'token_labels')


def get_config(arg: str = 'mutual') -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = f'Digits without a stronger teacher, {arg}'
    c.model = DEIT if arg.startswith('token') else CONVNET
    c.data = dict(
        train=dict(spec='sklearn:digits/train', shots=10),
        test='sklearn:digits/test',
        train_transform=['to_float'],
        eval_transform=['to_float'],
    )
    c.objective = dict(name='mutual', **MUTUAL[arg]) if arg in MUTUAL else dict(name='supervised')
    if arg in DISTILLED:
        c.objective.distilled = dict(DISTILLED[arg])
    if arg in TEACHER:
        c.objective.distilled.teacher = dict(CONVNET, source=f'runs/peers/{TEACHER[arg]}/model.safetensors')
    if arg in ('token_soft', 'token_hard'):
        c.objective.logits = 'class_logits'
    adam = dict(name='adam', lr=dict(name='cosine', peak=3e-3))
    c.stages = [dict(name=arg, steps=300, train=[('.*', adam)])]
    c.batch_size = 50
    c.eval_batch_size = 300
    c.log_every = 50
    c.keep = 1
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    for method in METHODS:
        yield method, {}
