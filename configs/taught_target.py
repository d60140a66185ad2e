"""Distillation under transfer: a teacher tuned on ten labels a class of the target labels all its other images for a student.

    python launch.py --config=configs/shots.py:usps,10,transfer --workdir=runs/taught_target/teacher.usps
    python launch.py --config=configs/taught_target.py:usps,taught --workdir=runs/taught_target/usps    # reads that teacher
    python -m experiments.run taught_target --workdir=runs/taught_target                                # both sets, 3 seeds

The argument names the target (usps or digits, as in configs/shots.py) and what the student learns from: `labels`, the ten a class
that the teacher had; `taught`, the teacher's soft targets on all training images, whose labels nobody sees; `hard`, the
teacher's first classes there. The student is a convnet a tenth of the teacher's size, from scratch. The data-free question
of Hinton et al. 2015 (arXiv:1503.02531, sec. 2) asked across domains: the transfer set is the target's, unlabelled.
"""

from collections.abc import Iterator

import ml_collections

SHARED = '../shared'
TO_28 = [dict(name='resize', size=[28, 28]), 'to_float']
TARGETS = {
    'usps': (f'npz:{SHARED}/data/usps.npz/train', f'npz:{SHARED}/data/usps.npz/test'),
    'digits': ('sklearn:digits/train', 'sklearn:digits/test'),
}
STUDENT = dict(name='convnet', widths=[8, 12, 16])
TEACHER = dict(name='convnet', widths=[16, 32, 64])
TERMS = {'taught': dict(name='soft_targets', temperature=4.0), 'hard': dict(name='hard_targets')}
LEARNS_FROM = ('labels', *TERMS)


def get_config(arg: str = 'usps,taught') -> ml_collections.ConfigDict:
    target, how = arg.split(',')
    pool, test = TARGETS[target]
    c = ml_collections.ConfigDict()
    c.name = f'Student on {target}, {how}'
    c.model = STUDENT
    train = dict(spec=pool, shots=10) if how == 'labels' else dict(spec=pool, unlabelled=True)
    c.data = dict(train=train, test=test, train_transform=TO_28, eval_transform=TO_28)
    if how in TERMS:
        source = f'runs/taught_target/teacher.{target}/model.safetensors'
        distilled = dict(teacher=dict(TEACHER, source=source), terms=[TERMS[how]])
        c.objective = dict(name='unsupervised', distilled=distilled)
    c.batch_size = 32
    adam = dict(name='adam', lr=dict(name='cosine', peak=2e-3))
    c.stages = [dict(name=how, steps=300 if how == 'labels' else 1500, train=[('.*', adam)])]
    c.log_every = 50
    c.keep = 1
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    for target in TARGETS:
        for how in LEARNS_FROM:
            yield f'{target},{how}', {}
