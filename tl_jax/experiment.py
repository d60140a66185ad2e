"""From a resolved config to the parts that the loop runs: data, model, objective, stages; all checked before any work."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import data as data_lib
from tl_jax import models, objectives, pretrained
from tl_jax.config import call, plain
from tl_jax.errors import UserError, nearest
from tl_jax.gradients import GRADIENTS, Gradient
from tl_jax.objectives import Model, Objective, phases_of
from tl_jax.optimizers import Partition, create_partition

DTYPES = ('float32', 'bfloat16', 'float16')


class Data(NamedTuple):
    """The streams and sources of a config.

    Attributes:
      streams: `{name: training stream}`.
      sources: `{name: source}` of the training streams.
      eval: `{split: source}`, evaluated during training; a checkpoint may be selected by them.
      test: `{split: source}`, evaluated once, with the selected checkpoint.
      batches: source -> padded evaluation batches of this process.
      class_names: of the labels.
    """

    streams: dict[str, Any]
    sources: dict[str, Any]
    eval: dict[str, Any]
    test: dict[str, Any]
    batches: Callable
    class_names: tuple[str, ...]


class Stage(NamedTuple):
    """A stretch of training with one partition."""

    name: str
    steps: int
    rules: Sequence[tuple[str, Any]]


class Experiment(NamedTuple):
    """What `train_and_evaluate` runs.

    Attributes:
      config: resolved.
      data: opened.
      objective: its `init` gives random variables, so that shapes cost nothing.
      init: the same with pretrained weights: (key, batch) -> variables.
      gradient: how a loss becomes a gradient.
      stages: in order.
      batch: the first batch of each stream, to initialise with.
    """

    config: dict[str, Any]
    data: Data
    objective: Objective
    init: Callable
    gradient: Gradient
    stages: list[Stage]
    batch: dict[str, dict[str, np.ndarray]]

    def partition(self, number: int, params: Any) -> Partition:
        """The partition of stage `number`."""
        stage, field = self.stages[number], f'config.stages[{number}].train'
        phases = [(phase.name, phase.rule) for phase in phases_of(self.objective)]
        return create_partition(stage.rules, params, steps=stage.steps, phases=phases, field=field)

    def shapes(self) -> Any:
        """Shapes and dtypes of the initial variables, without computing them."""
        return jax.eval_shape(self.objective.init, jax.random.key(0), self.batch)


def build(config: Mapping[str, Any]) -> Experiment:
    """Opens the data and builds every part that a resolved config names.

    Args:
      config: as `tl_jax.config.resolve` returns it.

    Raises:
      UserError: whatever in the config, the data or the rules cannot work, in one line.
    """
    data = data_from(config)
    num_classes = len(data.class_names)
    if config['dtype'] not in DTYPES:
        raise UserError(f"config.dtype: must be one of {', '.join(DTYPES)}, not '{config['dtype']}'")
    dtype = jnp.dtype(config['dtype'])

    def objective_of(load: bool) -> Objective:
        model = call(model_from, config['model'], 'config.model', classes=num_classes, dtype=dtype, load=load)
        return create_objective(config['objective'], model, data, num_classes)

    gradient = _named(GRADIENTS, config['gradient'], 'config.gradient')
    examples = next(iter(data.sources.values())).length
    stages = [
        call(
            stage_from,
            stage,
            f'config.stages[{i}]',
            number=i,
            examples_an_epoch=examples,
            batch_size=config['batch_size'],
        )
        for i, stage in enumerate(config['stages'])
    ]
    batch = {name: stream.batch_at(0) for name, stream in data.streams.items()}
    return Experiment(config, data, objective_of(load=False), objective_of(load=True).init, gradient, stages, batch)


def data_from(config: Mapping[str, Any]) -> Data:
    """Opens the data of a resolved config."""
    return call(
        open_data,
        config['data'],
        'config.data',
        run_seed=config['seed'],
        batch_size=config['batch_size'],
        eval_batch_size=config['eval_batch_size'],
    )


def open_data(
    *,
    train: str | dict,
    eval: str | dict | None = None,
    test: str | dict | None = None,
    train_transform: list = (),
    eval_transform: list = (),
    balance: str | None = None,
    seed: int | None = None,
    run_seed: int,
    batch_size: int,
    eval_batch_size: int,
) -> Data:
    """Opens the sources of a config.

    Args:
      train: a source, which becomes the stream `train`, or `{stream: source}`. A source is `'folder:PATH'` or
        `dict(spec='folder:PATH', shots=5, …)` with the options of `tl_jax.data.open_source`.
      eval: the source of the split `val`, or `{split: source}`.
      test: the source of the split `test`, or `{split: source}`.
      train_transform: of training examples: names or dicts, `tl_jax.data.make_transform`.
      eval_transform: of evaluation examples.
      balance: 'class' draws every class equally often.
      seed: of the order and the random transforms of the training data; the run's seed unless given.
      run_seed: the run's seed.
      batch_size: examples a step, over all processes.
      eval_batch_size: the same in evaluation.
    """
    seed = run_seed if seed is None else seed
    sources = {
        name: _open(spec, f'config.data.train.{name}', seed) for name, spec in _named_sources(train, 'train').items()
    }
    held_out = {
        field: {
            name: _open(spec, f'config.data.{field}.{name}', seed) for name, spec in _named_sources(given, name).items()
        }
        for field, given, name in (('eval', eval, 'val'), ('test', test, 'test'))
    }
    overlap = held_out['eval'].keys() & held_out['test'].keys()
    if overlap:
        raise UserError(f"config.data.test: the split '{overlap.pop()}' is also in config.data.eval; rename one")
    class_names = _class_names(sources, held_out)
    train_transform, eval_transform = plain(train_transform), plain(eval_transform)
    for field, items in (('train_transform', train_transform), ('eval_transform', eval_transform)):
        _check_transform(items, f'config.data.{field}')

    def batches(source):
        return data_lib.eval_batches(
            source,
            batch_size=eval_batch_size,
            transforms=eval_transform,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    streams = {
        # Two streams of one source must not show the same examples in the same order.
        name: data_lib.train_stream(
            source, batch_size=batch_size, seed=seed + 7919 * i, transforms=train_transform, balance=balance
        )
        for i, (name, source) in enumerate(sources.items())
    }
    return Data(streams, sources, held_out['eval'], held_out['test'], batches, class_names)


def _check_transform(items: list, where: str) -> None:
    try:
        data_lib.make_transform(items)
    except UserError as error:
        raise UserError(f'{where}: {error}') from None


def _named_sources(given: str | Mapping | None, name: str) -> dict[str, Any]:
    if given is None:
        return {}
    return {name: given} if isinstance(given, str) or 'spec' in given else dict(given)


def _open(given: str | Mapping, where: str, seed: int) -> Any:
    options = {'spec': given} if isinstance(given, str) else dict(given)
    if 'shots' in options:
        options.setdefault('shots_seed', seed)
    try:
        return call(data_lib.open_source, options, where)
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f'{where}: {error}') from None


def _class_names(sources: Mapping[str, Any], held_out: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The class names that all sources agree on; numbers where none has names."""
    first = next(iter(sources.values()))
    names = first.class_names or tuple(str(i) for i in range(data_lib.num_classes(first)))
    for field, group in (('train', sources), *held_out.items()):
        for name, source in group.items():
            where = f'config.data.{field}.{name}'
            if source.class_names is not None and first.class_names is not None and source.class_names != names:
                differ = sorted(set(source.class_names) ^ set(names)) or ['their order']
                raise UserError(f'{where}: its classes differ from the training data’s ({", ".join(differ[:5])})')
            if source.labels is not None and len(source.labels) and source.labels.max() >= len(names):
                raise UserError(f'{where}: label {source.labels.max()} is out of range; there are {len(names)} classes')
    return names


