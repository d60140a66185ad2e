"""Sinusoids: the few-shot regression tasks of Finn et al. 2017."""

from collections.abc import Sequence

import numpy as np

from tl_jax.data.base import Source, check_size
from tl_jax.errors import UserError, nearest

SPLITS = ('train', 'val', 'test')


def open_sinusoid(
    path: str,
    *,
    support: int = 5,
    query: int = 5,
    count: int = 1_000_000,
    seed: int = 0,
    amplitude: Sequence[float] = (0.1, 5.0),
    phase: Sequence[float] = (0.0, np.pi),
    frequency: Sequence[float] = (1.0, 1.0),
) -> Source:
    """`sinusoid:train|val|test`: regression tasks y = a sin(f x - p) (Finn et al. 2017, arXiv:1703.03400, sec. 5.1).

    a ~ U[0.1, 5], p ~ U[0, π], f = 1, x ~ U[-5, 5]. Example i is a task, by (split, seed, i) alone: `support_inputs`
    and `support_target` float32 [support, 1], `query_inputs` and `query_target` [query, 1]. Its curve does not depend
    on the numbers of points, so that 5, 10 and 20 shots can be compared on the same curves.

    All are drawn when the source is opened, 8 bytes a point: a batch must then cost next to nothing.
    """
    name = f'sinusoid:{path}'
    if path not in SPLITS:
        raise UserError(f'{name}: no split {path!r}; {nearest(path, SPLITS)}')
    if min(support, query, count) < 1:
        raise UserError(f'{name}: support={support}, query={query} and count={count} must be at least 1')
    points = support + query
    check_size(8 * count * points, name)
    curves, places = (np.random.Generator(np.random.Philox(key=[seed, 2 * SPLITS.index(path) + k])) for k in (0, 1))
    ranges = np.array([amplitude, frequency, phase], np.float32)
    drawn = ranges[:, 0] + (ranges[:, 1] - ranges[:, 0]) * curves.random((count, 3), np.float32)
    a, f, p = drawn.T[:, :, None]
    x = 10 * places.random((count, points), np.float32) - 5
    x, y = x[..., None], (a * np.sin(f * x - p))[..., None]
    x.flags.writeable = y.flags.writeable = False

    def get(i: int) -> dict[str, np.ndarray]:
        return {
            'support_inputs': x[i, :support],
            'support_target': y[i, :support],
            'query_inputs': x[i, support:],
            'query_target': y[i, support:],
        }

    return Source(name, count, get)
