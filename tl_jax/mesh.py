"""Devices to a mesh, rules to shardings, and the start of a run on several processes."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tl_jax import trees
from tl_jax.config import call
from tl_jax.errors import UserError

AXES = ('data', 'model')


def start_processes() -> None:
    """Joins the other processes of the job where an environment (TPU pod, SLURM, JAX_COORDINATOR_ADDRESS) names some."""
    several = (
        int(os.environ.get('SLURM_NTASKS', '1')) > 1
        or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
        or 'JAX_COORDINATOR_ADDRESS' in os.environ
    )
    if several and not jax.distributed.is_initialized():
        jax.distributed.initialize()


def create_mesh(*, data: int = -1, model: int = 1) -> Mesh:
    """Arranges devices as `data` × `model`; batches are split over `data`. -1 takes all that are left.

    Raises:
      UserError: there are not so many devices.
    """
    devices = jax.devices()
    if data == -1:
        data = len(devices) // model
    if data < 1 or model < 1 or data * model > len(devices):
        raise UserError(
            f'config.mesh: data={data} × model={model} needs {data * model} devices; {len(devices)} are here'
        )
    return Mesh(np.asarray(devices[: data * model]).reshape(data, model), AXES)


def mesh_from(config: Mapping[str, Any], *sizes: str) -> Mesh:
    """The mesh of a resolved config.

    Args:
      config: resolved.
      sizes: its fields that say how many examples are in the batches that the mesh is to split.

    Raises:
      UserError: there are not so many devices, or they cannot share such a batch equally.
    """
    mesh = call(create_mesh, config['mesh'], 'config.mesh')
    parts = mesh.shape['data']
    for field in sizes:
        size = config[field]
        if size < 1 or size % parts:
            raise UserError(
                f'config.{field}: {size} examples cannot be split over {parts} devices; choose a multiple of {parts}'
            )
    return mesh


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over `data`."""
    return NamedSharding(mesh, PartitionSpec('data'))


def parameter_shardings(params: trees.Tree, rules: trees.Rules, mesh: Mesh) -> dict[str, Any]:
    """Returns a sharding for each parameter.

    A rule's value is a list of mesh axes or None, one for each axis of the leaf (`[None, 'model']`), or `'fsdp'`: the
    largest axis that `data` divides is split over it. What no rule matches is replicated.
    """
    flat = trees.flatten(params)
    specs = trees.match(rules, flat, field='config.sharding', default=None)
    return trees.unflatten({path: _sharding(path, flat[path].shape, specs[path], mesh) for path in flat})


def _sharding(path: str, shape: tuple[int, ...], spec: Any, mesh: Mesh) -> NamedSharding:
    if spec is None:
        return replicated(mesh)
    if spec == 'fsdp':
        divisible = [axis for axis, size in enumerate(shape) if size % mesh.shape['data'] == 0]
        if not divisible:
            return replicated(mesh)
        largest = max(divisible, key=lambda axis: shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(['data' if a == largest else None for a in range(len(shape))])))
    if not isinstance(spec, list | tuple) or len(spec) != len(shape) or any(s not in (None, *AXES) for s in spec):
        raise UserError(
            f"config.sharding: '{path}' has {len(shape)} axes; give 'fsdp' or a list of {AXES} or None for each"
        )
    for size, axis in zip(shape, spec, strict=True):
        if axis and size % mesh.shape[axis]:
            raise UserError(f"config.sharding: '{path}' {shape}: {mesh.shape[axis]} devices do not divide {size}")
    return NamedSharding(mesh, PartitionSpec(*spec))


def state_shardings(state: Any, by_parameter: trees.Tree, mesh: Mesh) -> Any:
    """Returns a sharding for each leaf of a state: its parameter's where its path ends in one's, else replicated.

    So moments and averages are split like the parameter that they belong to.
    """
    flat = trees.flatten(by_parameter)

    def choose(path, leaf):
        names = [str(getattr(entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', '')))) for entry in path]
        for start in range(len(names)):
            sharding = flat.get('/'.join(names[start:]))
            if sharding is not None and len(sharding.spec) <= len(leaf.shape):
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(choose, state)


def put(tree: Any, shardings: Any) -> Any:
    """Places host or device arrays that every process holds whole."""

    def place(leaf, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)


def put_everywhere(tree: Any, mesh: Mesh) -> Any:
    """Places a copy of host arrays on every device."""
    return put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Places this process's rows of a batch as its part of the global one."""
    sharding = over_batch(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), dict(batch))


def to_host(tree: Any) -> Any:
    """Returns the whole of each array as numpy, on every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def preempted(requested: bool, step: int) -> bool:
    """Whether to stop now: on this process's own signal, or, on several, at the step all of them agree on."""
    if jax.process_count() == 1:
        return requested
    return multihost_utils.reached_preemption_sync_point(step)
