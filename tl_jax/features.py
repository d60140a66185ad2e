"""The feature cache: a stage whose backbone stands still runs it once over each example, and then trains on its features."""

import functools
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tl_jax import data as data_lib
from tl_jax import trees
from tl_jax.config import call
from tl_jax.data import cached
from tl_jax.data.base import Source
from tl_jax.data.streams import Loader
from tl_jax.errors import UserError
from tl_jax.experiment import create_objective
from tl_jax.networks import model_from
from tl_jax.objectives import Model, Objective, inputs_of, phases_of, with_loss
from tl_jax.peft.base import ROLE as ADAPTERS
from tl_jax.progress import say
from tl_jax.run import Run
from tl_jax.run_once import Network, Uncached, check_dtype, columns, on_host, require_fixed_examples, shown_of
from tl_jax.state import TrainState, frozen_statistics, variables_of
from tl_jax.step import progress


class Backbone(NamedTuple):
    """A network without its head, and what it is throughout a stage.

    Attributes:
      endpoints: (variables, inputs, key, train) -> features [B, D].
      variables: its own, on the host, with the markers that keep batch statistics.
      weights: their hash.
    """

    endpoints: Callable
    variables: dict[str, Any]
    weights: str

    def network(self, *, train: bool) -> Network:
        """The backbone in training or evaluation mode, of the fields that it sees."""
        run = lambda variables, fields: self.endpoints(variables, inputs_of(fields), jax.random.key(0), train)
        return Network(run, self.variables, self.weights)


def with_features(run: Run, state: TrainState, number: int) -> Run:
    """The run as stage `number` is to see it: on cached features where the backbone is frozen, else as it is.

    Args:
      run: its streams, evaluation batches and objectives are those of the inputs.
      state: at the start of the stage, or anywhere in it.
      number: of the stage.
    """
    experiment, stage = run.experiment, run.experiment.stages[number]
    if not experiment.config['cache_features']:
        return run
    check_dtype(experiment.config['cache_dtype'])
    partition, variables = run.layout_of(number).partition, variables_of(state)
    if any(path.startswith(('backbone/', f'{ADAPTERS}/')) for path in partition.trainable):
        return run
    try:
        if stage.objective.refresh:
            raise Uncached('the objective passes over whole data sets, perhaps by another network')
        for stream in stage.objective.streams:
            require_fixed_examples(experiment, stream, stage.steps)
        backbone = frozen_backbone(experiment, stage.objective.streams[0], variables, partition.trainable)
        for stream in stage.objective.streams:
            _require_no_draws(experiment.batch[stream], backbone)
        objective = on_features(experiment, number)
        _require_features_alone(experiment, objective, backbone, variables)
    except Uncached as reason:
        say(f'{stage.name}: the backbone is frozen, and runs in every step: {reason}')
        return run
    return _on_columns(run, number, objective, backbone)


def frozen_backbone(experiment: Any, stream: str, variables: Mapping[str, Any], trainable: Set[str]) -> Backbone:
    """The main network without its head; refuses one of which a part learns."""
    section = {k: v for k, v in experiment.config['model'].items() if k not in ('head', 'num_classes')}
    model = call(
        model_from,
        {**section, 'num_classes': 0},
        'config.model',
        classes=0,
        dtype=jnp.dtype(experiment.config['dtype']),
        load=False,
    )
    try:
        shapes = jax.eval_shape(model.init, jax.random.key(0), inputs_of(experiment.batch[stream]))
    except UserError as error:
        raise Uncached(f'without its head it cannot be built ({error})') from None
    own = {collection: trees.flatten(tree) for collection, tree in shapes.items()}
    learning = next((path for path in own['params'] if path in trainable), None)
    if learning:
        raise Uncached(f"'{learning}' changes what it gives")
    mine = {c: trees.split(variables.get(c, {}), paths.__contains__)[0] for c, paths in own.items()}
    if any(trees.flatten(mine[c]).keys() != paths.keys() for c, paths in own.items()):
        raise Uncached('the objective keeps it under another name')
    if mine.get('batch_stats'):
        markers = frozen_statistics(mine['batch_stats'], mine['params'], trainable)
        mine['batch_stats'] = trees.merge(mine['batch_stats'], markers)

    def endpoints(variables, inputs, key, train):
        outputs = model.apply(variables, inputs, train=train, mutable=['batch_stats'], rngs={'dropout': key})[0]
        return outputs['features'].astype(experiment.config['cache_dtype'])

    return Backbone(endpoints, *on_host(mine))


