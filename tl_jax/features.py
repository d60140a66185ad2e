"""The feature cache: a stage whose backbone stands still runs it once over each example, and then trains on its features.

What is stored is addressed by its content: the folder by the traced program of the backbone and its weights, each file by
the transformed examples of one evaluation batch. So nothing can be stale: changed data, transforms, weights, fields,
precision or code have other names. What is reused was read and transformed anyway; the network is not run.

On several processes each runs its share of the batches and finds the others' in the folder, where all see the same one;
where they do not, each runs the whole.
"""

import functools
import time
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tl_jax import data as data_lib
from tl_jax import mesh as mesh_lib
from tl_jax import trees
from tl_jax.config import call
from tl_jax.data import cached
from tl_jax.data.streams import Loader
from tl_jax.errors import UserError
from tl_jax.experiment import create_objective
from tl_jax.networks import model_from
from tl_jax.objectives import Model, Objective, inputs_of, phases_of, with_loss
from tl_jax.peft.base import ROLE as ADAPTERS
from tl_jax.progress import say
from tl_jax.run import Run
from tl_jax.state import TrainState, frozen_statistics, variables_of
from tl_jax.step import progress

DTYPES = ('float32', 'float16')


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


class Uncached(Exception):
    """Why a stage runs its backbone in every step."""


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
    if experiment.config['cache_dtype'] not in DTYPES:
        raise UserError(f"config.cache_dtype: must be {' or '.join(DTYPES)}, not '{experiment.config['cache_dtype']}'")
    partition, variables = run.layout_of(number).partition, variables_of(state)
    if any(path.startswith(('backbone/', f'{ADAPTERS}/')) for path in partition.trainable):
        return run
    try:
        if stage.objective.refresh:
            raise Uncached('the objective passes over whole data sets, perhaps by another network')
        for stream in stage.objective.streams:
            _require_fixed_examples(experiment, stream, stage.steps)
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
    mine = jax.tree.map(np.array, mesh_lib.to_host(mine))  # copies: a step donates what it is given
    if any(trees.flatten(mine[c]).keys() != paths.keys() for c, paths in own.items()):
        raise Uncached('the objective keeps it under another name')
    if mine.get('batch_stats'):
        markers = frozen_statistics(mine['batch_stats'], mine['params'], trainable)
        mine['batch_stats'] = trees.merge(mine['batch_stats'], markers)

    def endpoints(variables, inputs, key, train):
        outputs = model.apply(variables, inputs, train=train, mutable=['batch_stats'], rngs={'dropout': key})[0]
        return outputs['features'].astype(experiment.config['cache_dtype'])

    flat = sorted(trees.flatten(mine).items())
    return Backbone(endpoints, mine, cached.content_hash(part for item in flat for part in item))


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


def _require_fixed_examples(experiment: Any, stream: str, steps: int) -> None:
    """Refuses a stream of which an example looks different each time, or of which a stage does not see all."""
    data = experiment.data
    drawn, length = data_lib.random_transforms(data.train_transforms[stream]), data.sources[stream].length
    if drawn:
        raise Uncached(f"the transform {drawn[0]} of '{stream}' is random")
    a_step = length * data.sample_rate if data.sample_rate else experiment.config['batch_size']
    if steps * a_step < length:
        raise Uncached(f"{steps} steps do not see the {length:,} examples of '{stream}' once")


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
        for field in _fields_of(stream, inputs):
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


def _fields_of(stream: Mapping[str, Any], inputs: Any) -> list[str]:
    """The fields of a batch that are the network's inputs."""
    leaves = {id(leaf) for leaf in jax.tree.leaves(inputs)}
    return [field for field, value in stream.items() if id(value) in leaves]


def _on_columns(run: Run, number: int, objective: Objective, backbone: Backbone) -> Run:
    """The run with a stage's objective, streams and evaluation batches replaced by those of features."""
    experiment, data = run.experiment, run.experiment.data
    before = experiment.stages[number].objective
    # All stages that share the objective, so that they still do.
    stages = [s._replace(objective=objective) if s.objective is before else s for s in experiment.stages]

    stage, evaluated = experiment.stages[number].name, {}

    def stream(name):
        source, stream = data.sources[name], data.streams[name]
        columns = _columns(run, stage, backbone, name, source, data.train_transforms[name], train=True)
        return stream._replace(loader=Loader(cached.column_source(source, columns), stream.loader.seed, None, _same))

    def batches(name, source):
        # A stream and a split may have one name.
        if id(source) not in evaluated:
            columns = _columns(run, stage, backbone, name, source, data.eval_transforms[name], train=False)
            evaluated[id(source)] = cached.column_source(source, columns)
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


def _columns(
    run: Run, stage: str, backbone: Backbone, name: str, source: Any, transforms: list, *, train: bool
) -> dict[str, np.ndarray]:
    """The features [N, D] of a stream's or split's examples, and their other fields, each [N, …] on the host."""
    size = run.experiment.config['eval_batch_size']
    start = time.perf_counter()
    features_of = stored_or_run(backbone, run.mesh, train=train)
    batches = lambda: data_lib.eval_batches(source, batch_size=size, transforms=transforms)
    if jax.process_count() > 1:
        for place, batch in enumerate(batches()):
            if place % jax.process_count() == jax.process_index():
                features_of(inputs_of(batch))
        multihost_utils.sync_global_devices(f'features of {name}')
    columns, computed, count = {}, 0, 0
    for batch in batches():
        inputs, real = inputs_of(batch), batch['mask'] > 0
        features, fresh = features_of(inputs)
        computed, count = computed + fresh, count + 1
        others = {k: v for k, v in batch.items() if k not in (*_fields_of(batch, inputs), 'mask', 'index')}
        for field, values in {**others, 'features': features}.items():
            column = columns.setdefault(field, np.zeros((source.length, *values.shape[1:]), values.dtype))
            column[batch['index'][real]] = values[real]
    what = {0: 'reused', count: 'computed'}.get(computed, f'computed in {computed} of {count} batches, else reused,')
    say(f"{stage}: features of {source.length:,} examples of '{name}' {what} in {time.perf_counter() - start:.1f} s")
    return columns


def stored_or_run(
    backbone: Backbone, mesh: jax.sharding.Mesh, *, train: bool
) -> Callable[[Any], tuple[np.ndarray, bool]]:
    """Returns inputs -> (features, whether the backbone had to be run for them); what it gives is stored."""
    run = jax.jit(functools.partial(backbone.endpoints, key=jax.random.key(0), train=train))
    local = mesh.local_mesh
    placed = functools.cache(lambda: mesh_lib.put_everywhere(backbone.variables, local))

    @functools.cache
    def folder(structure, *leaves):
        # The traced program says all that the model's fields, precision and versions can change.
        program = run.lower(_shapes(backbone.variables), jax.tree.unflatten(structure, leaves)).as_text()
        return cached.folder() / cached.content_hash([program, backbone.weights])

    def features_of(inputs):
        leaves, structure = jax.tree.flatten(_shapes(inputs))
        path = folder(structure, *leaves) / f'{cached.content_hash(jax.tree.leaves(inputs))}.npy'
        features = cached.read(path)
        if features is not None:
            return features, False
        features = np.asarray(run(placed(), jax.device_put(inputs, mesh_lib.over_batch(local))))
        cached.write(path, features)
        return features, True

    return features_of


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
