"""Sparse tables of features: svmlight (libsvm) files, also within a tar archive."""

import io

import numpy as np

from tl_jax.data.arrays import array_source
from tl_jax.data.base import MAX_BYTES, Source, check_size
from tl_jax.data.text import read_bytes
from tl_jax.errors import UserError


def open_svmlight(
    path: str, *, features: int | None = None, zero_based: bool = True, max_bytes: int = MAX_BYTES
) -> Source:
    """`svmlight:FILE`, gzipped or not, or `svmlight:ARCHIVE.tar[.gz|.xz|.bz2]/MEMBER`, which is read without unpacking it.

    An example is `inputs` float32 [F] and its label: 0, 1, …, or −1 and 1, which become 0 and 1.

    Args:
      path: of the file, or of the archive and the file within it.
      features: F; the largest index in the file decides it unless given. Files of one table want the same.
      zero_based: whether the file counts features from 0.
      max_bytes: of the file, and of memory that the dense table may take.
    """
    from sklearn.datasets import load_svmlight_file

    name = f'svmlight:{path}'
    content = read_bytes(path, max_bytes)
    try:
        table, labels = load_svmlight_file(io.BytesIO(content), n_features=features, zero_based=zero_based)
    except (ValueError, OverflowError) as error:
        raise UserError(f'{name}: not an svmlight file ({error}); lines read LABEL INDEX:VALUE …') from None
    if not table.shape[0]:
        raise UserError(f'{name}: has no examples')
    check_size(table.shape[0] * table.shape[1] * 4, name, max_bytes)
    if set(np.unique(labels)) == {-1.0, 1.0}:
        labels = (labels + 1) / 2
    return array_source(name, table.toarray().astype(np.float32), labels)