def model_from(
    *,
    name: str,
    source: str | None = None,
    ignore: list = (),
    fresh: list = (),
    num_classes: int | None = None,
    classes: int,
    dtype: Any,
    load: bool,
    **overrides: Any,
) -> Model:
    """Builds a network as pure functions, its pretrained weights read when `init` is called.

    Args:
      name: of the architecture, `tl_jax.models.list_models()`.
      source: of pretrained weights: a path, `hf://org/repo/file` or `shipped:NAME`; None for a random start.
      ignore: regexes of stored tensors that are not wanted.
      fresh: regexes of parameters that keep their random start.
      num_classes: width of the head; the data's number of classes unless given.
      classes: the data's number of classes.
      dtype: of the computation.
      load: whether to read `source`.
      **overrides: the architecture's own fields.
    """
    module = models.create_model(name, num_classes=num_classes or classes, dtype=dtype, **overrides)

    def init(key, inputs):
        variables = dict(jax.jit(lambda k, x: module.init(k, x, train=False))(key, inputs))
        if source and load:
            variables = pretrained.fill_model(name, source, variables, ignore=ignore, fresh=fresh)
        return variables

    return Model(init, module.apply)


def create_objective(section: Mapping[str, Any], model: Model, data: Data, num_classes: int) -> Objective:
    """Builds `config.objective`: the named constructor, within the views that it mentions (`mixed=dict(mixup=.2)`)."""
    fields = dict(section)
    views = {view: fields.pop(view) for view in objectives.VIEWS if view in fields}
    if fields.get('class_weights') == 'balanced':
        labels = next(iter(data.sources.values())).labels
        fields['class_weights'] = [float(w) for w in data_lib.class_weights(labels, num_classes)]
    objective = _named(objectives.OBJECTIVES, fields, 'config.objective', model, num_classes=num_classes)
    for view, options in views.items():
        objective = call(
            objectives.VIEWS[view], options, f'config.objective.{view}', objective, num_classes=num_classes
        )
    return objective


