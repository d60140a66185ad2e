"""Which endpoints of two networks are compared, and on which positions.

A map [B, H, W, C], a sequence [B, L, C] and a vector [B, C] are told apart by their axes; the last is always that of channels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.objectives.distillation.base import FIELD as SECTION
from tl_jax.objectives.distillation.base import Pair

FIELD = f'{SECTION}.terms'
# A name that both networks have, or [the student's, the teacher's].
Layers = Sequence[str | Sequence[str]]
Layer = str | Sequence[str]


def layer_pairs(layers: Layers) -> tuple[tuple[str, str], ...]:
    """(student's endpoint, teacher's) of each layer: 'stage1' names one of each, ['stage2', 'block4'] is a pair itself."""
    if isinstance(layers, str) or not layers:
        raise UserError(f"{FIELD}: layers is a list of endpoints, such as ['stage1', 'stage2'], not {layers!r}")
    return tuple(map(layer_pair, layers))


def layer_pair(layer: Layer) -> tuple[str, str]:
    """The same of one layer."""
    pair = (layer, layer) if isinstance(layer, str) else tuple(layer)
    if len(pair) != 2 or not all(isinstance(name, str) for name in pair):
        raise UserError(
            f"{FIELD}: a layer is 'stage1', or the pair ['stage2', 'block4'] of student and teacher, not {layer!r}"
        )
    return pair


def reads(pairs: Sequence[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """The `student` and `teacher` of a term that compares these pairs."""
    students, teachers = zip(*pairs, strict=True)
    return {'student': tuple(dict.fromkeys(students)), 'teacher': tuple(dict.fromkeys(teachers))}


def aligned(pair: Pair, names: tuple[str, str]) -> tuple[Array, Array]:
    """The student's and the teacher's endpoint in float32 or finer, on the same positions: those of the smaller map of the two.

    Of a map that meets a vector the mean over positions is left, the vector being one of such means as a rule.
    """
    s, t = at_least_float32(pair.student[names[0]]), at_least_float32(pair.teacher[names[1]])
    if s.ndim == t.ndim == 4:
        rows, columns = (min(a, b) for a, b in zip(s.shape[1:3], t.shape[1:3], strict=True))
        return averaged(s, rows, columns), averaged(t, rows, columns)
    if {s.ndim, t.ndim} == {2, 4}:
        return tuple(x if x.ndim == 2 else jnp.mean(x, (1, 2)) for x in (s, t))
    return s, t


def each_layer(
    key: Array, pair: Pair, pairs: Sequence[tuple[str, str]], make: Callable[[Array, int, int], dict]
) -> dict[str, dict]:
    """What each layer learns, `{'layer1': make(key, the student's channels, the teacher's), 'layer2': …}`."""
    channels = [(pair.student[s].shape[-1], pair.teacher[t].shape[-1]) for s, t in pairs]
    return {f'layer{i}': make(jax.random.fold_in(key, i), *widths) for i, widths in enumerate(channels, start=1)}


def over_layers(
    params: Mapping[str, Any], pairs: Sequence[tuple[str, str]], compare: Callable[[Any, tuple[str, str]], Array]
) -> Array:
    """Σ compare(what a layer has learnt, {} where none learns; the names of its endpoints) over the layers of `each_layer`."""
    return sum(compare(params.get(f'layer{i}', {}), both) for i, both in enumerate(pairs, start=1))


def mean_of_example(x: Float[Array, 'batch *rest']) -> Float[Array, 'batch']:
    return jnp.mean(x, tuple(range(1, x.ndim)))


def at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def averaged(
    x: Float[Array, 'batch height width channels'], rows: int, columns: int
) -> Float[Array, 'batch rows columns channels']:
    """Means over rows × columns of a map's regions, which overlap where the sizes do not divide, as torch's adaptive pooling."""
    if x.shape[1:3] == (rows, columns):
        return x
    return jnp.einsum('ri,sj,bijc->brsc', _means(x.shape[1], rows), _means(x.shape[2], columns), x)


@functools.cache
def _means(size: int, bins: int) -> np.ndarray:
    weights = np.zeros((bins, size))
    for i in range(bins):
        first, end = i * size // bins, -(-(i + 1) * size // bins)
        weights[i, first:end] = 1 / (end - first)
    return weights


def require_maps(term: str, pair: Pair, pairs: Sequence[tuple[str, str]]) -> None:
    """Refuses endpoints that are not maps [B, H, W, C]."""
    for side, who, names in zip(
        (pair.student, pair.teacher), ('student', 'teacher'), zip(*pairs, strict=True), strict=True
    ):
        for name in names:
            if len(side[name].shape) != 4:
                shape = list(side[name].shape)
                raise UserError(
                    f"{FIELD}: {term} compares maps [B, H, W, C], and the {who}'s '{name}' is {shape}; name a map"
                )


def require_joinable(term: str, pair: Pair, pairs: Sequence[tuple[str, str]]) -> None:
    """Refuses two endpoints that neither positions nor a projection can bring together."""
    for names in pairs:
        s, t = pair.student[names[0]].shape, pair.teacher[names[1]].shape
        same_positions = len(s) == len(t) and (len(s) == 4 or s[1:-1] == t[1:-1])
        if not same_positions and {len(s), len(t)} != {2, 4}:
            raise UserError(
                f"{FIELD}: {term} cannot join the student's '{names[0]}' {list(s)} and the teacher's '{names[1]}' {list(t)}; "
                'maps go with maps or vectors, sequences with sequences of the same length'
            )


def require_same_channels(term: str, pair: Pair, pairs: Sequence[tuple[str, str]]) -> None:
    """Refuses endpoints whose channels cannot be compared one with one."""
    for names in pairs:
        s, t = pair.student[names[0]].shape[-1], pair.teacher[names[1]].shape[-1]
        if s != t:
            raise UserError(
                f"{FIELD}: {term} compares channel with channel, and the student's '{names[0]}' has {s}, the teacher's "
                f"'{names[1]}' {t}; name layers of one width, or use a term with a projection, such as hints"
            )
