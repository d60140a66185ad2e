"""Named sequences of stages: a `recipe` among `config.stages` stands for several of them.

    stages = [dict(recipe='gradual_unfreezing', epochs=12, optimizer=dict(name='adamw', lr=1e-3))]

A recipe's length (steps, epochs or examples) is that of all its stages together; its `name`, `objective` and `gradient` are
theirs.
"""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tl_jax.config import call, check_type
from tl_jax.errors import UserError, nearest
from tl_jax.optimizers import scaled
from tl_jax.partitions import check_percentile

UNITS = ('steps', 'epochs', 'examples')


class Length(NamedTuple):
    """How long something lasts, in one of `UNITS`."""

    unit: str
    count: float
    field: str

    def parts(self, *parts: tuple[str, float, Any]) -> list[dict[str, Any]]:
        """Stages from (name, length, train), the lengths in the same unit and together the whole.

        Whole steps and examples are cut where a part ends, each part having one at least, so that their sum is kept.
        """
        for name, length, _ in parts:
            if length <= 0:
                raise UserError(
                    f'{self.field}.{self.unit}: {self.count} leaves the part {name!r} no time; lengthen the recipe'
                )
        lengths = [length for _, length, _ in parts]
        if self.unit != 'epochs':
            whole = round(self.count)
            if whole < len(parts):
                raise UserError(
                    f"{self.field}.{self.unit}: {self.count} are fewer than the recipe's {len(parts)} parts; lengthen it"
                )
            ends = [0]
            for number, end in enumerate(itertools.accumulate(lengths[:-1]), start=1):
                ends.append(min(max(round(end), ends[-1] + 1), whole - (len(parts) - number)))
            lengths = [end - start for start, end in itertools.pairwise([*ends, whole])]
        return [
            {'name': name, self.unit: length, 'train': train}
            for (name, _, train), length in zip(parts, lengths, strict=True)
        ]


