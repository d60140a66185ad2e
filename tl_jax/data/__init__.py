"""Data: sources (random access to examples), transforms (host, per example), streams (batches), mixing (on
device).

Importing this package loads numpy and Pillow only; grain, jax, scikit-learn and TFDS come when first used.
"""

from tl_jax.data.base import Source, class_weights, num_classes
from tl_jax.data.images import open_files, read_image
from tl_jax.data.sources import open_source
from tl_jax.data.streams import Stream, eval_batches, iterate, train_stream
from tl_jax.data.transforms import list_transforms, make_transform, random_transforms

__all__ = [
    'Source',
    'Stream',
    'class_weights',
    'eval_batches',
    'iterate',
    'list_transforms',
    'make_transform',
    'num_classes',
    'open_files',
    'open_source',
    'random_transforms',
    'read_image',
    'train_stream',
]
