"""The guard: metrics of finished steps come to the host, and a number that is not finite stops the run by name."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.metrics import figures_of
from tl_jax.objectives import Objective, phases_of
from tl_jax.optimizers import Partition


def settle(
    pending: list[dict[str, Any]], step: int, objective: Objective, streams: Mapping[str, Any], partition: Partition
) -> dict[str, float]:
    """Fetches the metrics of the steps up to `step` and averages them.

    Raises:
      UserError: a loss or gradient was not finite; names the step, the examples and the first leaf. Nothing of it has
        been saved: this comes before every save.
    """
    records = jax.device_get(pending)
    for offset, record in enumerate(records):
        bad = next((k for k, v in record.items() if k.endswith(('loss', 'grad_norm')) and not np.isfinite(v)), None)
        if bad:
            _refuse_nonfinite(bad, record, step - len(records) + offset, objective, streams, partition)
    return figures_of([{k: v for k, v in r.items() if not k.endswith('bad_leaf')} for r in records])


def _refuse_nonfinite(
    bad: str,
    record: Mapping[str, Any],
    step: int,
    objective: Objective,
    streams: Mapping[str, Any],
    partition: Partition,
) -> None:
    where = []
    for name, stream in streams.items():
        batch = stream.batch_at(step)
        for field, values in batch.items():
            finite = np.isfinite(values) if np.issubdtype(values.dtype, np.floating) else np.ones(values.shape, bool)
            rows = np.flatnonzero(~finite.reshape(len(finite), -1).all(1))
            if len(rows):
                raise UserError(
                    f"step {step}: stream '{name}', example {batch['index'][rows[0]]}: its {field} is not finite"
                )
        shown = ' '.join(map(str, batch['index'][:16])) + (' …' if len(batch['index']) > 16 else '')
        where.append(f"stream '{name}' examples {shown}")
    names = [phase.name for phase in phases_of(objective)]
    phase = names.index(bad.split('/')[1]) if len(names) > 1 else 0
    paths = jax.tree.leaves(trees.unflatten({path: path for path in partition.phases[phase]}))
    leaf = paths[int(record[bad.rpartition('/')[0] + '/bad_leaf'])]
    raise UserError(
        f"step {step}: {bad} is {float(record[bad])}, first in the gradient of '{leaf}' ({'; '.join(where)}); lower the "
        'learning rate or set config.clip_norm; the last good checkpoint is kept'
    )