def expanded(sections: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`config.stages` with each recipe written out.

    Args:
      sections: the field.
      facts: what a recipe may ask for: `layers`, the backbone's number of them, and `num_examples`.

    Raises:
      UserError: a recipe or a field of it is unknown, or its length does not suffice.
    """
    return [stage for i, s in enumerate(sections) for stage in _written_out(s, f'config.stages[{i}]', facts)]


def _written_out(section: Mapping[str, Any], field: str, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    fields = dict(section)
    recipe = fields.pop('recipe', None)
    if recipe is None:
        return [fields]
    if recipe not in RECIPES:
        raise UserError(f'{field}.recipe: there is no recipe {recipe!r}; {nearest(str(recipe), RECIPES)}')
    shared = {name: fields.pop(name) for name in ('objective', 'gradient') if name in fields}
    name = fields.pop('name', recipe)
    function = RECIPES[recipe]
    parameters = inspect.signature(function).parameters
    asked = {fact: value for fact, value in facts.items() if fact in parameters}
    if 'length' in parameters:
        given = {unit: fields.pop(unit) for unit in UNITS if unit in fields}
        if len(given) != 1:
            raise UserError(f'{field}: give exactly one of {", ".join(UNITS)}; has {list(given) or "none"}')
        ((unit, count),) = given.items()
        check_type(count, float, f'{field}.{unit}')
        asked['length'] = Length(unit, count, field)
    stages = call(function, fields, field, **asked)
    return [{**stage, **shared, 'name': f'{name}: {stage["name"]}'} for stage in stages]


def lp_ft(
    *, length: Length, probe: Mapping[str, Any], optimizer: Mapping[str, Any], share: float = 0.5
) -> list[dict[str, Any]]:
    """Linear probing, then fine-tuning (Kumar et al. 2022, arXiv:2202.10054, sec. 3.4).

    Args:
      length: of both.
      probe: optimizer of the head alone.
      optimizer: of everything, from there.
      share: of the length that is the probe's.
    """
    return length.parts(
        ('probe', length.count * share, {'name': 'head', 'optimizer': probe}),
        ('tune', length.count * (1 - share), {'name': 'all', 'optimizer': optimizer}),
    )


def head_then_all(
    *, length: Length, optimizer: Mapping[str, Any], each: float = 1, scale: float = 0.5
) -> list[dict[str, Any]]:
    """The head for a while, then everything at half the rate, as `fine_tune` of fastai (Howard & Gugger 2020, arXiv:2002.04688).

    Args:
      length: of both, in whose unit `each` is.
      optimizer: of the head; fastai's lowers the rate further towards the input (see `layerwise_decay`).
      each: how long the head learns alone.
      scale: of the learning rate once everything learns.
    """
    return length.parts(
        ('head', each, {'name': 'head', 'optimizer': optimizer}),
        ('all', length.count - each, {'name': 'all', 'optimizer': scaled(optimizer, scale)}),
    )


def gradual_unfreezing(
    *, length: Length, optimizer: Mapping[str, Any], each: float = 1, factor: float = 2.6, layers: int
) -> list[dict[str, Any]]:
    """The head, then one layer more at a time from the output down (ULMFiT, Howard & Ruder 2018, arXiv:1801.06146, sec. 3.3).

    Args:
      length: of all; the last part, in which everything learns, takes what the others leave.
      optimizer: of the head; its schedule begins anew with each part, as theirs.
      each: length of a part, in the same unit; theirs is an epoch.
      factor: between the learning rates of neighbouring layers; 1 for none.
      layers: of the backbone.
    """
    train = lambda k: {'name': 'discriminative', 'optimizer': optimizer, 'factor': factor, 'k': k}
    parts = [(f'last {k}' if k else 'head', each, train(k)) for k in range(layers)]
    return length.parts(*parts, ('all', length.count - each * layers, train(layers)))


def chain_thaw(
    *, length: Length, optimizer: Mapping[str, Any], scale: float = 0.1, layers: int
) -> list[dict[str, Any]]:
    """The head, then each layer by itself from the input on, then everything (Felbo et al. 2017, arXiv:1708.00524, sec. 3.3).

    Args:
      length: of all parts, which are equally long, to a step.
      optimizer: of the head.
      scale: of the learning rate after the head; theirs falls from 1e-3 to 1e-4.
      layers: of the backbone.
    """
    each, slower = length.count / (layers + 2), scaled(optimizer, scale)
    alone = [
        (f'layer {i}', each, {'name': 'surgical', 'optimizer': slower, 'layers': [i], 'head': False})
        for i in range(layers)
    ]
    return length.parts(
        ('head', each, {'name': 'head', 'optimizer': optimizer}),
        *alone,
        ('all', each, {'name': 'all', 'optimizer': slower}),
    )


def auto_freeze(
    *, length: Length, optimizer: Mapping[str, Any], intervals: int = 10, percentile: float = 50.0
) -> list[dict[str, Any]]:
    """Freezes layers that have converged, from the input on (AutoFreeze, Liu et al. 2021, arXiv:2102.01386).

    Each interval is a stage, at whose start `tl_jax.partitions.unconverged` reads from the log how much each layer's gradient
    has changed; what is frozen costs nothing from there on. The optimizer's moments begin anew with an interval (the
    authors' whenever something freezes), its learning rate goes on.

    Args:
      length: of all.
      optimizer: of everything.
      intervals: in how many parts.
      percentile: of the relative changes, which a layer must reach to learn on.
    """
    if intervals < 1:
        raise UserError(f'{length.field}.intervals: must be at least 1, not {intervals}')
    check_percentile(percentile, f'{length.field}.percentile')
    train = {'name': 'unconverged', 'optimizer': optimizer, 'percentile': percentile}
    parts = length.parts(*((f'{i + 1} of {intervals}', length.count / intervals, train) for i in range(intervals)))
    lr = optimizer.get('lr')
    if not isinstance(lr, Mapping):
        return parts
    ends = list(itertools.accumulate((part[length.unit] for part in parts), initial=0))
    spans = [[start / ends[-1], end / ends[-1]] for start, end in itertools.pairwise(ends)]
    return [
        {**part, 'train': {**train, 'optimizer': {**optimizer, 'lr': {**lr, 'span': span}}}}
        for part, span in zip(parts, spans, strict=True)
    ]


class BitRule(NamedTuple):
    """What the BiT-HyperRule sets (Kolesnikov et al. 2020, arXiv:1912.11370, sec. 3.3).

    Attributes:
      resize: sides of the training images before the crop.
      crop: side of the random crop, and to which evaluation images are resized.
      mixup: its Beta parameter, 0 for none.
      warmup: steps of linear warm-up.
      decays: steps after which the rate is a tenth.
      steps: of training.
      batch_size: of the sources' default.
    """

    resize: int
    crop: int
    mixup: float
    warmup: int
    decays: tuple[int, ...]
    steps: int
    batch_size: int = 512


def bit_rule(num_examples: int, height: int = 224, width: int = 224) -> BitRule:
    """The BiT-HyperRule, from the number of examples and their size (google-research/big_transfer, bit_hyperrule.py)."""
    resize, crop = (160, 128) if height * width < 96 * 96 else (512, 480)
    if num_examples < 20_000:
        return BitRule(resize, crop, 0.0, 100, (200, 300, 400), 500)
    if num_examples < 500_000:
        return BitRule(resize, crop, 0.1, 500, (3_000, 6_000, 9_000), 10_000)
    return BitRule(resize, crop, 0.1, 500, (6_000, 12_000, 18_000), 20_000)


def bit_hyperrule(*, lr: float = 0.003, num_examples: int) -> list[dict[str, Any]]:
    """Everything by SGD with momentum, for as long as `bit_rule` says; image sizes, mixup and batch size are the config's."""
    rule = bit_rule(num_examples)
    # There the rate of step s is still the old one; here a boundary is the first step of the new one, after the warm-up.
    at = [step + 1 - rule.warmup for step in rule.decays]
    schedule = {'name': 'step', 'peak': lr, 'at': at, 'factor': 0.1, 'warmup': rule.warmup}
    optimizer = {'name': 'momentum', 'lr': schedule}
    return [{'name': f'{rule.steps} steps', 'steps': rule.steps, 'train': {'name': 'all', 'optimizer': optimizer}}]


RECIPES: Mapping[str, Callable[..., list[dict[str, Any]]]] = {
    'lp_ft': lp_ft,
    'head_then_all': head_then_all,
    'gradual_unfreezing': gradual_unfreezing,
    'chain_thaw': chain_thaw,
    'auto_freeze': auto_freeze,
    'bit_hyperrule': bit_hyperrule,
}
