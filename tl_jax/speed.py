"""How fast networks are, beside each other."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

BUDGET_S = 2.0
FEWEST, MOST = 3, 30


def examples_per_second(networks: Mapping[str, Callable[[], jax.Array]], examples: int) -> dict[str, float]:
    """Examples a second of each network: `examples` over the median time of a call.

    Calls are made in turns, so that what else the machine does meets all networks alike: as many turns as fit into BUDGET_S,
    from FEWEST to MOST. The first call of each, which compiles, does not count.
    """
    for call in networks.values():
        jax.block_until_ready(call())
    seconds = [_turn(networks)]
    turns = np.clip(BUDGET_S / sum(seconds[0].values()), FEWEST, MOST)
    if jax.process_count() > 1:  # a call is of all processes: they must make equally many
        turns = multihost_utils.broadcast_one_to_all(turns)
    seconds += [_turn(networks) for _ in range(int(turns) - 1)]
    return {name: examples / float(np.median([turn[name] for turn in seconds])) for name in networks}


def _turn(networks: Mapping[str, Callable]) -> dict[str, float]:
    seconds = {}
    for name, call in networks.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds[name] = time.perf_counter() - start
    return seconds
