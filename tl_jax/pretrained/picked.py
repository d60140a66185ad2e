"""A shallow network out of some blocks of a deep one, as DistilBERT begins (Sanh et al. 2019, arXiv:1910.01108, sec. 3)."""

import re
from collections.abc import Iterable, Sequence

from tl_jax.errors import UserError

BLOCK = re.compile(r'(.*/backbone/block)(\d+)(/.*)')


def picked(paths: Iterable[str], pick: Sequence[int], source: str) -> dict[str, str | None]:
    """{leaf of the deep network: leaf of the shallow one}, None for those of blocks that it is without.

    Block `pick[0]` becomes `block1`, `pick[1]` `block2`, …; what stands in no block, embeddings and heads, stays where it is.

    Raises:
      UserError: a block is not there, or named twice.
    """
    paths = list(paths)
    there = sorted({int(found[2]) for path in paths if (found := BLOCK.fullmatch(path))})
    wrong = next((number for number in pick if number not in there), None)
    if wrong is not None:
        blocks = f'the blocks {", ".join(map(str, there))}' if there else 'no blocks'
        raise UserError(f'model.pick: {source} has {blocks}, and no {wrong!r}')
    if len(set(pick)) < len(pick):
        raise UserError(
            f'model.pick: names a block twice, {list(pick)}; a block of the source becomes one of the model'
        )
    place = {number: str(i) for i, number in enumerate(pick, start=1)}

    def ours(path: str) -> str | None:
        found = BLOCK.fullmatch(path)
        if not found:
            return path
        return found[1] + place[int(found[2])] + found[3] if int(found[2]) in place else None

    return {path: ours(path) for path in paths}
