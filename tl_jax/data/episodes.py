"""Episodes: a labelled source as a source of few-shot tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from tl_jax.data.base import Source, need_labels
from tl_jax.data.transforms import make_transform, split_elementwise
from tl_jax.errors import UserError


def episodes(
    source: Source,
    *,
    ways: int,
    shots: int,
    queries: int,
    transform: Sequence[str | Mapping[str, Any]] = (),
    count: int = 1_000_000,
    seed: int = 0,
) -> Source:
    """N-way K-shot tasks (Vinyals et al. 2016, arXiv:1606.04080, sec. 4.1): example i is a task, by (seed, i) alone.

    Of `ways` classes, drawn at random and renamed 0 … N - 1, it holds K = `shots` examples each to learn from and Q =
    `queries` others to be judged by, class by class: `support_image` [N·K, H, W, C], `support_label` int32 [N·K],
    `query_image` [N·Q, H, W, C], `query_label` [N·Q]; and so for any other field, such as `inputs` of a table.

    Args:
      source: labelled.
      ways: classes in a task.
      shots: examples of each to learn from; 0 for none.
      queries: examples of each to be judged by; 0 for none.
      transform: of every image, as `train_transform` is; random transforms draw anew in every task.
      count: number of tasks, the source's length. For evaluation it wants to be small.
      seed: two sources of one data set with different seeds give different tasks.
    """
    if min(ways, shots + queries, count) < 1 or min(shots, queries) < 0:
        raise UserError(
            f'{source.name}: episodes of ways={ways}, shots={shots}, queries={queries}, count={count} are empty'
        )
    draw = _drawn(source, ways, shots + queries, seed)
    first, last = (make_transform(items) if items else None for items in split_elementwise(transform))
    label = np.arange(ways, dtype=np.int32)
    labels = {'support_label': np.repeat(label, shots), 'query_label': np.repeat(label, queries)}

    def get(i: int) -> dict[str, np.ndarray]:
        chosen = draw(i)
        rng = np.random.Generator(np.random.Philox(key=[seed, i])) if first else None
        parts = {'support': chosen[:, :shots].ravel(), 'query': chosen[:, shots:].ravel()}
        fields = {}
        for part, indices in parts.items():
            if len(indices):
                fields |= {f'{part}_{name}': array for name, array in _read(source, indices, first, last, rng).items()}
                fields[f'{part}_label'] = labels[f'{part}_label']
        return fields

    return Source(source.name, count, get)


def _drawn(source: Source, ways: int, per_class: int, seed: int):
    """Returns i -> the examples [ways, per_class] of task i, all different."""
    labels = need_labels(source, f'episodes of {ways} ways')
    classes, counts = np.unique(labels, return_counts=True)
    if ways > len(classes):
        raise UserError(f'{source.name}: has {len(classes)} classes, fewer than episodes.ways={ways}')
    if counts.min() < per_class:
        label = int(classes[counts.argmin()])
        name = source.class_names[label] if source.class_names else label
        raise UserError(
            f'{source.name}: class {name!r} has {counts.min()} examples, fewer than the {per_class} of '
            'episodes.shots + episodes.queries'
        )
    members = np.argsort(labels, kind='stable')
    starts = np.cumsum(counts) - counts

    columns = np.arange(counts.max())

    def draw(i: int) -> Int[np.ndarray, 'ways per_class']:
        rng = np.random.Generator(np.random.Philox(key=[seed, i]))
        chosen = rng.permutation(len(classes))[:ways]
        # The examples of lowest rank, in the order of their ranks: for all classes at once.
        ranks = rng.random((ways, len(columns)))
        ranks[columns >= counts[chosen, None]] = np.inf
        lowest = np.argpartition(ranks, per_class - 1)[:, :per_class]
        lowest = np.take_along_axis(lowest, np.argsort(np.take_along_axis(ranks, lowest, 1)), 1)
        return members[starts[chosen, None] + lowest]

    return draw


def _read(source: Source, indices: np.ndarray, first, last, rng) -> dict[str, np.ndarray]:
    """The transformed examples at `indices`, stacked field by field, without their labels."""
    examples = [source.get(index) for index in indices.tolist()]
    if first is not None:
        examples = [first(example, rng) for example in examples]
    try:
        stacked = {name: np.array([e[name] for e in examples]) for name in examples[0] if name != 'label'}
    except ValueError:
        shapes = sorted({str(list(np.shape(value))) for e in examples for n, value in e.items() if n != 'label'})
        raise UserError(
            f'{source.name}: its examples are of several shapes, such as {" and ".join(shapes[:2])}; add what makes them '
            'equal, such as a resize, to episodes.transform'
        ) from None
    return stacked if last is None else last(stacked, None)
