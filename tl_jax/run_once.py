"""Networks that stand still run once over each example; what they say is stored, and found again by any run.

What is stored is addressed by its content: the folder by the traced program and its weights, each file by the transformed
examples of one evaluation batch. So nothing can be stale: changed data, transforms, weights, fields, precision or code have
other names. What is reused was read and transformed anyway; the network is not run.

On several processes each runs its share of the batches and finds the others' in the folder, where all see the same one;
where they do not, each runs the whole.
"""

import functools
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from tl_jax import data as data_lib
from tl_jax import mesh as mesh_lib
from tl_jax import trees
from tl_jax.data import cached
from tl_jax.errors import UserError
from tl_jax.objectives import inputs_of
from tl_jax.progress import say

DTYPES = ('float32', 'float16')


class Uncached(Exception):
    """Why a stage runs a network in every step."""


class Network(NamedTuple):
    """A network that stands still.

    Attributes:
      run: (variables, what it sees of a batch) -> a tree of arrays [B, …].
      variables: its own, on the host.
      weights: their hash.
    """

    run: Callable
    variables: dict[str, Any]
    weights: str


def on_host(variables: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A copy of variables, since a step donates what it is given, and their hash."""
    own = jax.tree.map(np.array, mesh_lib.to_host(dict(variables)))
    flat = sorted(trees.flatten(own).items())
    return own, cached.content_hash(part for item in flat for part in item)


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"config.cache_dtype: must be {' or '.join(DTYPES)}, not '{dtype}'")


def require_fixed_examples(experiment: Any, stream: str, steps: int) -> None:
    """Refuses a stream of which an example looks different each time, or of which a stage does not see all."""
    data = experiment.data
    drawn, length = data_lib.random_transforms(data.train_transforms[stream]), data.sources[stream].length
    if drawn:
        raise Uncached(f"the transform {drawn[0]} of '{stream}' is random")
    a_step = length * data.sample_rate if data.sample_rate else experiment.config['batch_size']
    if steps * a_step < length:
        raise Uncached(f"{steps} steps do not see the {length:,} examples of '{stream}' once")


def require_room(size: int, hint: str) -> None:
    """Refuses so many bytes as would take more than half of the memory or of the disk that is free."""
    place = next(parent for parent in (cached.folder(), *cached.folder().parents) if parent.exists())
    for what, free in (('memory', free_memory()), ('disk', shutil.disk_usage(place).free)):
        if size > free // 2:
            raise Uncached(
                f'it would take {size / 2**30:.2f} GiB of {what}, of which {free / 2**30:.2f} are free; {hint}'
            )


def free_memory() -> int:
    """Bytes that the machine, or the container, can give; without Linux's files, the limit that sources have."""
    try:
        lines = dict(line.split(':') for line in Path('/proc/meminfo').read_text().splitlines())
        free = int(lines['MemAvailable'].split()[0]) * 1024
        limit, used = (Path(f'/sys/fs/cgroup/memory.{name}') for name in ('max', 'current'))
        bounded = limit.exists() and limit.read_text().strip() != 'max'
        return min(free, int(limit.read_text()) - int(used.read_text())) if bounded else free
    except (OSError, KeyError, ValueError):
        return data_lib.base.MAX_BYTES


def shown_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a batch that a network sees."""
    leaves = {id(leaf) for leaf in jax.tree.leaves(inputs_of(batch))}
    return {field: value for field, value in batch.items() if id(value) in leaves}


def columns(
    mesh: jax.sharding.Mesh,
    network: Network,
    name: str,
    batches: Callable,
    length: int,
    keep: Callable[[Mapping[str, Any], Any], Mapping[str, np.ndarray]],
    says: str,
) -> dict[str, np.ndarray]:
    """What is to be kept of every example, on the host: `{field: [N, …]}`.

    Args:
      mesh: of devices.
      network: runs where nothing is stored.
      name: of the stream or split.
      batches: () -> its evaluation batches.
      length: N.
      keep: (batch, what the network says of it) -> `{field: [B, …]}`.
      says: what the log calls it.
    """
    start = time.perf_counter()
    outputs_of = stored_or_run(network, mesh)
    if jax.process_count() > 1:
        for place, batch in enumerate(batches()):
            if place % jax.process_count() == jax.process_index():
                outputs_of(shown_of(batch))
        multihost_utils.sync_global_devices(f'{says} of {name}')
    found, computed, count = {}, 0, 0
    for batch in batches():
        outputs, fresh = outputs_of(shown_of(batch))
        computed, count, real = computed + fresh, count + 1, batch['mask'] > 0
        for field, values in keep(batch, outputs).items():
            column = found.setdefault(field, np.zeros((length, *values.shape[1:]), values.dtype))
            column[batch['index'][real]] = values[real]
    what = {0: 'reused', count: 'computed'}.get(computed, f'computed in {computed} of {count} batches, else reused,')
    say(f"{says} of {length:,} examples of '{name}' {what} in {time.perf_counter() - start:.1f} s")
    return found


def stored_or_run(network: Network, mesh: jax.sharding.Mesh) -> Callable[[Any], tuple[Any, bool]]:
    """Returns inputs -> (outputs, whether the network had to be run for them); what it gives is stored."""
    run, local = jax.jit(network.run), mesh.local_mesh
    placed = functools.cache(lambda: mesh_lib.put_everywhere(network.variables, local))

    @functools.cache
    def program(structure, *leaves):
        # The traced program says all that the model's fields, precision and versions can change.
        lowered = run.lower(shapes_of(network.variables), jax.tree.unflatten(structure, leaves))
        name = cached.content_hash([lowered.as_text(), network.weights])
        return cached.folder() / name, jax.tree.structure(lowered.out_info)

    def outputs_of(inputs):
        leaves, structure = jax.tree.flatten(shapes_of(inputs))
        folder, given = program(structure, *leaves)
        name = cached.content_hash(jax.tree.leaves(inputs))
        files = [folder / f'{name}.{place}.npy' for place in range(given.num_leaves)]
        stored = [cached.read(file) for file in files]
        if all(array is not None for array in stored):
            return jax.tree.unflatten(given, stored), False
        outputs = jax.tree.map(np.asarray, run(placed(), jax.device_put(inputs, mesh_lib.over_batch(local))))
        for file, array in zip(files, jax.tree.leaves(outputs), strict=True):
            cached.write(file, array)
        return outputs, True

    return outputs_of


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
