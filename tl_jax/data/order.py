"""Which example stands at which place of an endless stream: pure functions of (seed, place), for any place at
once.

grain's own shuffle is not used here because it seeds epoch e of run s by s + e, so that neighbouring seeds of
one table would see the same permutations; and it answers for one place at a time.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, UInt64

Order = Callable[[Int[np.ndarray, ' places']], Int[np.ndarray, ' places']]

ROUNDS = 6
POOL = 1024  # about so many batches are sorted by length together
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(*values: int | np.ndarray) -> UInt64[np.ndarray, '...']:
    """One hash of 64 bits of whole numbers, or of arrays of them element by element."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = _scramble((state ^ np.asarray(value).astype(np.uint64)) + GOLDEN)
    return state


def _scramble(state: UInt64[np.ndarray, '...']) -> UInt64[np.ndarray, '...']:
    # splitmix64's output function (Steele et al. 2014); arrays, unlike scalars, overflow silently.
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def permute(
    place: Int[np.ndarray, ' places'], length: Int[np.ndarray, ' places'], key: UInt64[np.ndarray, ' places']
) -> Int[np.ndarray, ' places']:
    """Where the permutation of 0 … length - 1 that `key` chooses sends each place; lengths and keys go by
    place.

    A Feistel network on the pairs (left, right) with left < a, right < b, a b >= length, repeated while the
    result lies beyond `length` (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). Constant
    memory for any length.
    """
    place = np.asarray(place, np.uint64)
    length, key = (np.broadcast_to(np.asarray(x, np.uint64), place.shape) for x in (length, key))
    a = np.ceil(np.sqrt(length)).astype(np.uint64)
    a += a % np.uint64(2)  # shifts of odd cycles alone would reach even permutations only
    b = (length + a - np.uint64(1)) // a
    result = _feistel(place, a, b, key)
    while len(walking := np.flatnonzero(result >= length)):
        result[walking] = _feistel(result[walking], a[walking], b[walking], key[walking])
    return result.astype(np.int64)


def _feistel(place: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    right, left = np.divmod(place, a)
    step = np.uint64(2 * ROUNDS)
    for i in range(ROUNDS):
        left = (left + _scramble(key + (right * step + np.uint64(2 * i)) * GOLDEN) % a) % a
        right = (right + _scramble(key + (left * step + np.uint64(2 * i + 1)) * GOLDEN) % b) % b
    return right * a + left


def sequential(length: int) -> Order:
    """0, 1, …, length - 1, 0, 1, …"""
    return lambda places: places % length


def shuffled(length: int, seed: int) -> Order:
    """Every epoch is a permutation of its own; the stream is the epochs one after the other."""
    return lambda places: permute(places % length, length, mix(seed, places // length))


def class_balanced(labels: Int[np.ndarray, ' examples'], seed: int) -> Order:
    """Every class equally often: each run of K places (K classes present) holds every class once, in random
    order, and each class goes through its own examples, every one once a pass, in an order of its own for
    each pass."""
    classes, counts = np.unique(labels, return_counts=True)
    members = np.argsort(labels, kind='stable')
    starts = np.cumsum(counts) - counts

    def order(places: np.ndarray) -> np.ndarray:
        turn, slot = np.divmod(places, len(classes))
        chosen = permute(slot, len(classes), mix(seed, 1, turn))
        count = counts[chosen]
        member = permute(turn % count, count, mix(seed, 2, chosen, turn // count))
        return members[starts[chosen] + member]

    return order


def bucketed(order: Order, bucket: Int[np.ndarray, ' examples'], batch_size: int, seed: int) -> Order:
    """The same examples, moved within an epoch's steps so that a batch holds neighbours in length.

    The steps of the stream fall into pools, of an epoch or, where it is long, of an equal part of one. The examples that
    `order` gives a pool are sorted by `bucket`, those of one bucket staying in their order, and cut into batches, which come
    in an order of their own. So what comes within a pool's steps is what `order` has there, each as often: nothing is lost.
    """
    pools = max(1, round(len(bucket) / batch_size / POOL))  # of an epoch
    first_step = lambda pool: pool * len(bucket) // (batch_size * pools)

    @functools.lru_cache(maxsize=4)
    def steps_of(pool: int) -> np.ndarray:
        first, end = first_step(pool), first_step(pool + 1)
        chosen = order(np.arange(first * batch_size, end * batch_size))
        batches = chosen[np.argsort(bucket[chosen], kind='stable')].reshape(end - first, batch_size)
        return batches[permute(np.arange(end - first), end - first, mix(seed, 3, pool))]

    def batch_of(step: int) -> np.ndarray:
        pool = step * batch_size * pools // len(bucket)
        while first_step(pool + 1) <= step:
            pool += 1
        return steps_of(pool)[step - first_step(pool)]

    def bucketed_order(places: np.ndarray) -> np.ndarray:
        steps, rows = np.divmod(places, batch_size)
        batches = {step: batch_of(step) for step in np.unique(steps).tolist()}
        return np.array([batches[step][row] for step, row in zip(steps.tolist(), rows.tolist(), strict=True)])

    return bucketed_order


def poisson(length: int, rate: float, seed: int, step: int) -> Int[np.ndarray, ' drawn']:
    """The examples of one step, each drawn by itself with probability `rate`; ascending."""
    return np.flatnonzero(np.random.Generator(np.random.Philox(key=[seed, step])).random(length) < rate)
