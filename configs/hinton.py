"""Hinton, Vinyals & Dean 2015 (arXiv:1503.02531), section 3: a large network on MNIST, a small one, and the small one taught.

    python launch.py --config=configs/hinton.py:teacher --workdir=runs/hinton/teacher
    python launch.py --config=configs/hinton.py:plain --workdir=runs/hinton/plain
    python launch.py --config=configs/hinton.py:taught --workdir=runs/hinton/taught      # reads runs/hinton/teacher
    python -m experiments.run hinton --workdir=runs/hinton                               # all of it, with the table

The teacher has two layers of 1200 ReLUs, dropout (a fifth of the pixels, half of the units), incoming weights of norm at most
15^½ and images shifted by up to two pixels; the student two of 800 and nothing of the sort; taught, it matches soft targets
of τ = 20 on images that are not shifted. All 60,000 training images, judged by the last state on the 10,000 test images.
`narrow` has two layers of 300 (section 3: any τ above 8 does); `few` two of 30 (τ from 2.5 to 4 is best).
`omitted` leaves out the 3s while it is taught.

The paper gives neither optimizer nor length: here Adam with a cosine, 300 epochs of the teacher (an hour of one core), 20 of
the plain student and 120 of those that are taught.
"""

from collections.abc import Iterator

import ml_collections

MNIST = 'npz:../shared/data/mnist.npz'
TEACHER = 'runs/hinton/teacher/model.safetensors'
STUDENTS = {'plain': 800, 'taught': 800, 'omitted': 800, 'narrow': 300, 'few': 30}
TEMPERATURE = {'taught': 20.0, 'omitted': 20.0, 'narrow': 8.0, 'few': 3.0}
ARGUMENTS = ('teacher', *STUDENTS)


def layers(width: int) -> dict:
    return dict(name='mlp', dense=[width, width])


def get_config(arg: str = 'taught') -> ml_collections.ConfigDict:
    return teacher() if arg == 'teacher' else student(arg)


def teacher() -> ml_collections.ConfigDict:
    c = common('teacher')
    c.model = dict(layers(1200), vector_dropout=0.2, dropout=0.5)
    c.data.train_transform = [dict(name='random_crop', size=28, padding=2), 'to_float']
    adam = dict(name='adam', lr=dict(name='cosine', peak=1e-3), max_norm=15**0.5)
    c.stages = [dict(name='teacher', epochs=300, train=[('.*', adam)])]
    return c


def student(arg: str) -> ml_collections.ConfigDict:
    c = common(arg)
    c.model = layers(STUDENTS[arg])
    adam = dict(name='adam', lr=dict(name='cosine', peak=1e-3))
    c.stages = [dict(name=arg, epochs=20 if arg == 'plain' else 120, train=[('.*', adam)])]
    if arg in TEMPERATURE:
        soft = dict(name='soft_targets', temperature=TEMPERATURE[arg])
        c.objective = dict(
            name='unsupervised', distilled=dict(teacher=dict(layers(1200), source=TEACHER), terms=[soft])
        )
    return c


def common(arg: str) -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = f'Hinton 2015 on MNIST, {arg}'
    train = dict(spec=f'{MNIST}/train', omit=[3] if arg == 'omitted' else [])
    c.data = dict(train=train, test=f'{MNIST}/test', train_transform=['to_float'], eval_transform=['to_float'])
    c.batch_size = 200
    c.log_every = 100
    c.keep = 1
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    for arg in ARGUMENTS:
        yield arg, {}
