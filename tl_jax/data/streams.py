"""Streams of batches: row i of the batch at step t is a pure function of (seed, t, i), on 1 process or 64.

Rows are numbered through the stream: row i of step t stands at place t * batch_size + i. The place decides
which example comes (`order.py`) and keys the random generator of its transforms, so nothing has to be
replayed after a restart and threads cannot change anything. grain runs the threads.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tl_jax.data import order as orders
from tl_jax.data.base import Source, need_labels
from tl_jax.data.buckets import bucket_of, cropped, width_of
from tl_jax.data.transforms import make_transform, split_elementwise
from tl_jax.errors import UserError

Batch = dict[str, np.ndarray]


class Loader(NamedTuple):
    """Reads rows of a batch: `transform` is applied to every example, `finish` to the batch as a whole."""

    source: Source
    seed: int
    transform: Callable[[dict, np.random.Generator], dict] | None
    finish: Callable[[dict, None], dict]


class Stream(NamedTuple):
    """An endless stream of batches of one source; made by `train_stream`."""

    loader: Loader
    batch_size: int  # of all processes together
    order: orders.Order
    rate: float | None = None  # of Poisson sampling

    def batch_at(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's rows of the batch at `step`: rows p * B / P … (p + 1) * B / P of the global batch.

        Fields: `image` float32 [rows, H, W, C] (or `inputs` float32 [rows, F]), `label` int32 [rows] where
        the source has labels, `index` int32 [rows] into the source. An image that no transform made float
        keeps its values 0 … 255. With Poisson sampling also `mask` float32 [rows]: 1 for the examples drawn, 0
        for the rows that fill the batch up.
        """
        rows = _rows(self.batch_size, process_index, process_count)
        places = step * self.batch_size + np.arange(rows.start, rows.stop)
        if self.rate is None:
            together = self.order(step * self.batch_size + np.arange(self.batch_size))
            batch = _collect(self.loader, together[rows], places)
            return cropped(batch, width_of(self.loader.source, together)) if self.loader.source.buckets else batch
        drawn = orders.poisson(self.loader.source.length, self.rate, self.loader.seed, step)
        if len(drawn) > self.batch_size:
            raise UserError(
                f'{self.loader.source.name}: step {step} drew {len(drawn)} examples; raise config.batch_size '
                f'({self.batch_size}), the room for a Poisson sample of rate {self.rate}'
            )
        mask = np.arange(self.batch_size) < len(drawn)
        indices = np.concatenate([drawn, np.zeros(self.batch_size - len(drawn), drawn.dtype)])
        return {**_collect(self.loader, indices[rows], places), 'mask': mask[rows].astype(np.float32)}


def train_stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transforms: Sequence[str | Mapping[str, Any]] = (),
    balance: str | None = None,
    shuffle: bool = True,
    rate: float | None = None,
) -> Stream:
    """A stream in which every epoch is a fresh permutation with every example once; batches run across
    epochs, so also where `batch_size` does not divide the number of examples none is lost.

    With balance='class' every class comes equally often instead (see `order.class_balanced`). With a `rate`
    every example joins each batch by itself with that probability (Poisson sampling, as differential privacy
    asks), and `batch_size` is the room for them. Two streams of one run want different seeds.
    """
    if source.length < 1 or batch_size < 1:
        raise UserError(f'{source.name}: {source.length} examples in batches of {batch_size}; both must be positive')
    if balance not in (None, 'class'):
        raise UserError(f"{source.name}: balance={balance!r}; known: None, 'class'")
    if rate is not None and (not 0 < rate <= 1 or balance or not shuffle):
        raise UserError(f'{source.name}: rate={rate} of Poisson sampling must be in (0, 1], without balance or order')
    if balance and not shuffle:
        raise UserError(f"{source.name}: balance='class' draws at random; it cannot go with shuffle=False")
    if balance:
        order = orders.class_balanced(need_labels(source, 'balance'), seed)
    else:
        order = orders.shuffled(source.length, seed) if shuffle else orders.sequential(source.length)
    if source.buckets:
        if rate is not None or not shuffle:
            raise UserError(
                f'{source.name}: buckets move examples between batches; take away `poisson` and shuffle=False'
            )
        order = orders.bucketed(order, bucket_of(source), batch_size, seed)
    return Stream(_loader(source, seed, transforms), batch_size, order, rate)


