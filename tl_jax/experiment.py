"""From a resolved config to the parts that the loop runs: data, models, objectives, stages; all checked before any work."""

import functools
import inspect
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import data as data_lib
from tl_jax import objectives, partitions, pretrained, trees
from tl_jax import stages as stages_lib
from tl_jax.config import asked, call
from tl_jax.errors import UserError, nearest
from tl_jax.experiment_data import Data, data_from
from tl_jax.gradients import GRADIENTS, Gradient
from tl_jax.networks import layer_order, model_from, original_from
from tl_jax.objectives import Model, Models, Objective, phases_of, started
from tl_jax.optimizers import Partition, create_partition

DTYPES = ('float32', 'bfloat16', 'float16')


class Stage(NamedTuple):
    """A stretch of training with one objective and one partition.

    Attributes:
      name: shown in reports.
      steps: its length.
      rules: which parameters it trains, and how; a function from the log's records where those decide.
      objective: the method; its `init` gives random variables, so that shapes cost nothing. Stages of one method share it.
      init: the same with pretrained weights: (key, batch) -> variables.
      gradient: how the loss becomes a gradient.
    """

    name: str
    steps: int
    rules: Sequence[tuple[str, Any]] | Callable[[Sequence[Mapping]], Sequence[tuple[str, Any]]]
    objective: Objective
    init: Callable
    gradient: Gradient


class Experiment(NamedTuple):
    """What `train_and_evaluate` runs.

    Attributes:
      config: resolved.
      data: opened.
      stages: in order.
      batch: the first batch of each stream, to initialise with.
    """

    config: dict[str, Any]
    data: Data
    stages: list[Stage]
    batch: dict[str, dict[str, np.ndarray]]

    def rules(self, number: int, records: Sequence[Mapping[str, Any]] = ()) -> Sequence[tuple[str, Any]]:
        """What stage `number` trains, after what the stages before have logged."""
        rules = self.stages[number].rules
        return rules([r for r in records if r['stage'] < number]) if callable(rules) else rules

    def partition(self, number: int, params: Any, records: Sequence[Mapping[str, Any]] = ()) -> Partition:
        """The partition of stage `number`."""
        stage, field = self.stages[number], f'config.stages[{number}].train'
        params = learnable(params, stage.objective)
        phases = [(phase.name, phase.rule) for phase in phases_of(stage.objective)]
        return create_partition(self.rules(number, records), params, steps=stage.steps, phases=phases, field=field)

    def streams(self, number: int) -> dict[str, Any]:
        """The streams that stage `number` reads."""
        return {name: self.data.streams[name] for name in self.stages[number].objective.streams}

    def begins(self, number: int) -> bool:
        """Whether stage `number` begins with an objective of its own rather than going on with the one before."""
        return number == 0 or self.stages[number].objective is not self.stages[number - 1].objective

    @property
    def first_comparable(self) -> int:
        """The first stage whose figures are of the last one's objective: a checkpoint is selected from there on."""
        return max(number for number in range(len(self.stages)) if self.begins(number))

    def shapes(self, number: int = 0) -> Any:
        """Shapes and dtypes of the variables in stage `number`, without computing them."""
        objective = self.stages[number].objective
        return jax.eval_shape(
            lambda key, batch: started(objective, objective.init(key, batch)), jax.random.key(0), self.batch
        )


def learnable(params: Mapping[str, Any], objective: Objective) -> dict[str, Any]:
    """The parameters that a stage's rules are over: all roles but those that the objective says never learn."""
    fixed = {network.role for network in objective.fixed}
    return {role: tree for role, tree in params.items() if role not in fixed}