def on_features(experiment: Any, number: int) -> Objective:
    """The objective of a stage for batches of features: it sees variables without a backbone."""
    config, section = experiment.config, experiment.config['stages'][number].get('objective')
    where = f'config.stages[{number}].objective' if section else 'config.objective'
    objective = create_objective(
        section or config['objective'],
        where,
        config,
        experiment.data,
        load_main=False,
        load_others=False,
        around=features_alone,
    )
    bare = lambda function: lambda variables, *arguments: function(without_backbone(variables), *arguments)
    return with_loss(objective, bare)._replace(predict=bare(objective.predict))


def features_alone(model: Model) -> Model:
    """The network behind its backbone: `apply(variables, {'features': [B, D]})` gives them and the head's logits.

    Variables with a backbone are refused: they may be a copy (a teacher, another domain's encoder), whose features these
    are not.
    """

    def apply(variables, inputs, *, train=False, mutable=False, rngs=None):
        if not isinstance(inputs, Mapping) or 'features' not in inputs:
            raise Uncached('the objective runs the network on what is not in the features')
        if 'backbone' in variables['params']:
            raise Uncached('the objective has another backbone than the one that is frozen')
        outputs = {'features': inputs['features']}
        if 'head' in variables['params']:
            outputs['logits'] = model.classify(variables, inputs['features'], train=train, rngs=rngs)
        return (outputs, {}) if mutable else outputs

    return Model(model.init, apply, model.classify)


def without_backbone(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the other roles."""
    bare = dict(variables)
    for collection in ('params', 'batch_stats'):
        if collection in bare:
            bare[collection] = {role: tree for role, tree in bare[collection].items() if role != 'backbone'}
    return bare


def _require_no_draws(stream: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuses a backbone that draws at random."""
    run = functools.partial(backbone.endpoints, train=True)
    traced = jax.make_jaxpr(run)(backbone.variables, inputs_of(stream), jax.random.key(0))
    key = traced.jaxpr.invars[-1]
    if any(v is key for equation in traced.eqns for v in equation.invars):
        raise Uncached('it drops units or paths at random')


def _require_features_alone(
    experiment: Any, objective: Objective, backbone: Backbone, variables: Mapping[str, Any]
) -> None:
    """Refuses an objective that wants more of the network than its features."""
    batch = {name: dict(experiment.batch[name]) for name in objective.streams}
    for stream in batch.values():
        inputs = inputs_of(stream)
        features = jax.eval_shape(
            functools.partial(backbone.endpoints, train=True), backbone.variables, inputs, jax.random.key(0)
        )
        for field in shown_of(stream):
            del stream[field]
        stream['features'] = jax.ShapeDtypeStruct(features.shape, jnp.float32)
    try:
        for phase in phases_of(objective):
            jax.eval_shape(phase.loss, {**variables, **progress(0, 1)}, batch, jax.random.key(0))
        jax.eval_shape(objective.predict, variables, next(iter(batch.values())))
    except Uncached:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        said = f'{type(error).__name__}: {error!s:.120}'
        raise Uncached(f'the objective wants more of it than its features ({said})') from None


def _on_columns(run: Run, number: int, objective: Objective, backbone: Backbone) -> Run:
    """The run with a stage's objective, streams and evaluation batches replaced by those of features."""
    experiment, data = run.experiment, run.experiment.data
    before = experiment.stages[number].objective
    # All stages that share the objective, so that they still do.
    stages = [s._replace(objective=objective) if s.objective is before else s for s in experiment.stages]

    evaluated = {}
    features = functools.partial(_features, run, experiment.stages[number].name, backbone)

    def stream(name):
        stream = data.streams[name]
        source = features(name, stream.loader.source, data.train_transforms[name], train=True)
        return stream._replace(loader=Loader(source, stream.loader.seed, None, _same))

    def batches(name, source):
        # A stream and a split may have one name.
        if id(source) not in evaluated:
            evaluated[id(source)] = features(name, source, data.eval_transforms[name], train=False)
        return data_lib.eval_batches(
            evaluated[id(source)],
            batch_size=experiment.config['eval_batch_size'],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    streams = {**data.streams, **{name: stream(name) for name in before.streams}}
    return run._replace(
        experiment=experiment._replace(stages=stages, data=data._replace(streams=streams, batches=batches))
    )


def _same(batch: dict, rng: None) -> dict:
    del rng
    return batch


def _features(
    run: Run, stage: str, backbone: Backbone, name: str, source: Source, transforms: list, *, train: bool
) -> Source:
    """The examples of a stream or split with features [D] in place of what the backbone sees."""

    def keep(batch, features):
        gone = (*shown_of(batch), 'mask', 'index')
        return {**{field: values for field, values in batch.items() if field not in gone}, 'features': features}

    size = run.experiment.config['eval_batch_size']
    batches = lambda: data_lib.eval_batches(source, batch_size=size, transforms=transforms)
    network = backbone.network(train=train)
    found = columns(run.mesh, network, name, batches, source.length, keep, f'{stage}: features')
    return cached.column_source(source, found)
