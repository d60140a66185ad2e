"""Every way to distil, under one budget: CIFAR-10's ResNet-56 (real weights, 93.4 %) teaches a ResNet-20 from scratch.

    make cifar10                                                                         # once: runs/cifar10.npz
    python launch.py --config=configs/distill.py:soft_targets --workdir=runs/distill/soft_targets
    python -m experiments.run distill --workdir=runs/distill                             # all of them, 3 seeds

The argument names the method. 1,250 images, four epochs, batches of 32, SGD as in RepDistiller (Tian et al. 2020,
arXiv:1910.10699, whose weights beside the labels' loss the terms have by default). Images are not augmented, so that the teacher
runs once over each of them for all methods and seeds. Judged by the last state on 2,000 test images. A run takes two minutes
on one core: what a short budget shows is which targets teach fast, not where each method ends after 240 epochs; that is
`configs/repdistiller.py`.
"""

from collections.abc import Iterator

import ml_collections

CIFAR = 'npz:runs/cifar10.npz'
NORMALISED = ['to_float', dict(name='normalize', mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])]
TEACHER = dict(name='resnet56', source='../shared/weights/cifar10_resnet/resnet56-4bfd9763.th')
STAGES = ['stage1', 'stage2', 'stage3']

SOFT = dict(name='soft_targets', temperature=4.0, weight=0.9)


def beside(*terms: dict, label_weight: float = 1.0) -> dict:
    """Terms beside the labels."""
    return dict(terms=list(terms), label_weight=label_weight)


def paraphrased(stage: str) -> dict:
    return dict(name='factor_transfer', layer='stage3', stage=stage)


# method -> the distillations of its stages; an epoch for each stage but the last, which has the rest.
METHODS = {
    'labels': [None],
    # What the teacher predicts.
    'soft_targets': [beside(SOFT, label_weight=0.1)],
    'soft_only': [beside(dict(SOFT, weight=1.0), label_weight=0.0)],
    'annealed': [beside(dict(SOFT, weight=dict(start=1.0, end=0.0)), label_weight=dict(start=0.0, end=1.0))],
    'standardised': [
        beside(dict(name='soft_targets', temperature=2.0, standardised=True, weight=9.0), label_weight=0.1)
    ],
    'hard_targets': [beside(dict(name='hard_targets', weight=0.5), label_weight=0.5)],
    'dkd': [beside(dict(name='dkd', weight=dict(start=0.0, end=1.0, until=0.1)))],
    'dist': [beside(dict(name='dist', weight=2.0))],
    'virtual_teacher': [beside(dict(name='virtual_teacher', weight=0.1), label_weight=0.9)],
    # Its maps.
    'hints': [beside(dict(name='hints', layers=['stage2']), label_weight=0.0), beside(SOFT, label_weight=0.1)],
    'hints_beside': [beside(dict(name='hints', layers=['stage2'], weight=100.0))],
    'attention': [beside(dict(name='attention', layers=STAGES))],
    'attention_and_soft': [beside(dict(name='attention', layers=STAGES), SOFT, label_weight=0.1)],
    'fsp': [beside(dict(name='fsp', layers=['stem', *STAGES]), label_weight=0.0), beside(SOFT, label_weight=0.1)],
    'nst': [beside(dict(name='nst', layers=['stage3']))],
    'vid': [beside(dict(name='vid', layers=STAGES))],
    'factor_transfer': [
        beside(paraphrased('paraphrase'), label_weight=0.0),
        beside(paraphrased('transfer')),
    ],
    'ofd': [beside(dict(name='ofd', layers=[f'{stage}_preactivation' for stage in STAGES]))],
    'reviewkd': [
        beside(dict(name='reviewkd', layers=[*STAGES, 'features'], weight=dict(start=0.0, end=0.7, until=0.1)))
    ],
    'srrl': [beside(dict(name='srrl', student='stage3'))],
    'ickd': [beside(dict(name='ickd', layers=['stage3']))],
    # How its examples stand to one another.
    'pkt': [beside(dict(name='pkt'))],
    'rkd': [beside(dict(name='rkd'))],
    'similarity': [beside(dict(name='similarity', layers=['stage3']))],
    'correlation': [beside(dict(name='correlation'))],
    'correlation_code': [beside(dict(name='correlation_code'))],
    'crd': [beside(dict(name='crd'))],
    'prototypes': [beside(dict(name='prototypes'))],
    # No teacher but itself.
    'exits': [beside(dict(name='exits', layers=['stage1', 'stage2']))],
}
NO_TEACHER = ('labels', 'virtual_teacher', 'exits')
# What learns in the first of two stages: the student up to the hint, or the paraphraser alone; it then stays.
FIRST = {
    'hints': [('backbone/(stem|stage1|stage2)/.*', True), ('projectors/.*', True)],
    'fsp': [('backbone/.*', True)],
    'factor_transfer': [('projectors/.*/(encoder|decoder)/.*', True)],
}
STILL = {'factor_transfer': [('projectors/.*/(encoder|decoder)/.*', None)]}
# Whose first steps, at the published weight and this rate, overflow without a limit to the gradient's norm.
UNSTABLE = ('hints_beside', 'fsp')


def get_config(arg: str = 'soft_targets') -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = f'ResNet-56 → ResNet-20 on CIFAR-10, {arg}'
    raw = dict(preactivations=True) if arg == 'ofd' else {}
    c.model = dict(name='resnet20', **raw)
    c.data = dict(
        train=f'{CIFAR}/train[:1250]',
        test=f'{CIFAR}/test[:2000]',
        train_transform=NORMALISED,
        eval_transform=NORMALISED,
    )
    c.batch_size = 32
    c.cache_dtype = 'float16'
    if arg in UNSTABLE:
        c.clip_norm = 5.0
    *first, last = [objective_of(arg, distilled, raw) for distilled in METHODS[arg]]
    sgd = dict(name='momentum', weight_decay=5e-4)
    begin, rest = dict(sgd, lr=0.05), dict(sgd, lr=dict(name='cosine', peak=0.05))
    early = [dict(name='first', epochs=1, objective=o, train=rules(FIRST[arg], begin)) for o in first]
    late = rules([*STILL.get(arg, []), ('.*', True)], rest)
    c.stages = [*early, dict(name=arg, epochs=4 - len(early), objective=last, train=late)]
    c.log_every = 50
    c.keep = 1
    return c


def objective_of(arg: str, distilled: dict | None, raw: dict) -> dict:
    if not distilled:
        return dict(name='supervised')
    teacher = {} if arg in NO_TEACHER else dict(teacher=dict(TEACHER, **raw))
    return dict(name='supervised', distilled=dict(distilled, **teacher))


def rules(which: list, optimizer: dict) -> list:
    return [(rule, optimizer if learns else None) for rule, learns in which]


def sweep() -> Iterator[tuple[str, dict]]:
    for arg in METHODS:
        yield arg, {}