def inherited(fresh: Any, before: Any, field: str) -> Any:
    """The variables of a new objective, those of the stage before taken over where both name a leaf.

    Raises:
      UserError: a leaf has another shape than before.
    """
    there = trees.flatten(before)
    for path, leaf in trees.flatten(fresh).items():
        if path in there and there[path].shape != leaf.shape:
            raise UserError(
                f"{field}: its '{path}' is {list(leaf.shape)}, in the stage before {list(there[path].shape)}; name another "
                'role or give both the same size'
            )
    flat = {path: there.get(path, leaf) for path, leaf in trees.flatten(fresh).items()}
    return {**{name: {} for name in fresh}, **trees.unflatten(flat)}


def build(config: Mapping[str, Any]) -> Experiment:
    """Opens the data and builds every part that a resolved config names.

    Args:
      config: as `tl_jax.config.resolve` returns it.

    Raises:
      UserError: whatever in the config, the data or the rules cannot work, in one line.
    """
    data = data_from(config)
    config = {**config, 'model': pretrained.resolved(config['model'])}
    if config['dtype'] not in DTYPES:
        raise UserError(f"config.dtype: must be one of {', '.join(DTYPES)}, not '{config['dtype']}'")
    for field in ('ema', 'ema_from'):
        if not 0 <= config[field] <= 1:
            raise UserError(f'config.{field}: must lie in 0 … 1, not {config[field]}')
    if config['ema_from'] and not config['ema']:
        raise UserError(
            'config.ema_from: says when averages begin, and there are none; set config.ema, 1 for a plain mean'
        )
    if not config['stages']:
        raise UserError(
            "config.stages: is empty; add one, such as dict(steps=100, train=[('.*', dict(name='adam', lr=1e-3))])"
        )
    order = layer_order(config['model'])
    facts = {'layers': len(partitions.layers_of(order)), 'num_examples': next(iter(data.sources.values())).length}
    config['stages'] = stages_lib.expanded(config['stages'], facts)
    stages: list[Stage] = []
    for i, section in enumerate(config['stages']):
        field, fields = f'config.stages[{i}]', dict(section)
        own, own_gradient = fields.pop('objective', None), fields.pop('gradient', None)
        where = f'{field}.objective' if own else 'config.objective'
        options = own or config['objective']
        if i and options == (config['stages'][i - 1].get('objective') or config['objective']):
            objective, init = stages[-1].objective, stages[-1].init
        else:
            objective, loaded = (
                create_objective(options, where, config, data, load_main=load and not stages, load_others=load)
                for load in (False, True)
            )
            init = loaded.init
        gradient_field = f'{field}.gradient' if own_gradient else 'config.gradient'
        spec = (own_gradient or config['gradient'], gradient_field)
        stages.append(
            call(
                stage_from,
                fields,
                field,
                number=i,
                objective=objective,
                init=init,
                gradient=spec,
                data=data,
                batch_size=config['batch_size'],
            )
        )
    if data.sample_rate is not None and len(stages) > 1:
        raise UserError('config.stages: the privacy spent is accounted over one stage; give one')
    if data.sample_rate is not None and stages[0].objective.refresh:
        raise UserError(
            'config.objective: passes over whole data sets, which the accounted privacy does not cover; leave out '
            'config.data.poisson or choose another objective'
        )
    batch = {name: stream.batch_at(0) for name, stream in data.streams.items()}
    _check_width(config['model'], batch)
    _check_classes(config['model'], stages[-1].objective, data)
    experiment = Experiment(config, data, stages, batch)
    return experiment._replace(stages=[_with_rules(experiment, number, order) for number in range(len(stages))])


def _with_rules(experiment: Experiment, number: int, order: Sequence[str]) -> Stage:
    """The stage with its named partitions written out as rules."""
    stage = experiment.stages[number]
    if partitions.is_plain(stage.rules):
        return stage
    leaves = trees.flatten(learnable(experiment.shapes(number)['params'], stage.objective))
    write = functools.partial(partitions.expanded, stage.rules, order, leaves, field=f'config.stages[{number}].train')
    rules = write()  # also where the log decides, so that what is wrong is said now
    if not partitions.follows_history(stage.rules):
        return stage._replace(rules=rules)
    return stage._replace(rules=lambda records: write(history=partitions.history_of(records)))