def iterate(
    streams: Mapping[str, Stream],
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[dict[str, Batch]]:
    """The batches of all streams from `start_step` on, {stream: {field: array}}, read ahead by threads in
    order.

    A UserError of a source or transform comes out where its batch would have. Closing the iterator, or
    dropping it, ends the threads. `threads=0` reads in the calling thread.
    """
    streams = dict(streams)

    def load(step: int) -> dict[str, Batch]:
        return {name: s.batch_at(step, process_index, process_count) for name, s in streams.items()}

    return _read_ahead(load, start_step, sys.maxsize, threads, prefetch)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    transforms: Sequence[str | Mapping[str, Any]] = (),
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Every example exactly once, in order, in batches of one shape on every process; with buckets, by length and of theirs.

    `mask` float32 [rows] is 1 for an example and 0 for padding, which has zeros as image and label and -1 as
    index. All processes see the same number of batches; where the examples run out, some rows, or all, are
    padding.
    """
    rows = _rows(batch_size, process_index, process_count)
    loader = _loader(source, 0, transforms)
    order = np.argsort(bucket_of(source), kind='stable') if source.buckets else np.arange(source.length)

    def load(step: int) -> Batch:
        places = step * batch_size + np.arange(rows.start, rows.stop)
        real = order[places[places < source.length]]
        read = real if len(real) else np.zeros(1, int)  # padding alone takes its shapes from example 0
        batch = _collect(loader, read, read)
        batch = {field: _padded(array[: len(real)], len(places)) for field, array in batch.items()}
        batch['mask'] = (places < source.length).astype(np.float32)
        batch['index'][len(real) :] = -1
        together = order[step * batch_size : (step + 1) * batch_size]
        return cropped(batch, width_of(source, together)) if source.buckets else batch

    return _read_ahead(load, 0, -(-source.length // batch_size), threads, prefetch)


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size % process_count:
        raise UserError(f'batch_size={batch_size} is not a multiple of the {process_count} processes')
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _loader(source: Source, seed: int, transforms: Sequence[str | Mapping[str, Any]]) -> Loader:
    first, last = split_elementwise(transforms)
    return Loader(source, seed, make_transform(first) if first else None, make_transform(last))


def _collect(loader: Loader, indices: np.ndarray, places: np.ndarray) -> Batch:
    """The transformed examples at `indices`, stacked; whole numbers other than pixels as int32, the rest as float32."""
    source, transform = loader.source, loader.transform
    rng = np.random.Generator(np.random.Philox(0))
    examples = []
    for index, place in zip(indices.tolist(), places.tolist(), strict=True):
        example = source.get(index)
        if transform is not None:
            _seek(rng, loader.seed, place)
            example = transform(example, rng)
        examples.append(example)
    stacked = {field: _stack(field, examples, indices, source.name) for field in examples[0]}
    batch = {
        field: array.astype(_batch_dtype(array.dtype), copy=False)
        for field, array in loader.finish(stacked, None).items()
    }
    batch['index'] = indices.astype(np.int32)
    return batch


def _batch_dtype(dtype: np.dtype) -> type:
    return np.int32 if dtype.kind in 'bi' or (dtype.kind == 'u' and dtype.itemsize > 1) else np.float32


def _stack(field: str, examples: list[dict], indices: np.ndarray, name: str) -> np.ndarray:
    values = [example[field] for example in examples]
    if field != 'label':
        for index, value in zip(indices, values, strict=True):
            if np.shape(value) != np.shape(values[0]):
                raise UserError(
                    f'{name}: {field} of example {index} is {list(np.shape(value))}, of example {indices[0]} '
                    f'{list(np.shape(values[0]))}; add a transform that makes sizes equal (resize, a crop)'
                )
    return np.array(values)


def _seek(rng: np.random.Generator, seed: int, place: int) -> None:
    """Sets `rng` to the start of the random stream of (seed, place), at a quarter of the price of a new one."""
    rng.bit_generator.state = {
        'bit_generator': 'Philox',
        # Philox counts in the first word; the place in the second keeps the streams of two places apart.
        'state': {'counter': np.array([0, place, 0, 0], np.uint64), 'key': np.array([seed, 0], np.uint64)},
        'buffer': np.zeros(4, np.uint64),
        'buffer_pos': 4,
        'has_uint32': 0,
        'uinteger': 0,
    }


def _read_ahead(load: Callable[[int], Any], start: int, stop: int, threads: int, prefetch: int) -> Iterator[Any]:
    """load(start), load(start + 1), … in order, computed ahead by grain's threads until the generator is
    closed."""
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
    iterator = iter(grain.MapDataset.range(start, stop).map(load).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
