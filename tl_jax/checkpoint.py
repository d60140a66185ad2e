"""Checkpoints of a run: asynchronous, verified, exact to resume, and small.

    checkpoints/<step>/    what moves during a stage: trainable parameters, optimizer state, statistics, averages, key
    frozen/<stage>/        what the stage leaves alone, stored once when the stage begins
    damaged/<step>/        checkpoints that failed verification, set aside

Each leaf is stored with a checksum computed on the device, so that damage is found however the arrays are sharded.
"""

import shutil
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.progress import say
from tl_jax.state import Layout, TrainState, frozen_statistics, without_markers


class Place(NamedTuple):
    """Where in its stages a run is.

    Attributes:
      stage: number of the stage, from 0.
      first_step: the run's step at which that stage began.
    """

    stage: int
    first_step: int


class Checkpoints:
    """The checkpoints in a run's directory; keeps the newest `keep` and the one with the highest score."""

    def __init__(self, workdir: Path, *, keep: int):
        self._root = workdir.absolute()
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics['score'],
            preservation_policy=_NewestAndBest(keep),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._root / 'checkpoints', options=options)

    def save(self, state: TrainState, place: Place, trainable: Set[str], *, score: float | None) -> None:
        """Starts to save what moves; returns once the arrays are copied and may be overwritten.

        `score` ranks checkpoints, higher is better; None where nothing is selected.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        moving = _moving(state, trainable)
        about = {'place': place._asdict(), 'checksums': checksums(moving)}
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(moving), about=ocp.args.JsonSave(about)),
            metrics={'score': float('-inf') if score is None else score},
            force=True,
        )

    def save_frozen(self, state: TrainState, stage: int, trainable: Set[str]) -> None:
        """Stores what the stage leaves alone; waits until it is on disk. Does nothing where everything moves."""
        frozen = _frozen(state, trainable)
        if not trees.flatten(frozen):
            return
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                self._root / 'frozen' / str(stage),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(frozen),
                    about=ocp.args.JsonSave({'checksums': checksums(frozen)}),
                ),
                force=True,
            )

    def restore_latest(self, layout_of: Callable[[int], Layout]) -> tuple[TrainState, Place] | None:
        """Returns the newest state that verifies, or None where there is none; sets damaged ones aside by name.

        Args:
          layout_of: from the number of a stage to what its states look like.

        Raises:
          UserError: there are checkpoints but none can be read.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self.restore(step, layout_of)
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes the reader say
                damaged.append(self._set_aside(step, error))
        if damaged:
            raise UserError(
                f'{self._root}: none of its {len(damaged)} checkpoints can be read (set aside in {damaged[0].parent}); '
                'delete the workdir to start again'
            )
        return None

    def restore(self, step: int, layout_of: Callable[[int], Layout]) -> tuple[TrainState, Place]:
        """Returns the state and place saved at `step`, verified leaf by leaf."""
        directory = self._root / 'checkpoints' / str(step)
        about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
        place = Place(**about['place'])
        template, trainable = layout_of(place.stage).state, layout_of(place.stage).partition.trainable
        wanted = _moving(template, trainable)
        moving = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))['state']
        _verify(moving, about['checksums'], directory)
        frozen = self._restore_frozen(place.stage, _frozen(template, trainable))
        _, treedef = jax.tree.flatten(template.opt_state)
        collections = trees.merge(moving.get('collections', {}), frozen.get('collections', {}))
        state = TrainState(
            step=moving['step'],
            params=trees.merge(moving['params'], frozen.get('params', {})),
            # An empty collection has no leaf to store, yet it is part of the state.
            collections={name: collections.get(name, {}) for name in template.collections},
            opt_state=jax.tree.unflatten(treedef, list(moving.get('opt_state', {}).values())),
            key=moving['key'],
        )
        return state, place

    def _restore_frozen(self, stage: int, wanted: trees.Tree) -> trees.Tree:
        if not trees.flatten(wanted):
            return {}
        directory = self._root / 'frozen' / str(stage)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                directory,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted), about=ocp.args.JsonRestore()),
            )
        _verify(restored['state'], restored['about']['checksums'], directory)
        return restored['state']

    def wait(self) -> None:
        """Returns when all saves are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _set_aside(self, step: int, error: Exception) -> Path:
        source, target = self._root / 'checkpoints' / str(step), self._root / 'damaged' / str(step)
        reason = ' '.join(str(error).split())[:200]
        say(f'checkpoint {source} is damaged ({type(error).__name__}: {reason}); set aside as {target}')
        if jax.process_index() == 0:
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)
        self._manager.reload()
        return target


class _NewestAndBest:
    """Orbax's preservation policy: the newest few, and the first with the highest score."""

    def __init__(self, newest: int):
        self._newest = newest

    def should_preserve(self, checkpoints, *, context):
        del context
        scores = [(c.metrics or {}).get('score', float('-inf')) for c in checkpoints]
        best = scores.index(max(scores)) if scores else None
        return [i == best or i >= len(checkpoints) - self._newest for i in range(len(checkpoints))]


def _moving(state: TrainState, trainable: Set[str]) -> dict[str, Any]:
    """What changes within a stage, as nested dicts without empty nodes."""
    keep = _stays_put(state, trainable)
    moving = {
        'step': state.step,
        'params': trees.split(state.params, trainable.__contains__)[0],
        'collections': trees.split(state.collections, lambda path: path not in keep)[0],
        'opt_state': {f'{i:06d}': leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))},
        'key': state.key,
    }
    return trees.unflatten(trees.flatten(moving))


def _frozen(state: TrainState, trainable: Set[str]) -> dict[str, Any]:
    """The rest of the state."""
    keep = _stays_put(state, trainable)
    frozen = {
        'params': trees.split(state.params, trainable.__contains__)[1],
        'collections': trees.split(state.collections, keep.__contains__)[0],
    }
    return trees.unflatten(trees.flatten(frozen))


def _stays_put(state: TrainState, trainable: Set[str]) -> frozenset[str]:
    """Paths, within the collections, of batch statistics that the stage does not move."""
    statistics = without_markers(state.collections.get('batch_stats', {}))
    markers = trees.flatten(frozen_statistics(statistics, state.params, trainable))
    modules = {path.rpartition('/')[0] for path in markers}
    return frozenset(f'batch_stats/{p}' for p in trees.flatten(statistics) if p.rpartition('/')[0] in modules)


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """A sum of a leaf's words, each times an odd number of its place: sensitive to values and order, exact on any mesh."""
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f'uint{min(leaf.dtype.itemsize, 4) * 8}')).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (place * jnp.uint32(2654435762) + jnp.uint32(1)), dtype=jnp.uint32)


def checksums(tree: trees.Tree) -> dict[str, int]:
    """Returns `{path: 32-bit checksum}`; equal trees have equal ones, whatever their sharding."""
    pending = {path: _checksum(leaf) for path, leaf in trees.flatten(tree).items()}
    return {path: int(value) for path, value in pending.items()}


def _verify(tree: trees.Tree, expected: dict[str, int], directory: Path) -> None:
    found = checksums(tree)
    for path in expected:
        if found.get(path) != expected[path]:
            raise ValueError(f"{directory}: the leaf '{path}' is not what was saved")