def _check_width(model: Mapping[str, Any], batch: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Refuses episodes of more ways than the head has logits; a one-hot of those labels would be zero."""
    width = model.get('num_classes')
    for stream, fields in batch.items():
        reached = fields['support_label'].max(initial=0) if 'support_label' in fields else -1
        if width and reached >= width:
            raise UserError(
                f"config.model.num_classes: {width}, and support_label of stream '{stream}' reaches {reached}; set it to the "
                'number of ways'
            )


def _check_classes(model: Mapping[str, Any], objective: Objective, data: Data) -> None:
    """Refuses a classifier with another number of logits than the data have classes."""
    width, classes = model.get('num_classes'), len(data.class_names)
    if objective.figures is None and width and width != classes:
        raise UserError(
            f'config.model.num_classes: {width}, and the data have {classes} classes ({", ".join(data.class_names[:5])}…); '
            'leave it out'
        )


def create_objective(
    section: Mapping[str, Any],
    where: str,
    config: Mapping[str, Any],
    data: Data,
    *,
    load_main: bool,
    load_others: bool,
    around: Callable[[Model], Model] | None = None,
) -> Objective:
    """Builds an objective: the named constructor, within the wrappers that the section mentions (`l2_sp=dict(weight=.01)`).

    Args:
      section: the objective's fields. A field that the constructor annotates as `Model` is a section as `config.model`.
      where: the section's name in the config.
      config: resolved; gives the main network.
      data: opened.
      load_main: whether to read the main network's pretrained weights.
      load_others: the same of the networks named in the section.
      around: what to make of the main network first.
    """
    fields = dict(section)
    wrappers = {wrapper: fields.pop(wrapper) for wrapper in objectives.WRAPPERS if wrapper in fields}
    classes = len(data.class_names)
    dtype = jnp.dtype(config['dtype'])
    if fields.get('class_weights') == 'balanced':
        labels = next(iter(data.sources.values())).labels
        fields['class_weights'] = [float(w) for w in data_lib.class_weights(labels, classes)]
    if data.sample_rate is not None and fields.get('class_weights'):
        raise UserError(
            f'{where}.class_weights: are shares of a batch, and a private gradient sees one example at a time; remove them'
        )
    name = fields.pop('name', None)
    constructor = _look_up(objectives.OBJECTIVES, name, where)
    main = call(model_from, config['model'], 'config.model', classes=classes, dtype=dtype, load=load_main)
    main = around(main) if around else main
    section_of = functools.partial(_network, classes=classes, dtype=dtype, load=load_others)
    others = _networks(constructor, fields, where, section_of)
    facts = {
        'num_classes': classes,
        'class_names': data.class_names,
        'num_examples': {stream: source.length for stream, source in data.sources.items()},
        'pad_id': config['model'].get('pad_id'),
    }
    objective = call(constructor, fields, where, main, **others, **asked(constructor, facts))
    facts |= {'model': main, 'original': original_from(config['model'], classes, dtype, load=load_others)}
    for wrapper, options in wrappers.items():
        if not isinstance(options, Mapping):
            raise UserError(f'{where}.{wrapper}: must be a section such as dict(weight=0.01), not {options!r}')
        constructor, options = objectives.WRAPPERS[wrapper], dict(options)
        given = asked(constructor, facts)
        given |= _networks(constructor, options, f'{where}.{wrapper}', section_of, given)
        objective = call(constructor, options, f'{where}.{wrapper}', objective, **given)
    objective = objectives.without_endpoints(objective)
    for stream in objective.streams:
        if stream not in data.streams:
            have = ', '.join(data.streams)
            raise UserError(
                f"{where}: '{name}' reads the streams {' and '.join(objective.streams)}; config.data.train has {have}; "
                f"add '{stream}' to it, as in train=dict({stream}='npz:…')"
            )
    return objective


def stage_from(
    *,
    train: list | Mapping,
    steps: int | None = None,
    epochs: float | None = None,
    examples: int | None = None,
    name: str = '',
    number: int,
    objective: Objective,
    init: Callable,
    gradient: tuple[Mapping[str, Any], str],
    data: Data,
    batch_size: int,
) -> Stage:
    """Reads a stage, whose length is given in exactly one of steps, epochs (of its first stream) or examples."""
    given = {k: v for k, v in (('steps', steps), ('epochs', epochs), ('examples', examples)) if v is not None}
    if len(given) != 1:
        raise UserError(
            f'config.stages[{number}]: give exactly one of steps, epochs, examples; has {list(given) or "none"}'
        )
    ((unit, length),) = given.items()
    num_examples = data.sources[objective.streams[0]].length
    a_step = num_examples * data.sample_rate if data.sample_rate else batch_size
    in_examples = {'steps': a_step, 'epochs': num_examples, 'examples': 1}
    count = max(1, round(length * in_examples[unit] / a_step)) if length > 0 else 0
    if count < 1:
        raise UserError(f'config.stages[{number}].{unit}: must be above 0, not {length}')
    partitions.check(train, f'config.stages[{number}].train')
    facts = {'sample_rate': data.sample_rate, 'num_examples': num_examples, 'batch_size': batch_size, 'steps': count}
    built = create_gradient(*gradient, facts)
    return Stage(name or f'stage {number + 1}', count, train, objective, init, built)


def create_gradient(section: Mapping[str, Any], where: str, facts: Mapping[str, Any]) -> Gradient:
    """Builds `config.gradient`; a constructor gets those of the data's facts that its signature asks for."""
    fields = dict(section)
    name = fields.pop('name', None)
    constructor = _look_up(GRADIENTS, name, where)
    told = asked(constructor, facts)
    if facts['sample_rate'] is not None and 'sample_rate' not in told:
        raise UserError(
            f"config.data.poisson: the gradient '{name}' does not know of it; use {where}=dict(name='private', …)"
        )
    return call(constructor, fields, where, **told)


def _look_up(table: Mapping[str, Callable], name: Any, where: str) -> Callable:
    if name not in table:
        raise UserError(f'{where}.name: {name!r} is not known; {nearest(str(name), table)}')
    return table[name]


def _networks(
    constructor: Callable, fields: dict[str, Any], where: str, network: Callable, known: Collection[str] = ()
) -> dict[str, Any]:
    """Builds, and takes out of the fields, the constructor's further networks: keyword arguments annotated Model or Models.

    Args:
      constructor: of an objective or a wrapper.
      fields: of its section.
      where: the section's name.
      network: (section, where) -> Model.
      known: arguments that are given anyway.
    """
    hints, made = typing.get_type_hints(constructor), {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        hint = hints.get(name)
        if parameter.kind is not parameter.KEYWORD_ONLY or name in known or hint not in (Model, Models):
            continue
        if name in fields:
            given, field = fields.pop(name), f'{where}.{name}'
            several = hint == Models and isinstance(given, list | tuple)
            sections = {f'{field}[{i}]': section for i, section in enumerate(given)} if several else {field: given}
            built = tuple(network(section, at) for at, section in sections.items())
            made[name] = built if hint == Models else built[0]
        elif parameter.default is parameter.empty:
            raise UserError(
                f"{where}.{name}: '{constructor.__name__}' needs another network; add {where}.{name}=dict(name='mlp', "
                'dense=[100], …), with the fields of config.model'
            )
    return made


def _network(section: Any, where: str, *, classes: int, dtype: Any, load: bool) -> Model:
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: must be a network such as dict(name='mlp', dense=[100]), not {section!r}")
    model = call(model_from, pretrained.resolved(section), where, classes=classes, dtype=dtype, load=load)
    if not (load and section.get('source')):
        return model
    return model._replace(class_names=functools.partial(pretrained.class_names, section['source']))


def parameter_count(tree: Any) -> int:
    return int(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree)))


def bytes_of(tree: Any) -> int:
    return int(sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))
