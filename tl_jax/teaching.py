"""Teachers run once: where each example looks the same every time, what fixed networks say of it is a field of the example.

The loss finds `<role>/<endpoint>` in its batch and does not ask the network (`objectives.base.Fixed`); where transforms or the
objective show it another view each time, it asks in every step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn
from jaxtyping import Array, Float

from tl_jax import data as data_lib
from tl_jax.data.base import Source
from tl_jax.data.buckets import TOKEN_FIELDS
from tl_jax.errors import UserError
from tl_jax.objectives.base import Fixed, network_of
from tl_jax.progress import say
from tl_jax.run import Run
from tl_jax.run_once import (
    Network,
    Uncached,
    check_dtype,
    columns,
    on_host,
    require_fixed_examples,
    require_room,
    shown_of,
)
from tl_jax.state import TrainState, variables_of

# What stands for logits of which the k highest are kept: their values, their classes, the log of the others' mass.
VALUES, CLASSES, REST = (':values', ':classes', ':rest')


def with_fixed_networks(run: Run, state: TrainState, number: int) -> Run:
    """The run as stage `number` is to see it: with what its fixed networks say among the fields, where they can run once.

    Args:
      run: its streams are those of the inputs.
      state: at the start of the stage, or anywhere in it.
      number: of the stage.
    """
    experiment, stage = run.experiment, run.experiment.stages[number]
    fixed = [network for network in stage.objective.fixed if network.reads]
    if not fixed or not experiment.config['cache_teacher']:
        return run
    check_dtype(experiment.config['cache_dtype'])
    try:
        if stage.objective.altered:
            raise Uncached('the objective shows other inputs than the stream’s')
        for teacher in fixed:
            require_fixed_examples(experiment, teacher.stream, stage.steps)
        variables = variables_of(state)
        networks = {teacher.role: compact_network(teacher, variables, experiment.config) for teacher in fixed}
        size = sum(_size(experiment, teacher.stream, networks[teacher.role]) for teacher in fixed)
        require_room(size, "config.cache_dtype='float16' or config.cache_top_k make it smaller")
    except Uncached as reason:
        say(f'{stage.name}: {" and ".join(t.role for t in fixed)} run{"s" * (len(fixed) == 1)} in every step: {reason}')
        return run
    for stream in dict.fromkeys(teacher.stream for teacher in fixed):
        run = _on_fields(run, stage.name, stream, [t for t in fixed if t.stream == stream], networks)
    return run


def compact_network(teacher: Fixed, variables: Mapping[str, Any], config: Mapping[str, Any]) -> Network:
    """A fixed network that gives `{endpoint: [B, …]}` as it is stored, of the endpoints that the loss reads."""
    top, dtype = config['cache_top_k'], config['cache_dtype']
    own = {c: {teacher.role: tree[teacher.role]} for c, tree in network_of(variables).items() if teacher.role in tree}

    def run(variables, fields):
        found, stored = teacher.endpoints(variables, fields), {}
        for name in teacher.reads:
            stored |= highest(name, found[name], top) if top and name.endswith('logits') else {name: found[name]}
        whole = lambda x: jnp.issubdtype(x.dtype, jnp.integer)
        return {name: x if whole(x) else x.astype(dtype) for name, x in stored.items()}

    return Network(run, *on_host(own))


def highest(name: str, logits: Float[Array, '*batch classes'], k: int) -> dict[str, Array]:
    """The k highest logits, their classes, and the log of the mass that the others share, log Σ exp of them."""
    if not 0 < k < logits.shape[-1]:
        raise UserError(
            f"config.cache_top_k: must be less than the {logits.shape[-1]} classes of '{name}', or 0 for all, not {k}"
        )
    values, classes = lax.top_k(logits.astype(jnp.float32), k)
    rest = jnp.put_along_axis(logits.astype(jnp.float32), classes, -jnp.inf, -1, inplace=False)
    rest = nn.logsumexp(rest, -1, keepdims=True)
    return {name + VALUES: values, name + CLASSES: classes, name + REST: rest}


def all_logits(values: np.ndarray, classes: np.ndarray, rest: np.ndarray, count: int) -> np.ndarray:
    """Logits […, C] of which `highest` kept some: the others have equal shares of their mass."""
    logits = np.empty((*values.shape[:-1], count), np.float32)
    logits[...] = rest.astype(np.float32) - np.log(count - values.shape[-1])
    np.put_along_axis(logits, classes, values.astype(np.float32), -1)
    return logits


def _size(experiment: Any, stream: str, network: Network) -> int:
    """Bytes of what the network says of a stream; refuses what is as long as a batch's texts, where batches differ in that."""
    batch, source = experiment.batch[stream], experiment.data.sources[stream]

    def at(width):
        shape = lambda field, x: (*x.shape[:-1], width) if width and field in TOKEN_FIELDS else x.shape
        fields = {field: jax.ShapeDtypeStruct(shape(field, x), x.dtype) for field, x in shown_of(batch).items()}
        return jax.eval_shape(network.run, network.variables, fields)

    widths = source.buckets or (None,)
    narrow, wide = at(widths[0]), at(widths[-1])
    unlike = next((name for name in wide if narrow[name].shape != wide[name].shape), None)
    if unlike:
        raise Uncached(f"'{unlike}' is as long as the texts of a batch, and config.data gives them buckets")
    return sum(source.length * int(np.prod(x.shape[1:])) * x.dtype.itemsize for x in wide.values())


def _on_fields(run: Run, stage: str, stream: str, fixed: Sequence[Fixed], networks: Mapping[str, Network]) -> Run:
    """The run with what the networks say of a stream's examples among their fields."""
    experiment, data = run.experiment, run.experiment.data
    source, options = data.sources[stream], {'batch_size': experiment.config['eval_batch_size']}
    options['transforms'] = data.train_transforms[stream]
    batches = lambda: data_lib.eval_batches(source, **options)
    found, classes = {}, {}
    for teacher in fixed:
        role, network = teacher.role, networks[teacher.role]
        keep = lambda batch, outputs, role=role: {f'{role}/{name}': values for name, values in outputs.items()}
        says = f'{stage}: {", ".join(teacher.reads)} of the {role}'
        found |= columns(run.mesh, network, stream, batches, source.length, keep, says)
        shapes = jax.eval_shape(teacher.endpoints, network.variables, experiment.batch[stream])
        classes |= {f'{role}/{name}': shapes[name].shape[-1] for name in teacher.reads}
    loader = data.streams[stream].loader
    told = data.streams[stream]._replace(loader=loader._replace(source=with_fields(loader.source, found, classes)))
    data = data._replace(streams={**data.streams, stream: told})
    return run._replace(experiment=experiment._replace(data=data, batch={**experiment.batch, stream: told.batch_at(0)}))


def with_fields(source: Source, found: Mapping[str, np.ndarray], classes: Mapping[str, int]) -> Source:
    """The examples of a source with further fields, [N, …] each; logits of which the highest are kept become all again."""
    compact = [field.removesuffix(VALUES) for field in found if field.endswith(VALUES)]
    parts = {field: [found[field + part] for part in (VALUES, CLASSES, REST)] for field in compact}
    whole = {field: column for field, column in found.items() if ':' not in field}

    def get(i):
        more = {field: column[i] for field, column in whole.items()}
        more |= {field: all_logits(*(column[i] for column in of), classes[field]) for field, of in parts.items()}
        return {**source.get(i), **more}

    return source._replace(get=get)
