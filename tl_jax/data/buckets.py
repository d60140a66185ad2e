"""Length buckets: batches of texts of like length, each padded to one of a few widths, which are the compiled shapes.

A source says of each example how many tokens it has (`lengths`) and which widths a batch may take (`buckets`). Which
examples come together is `order.bucketed`'s; here a batch gets its width, which every process finds alike, since it goes by
the lengths of the whole batch and not of a process's rows.
"""

from collections.abc import Sequence

import numpy as np

from tl_jax.data.base import Source
from tl_jax.errors import UserError

# Fields of an example with one value for each token, at the end of their shape.
TOKEN_FIELDS = ('tokens', 'segments', 'token_mask', 'token_label')


def in_buckets(source: Source, buckets: Sequence[int]) -> Source:
    """The same examples, to come in batches of these widths; the last holds the longest text."""
    if source.lengths is None:
        raise UserError(f'{source.name}: buckets are for texts; take them away from examples of one size')
    if not buckets or sorted(set(buckets)) != list(buckets) or buckets[0] < 1:
        raise UserError(
            f'{source.name}: buckets={list(buckets)} must be lengths in ascending order, such as [16, 32, 64]'
        )
    width = source.get(0)['tokens'].shape[-1]
    if buckets[-1] != width:
        raise UserError(f'{source.name}: the last of buckets={list(buckets)} must be length={width}, the longest text')
    return source._replace(buckets=tuple(buckets))


def bucket_of(source: Source) -> np.ndarray:
    """The number of the first bucket that holds each example, int [length]."""
    return np.searchsorted(np.array(source.buckets), source.lengths)


def width_of(source: Source, indices: np.ndarray) -> int:
    """The width of a batch of these examples."""
    longest = source.lengths[indices].max(initial=1)
    return next(bucket for bucket in source.buckets if bucket >= longest)


def cropped(batch: dict[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
    """The batch without the padding beyond `width`."""
    return {field: array[..., :width] if field in TOKEN_FIELDS else array for field, array in batch.items()}


def describe(source: Source) -> str:
    """What a source's lengths come to: the number of compiled shapes, the share of padding, and the texts that fill up all."""
    longest = source.get(0)['tokens'].shape[-1]
    buckets = source.buckets or (longest,)
    counts = np.bincount(np.searchsorted(buckets, source.lengths), minlength=len(buckets))
    shapes = ', '.join(f'{count:,} of ≤ {bucket} tokens' for count, bucket in zip(counts, buckets, strict=True))
    padding = 1 - source.lengths.sum() / (counts @ buckets)
    full = int((source.lengths >= longest).sum())
    return f'{len(buckets)} compiled shape{"s" * (len(buckets) > 1)}: {shapes}; {padding:.0%} padding' + (
        f'; {full:,} fill all {longest}: what a text has beyond is cut' if full else ''
    )