def stage_from(
    *,
    train: list,
    steps: int | None = None,
    epochs: float | None = None,
    examples: int | None = None,
    name: str = '',
    number: int,
    examples_an_epoch: int,
    batch_size: int,
) -> Stage:
    """Reads a stage, whose length is given in exactly one of steps, epochs or examples."""
    given = {k: v for k, v in (('steps', steps), ('epochs', epochs), ('examples', examples)) if v is not None}
    if len(given) != 1:
        raise UserError(
            f'config.stages[{number}]: give exactly one of steps, epochs, examples; has {list(given) or "none"}'
        )
    ((unit, length),) = given.items()
    in_examples = {'steps': batch_size, 'epochs': examples_an_epoch, 'examples': 1}
    count = max(1, round(length * in_examples[unit] / batch_size)) if length > 0 else 0
    if count < 1:
        raise UserError(f'config.stages[{number}].{unit}: must be above 0, not {length}')
    for i, rule in enumerate(train):
        if not isinstance(rule, list | tuple) or len(rule) != 2 or not isinstance(rule[0], str):
            raise UserError(f"config.stages[{number}].train[{i}]: must be a pair ('regex', optimizer), not {rule!r}")
    return Stage(name or f'stage {number + 1}', count, [tuple(rule) for rule in train])


def _named(table: Mapping[str, Callable], section: Mapping[str, Any], where: str, *args: Any, **extra: Any) -> Any:
    fields = dict(section)
    name = fields.pop('name', None)
    if name not in table:
        raise UserError(f'{where}.name: {name!r} is not known; {nearest(str(name), table)}')
    return call(table[name], fields, where, *args, **extra)


def parameter_count(tree: Any) -> int:
    return int(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree)))


def bytes_of(tree: Any) -> int:
    return int(sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))
