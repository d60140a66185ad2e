"""Inception v3 (Szegedy et al. 2016, arXiv:1512.00567), as torchvision has it; without the auxiliary head.

Endpoints, by the names of TensorFlow's slim in lower case: `conv2d_1a_3x3`, `conv2d_2a_3x3`, `conv2d_2b_3x3`,
`conv2d_3b_1x1`, `conv2d_4a_3x3`, `mixed_5b` … `mixed_7c` [batch, height, width, channels], and `features` [batch, channels],
the mean over positions of the last. Modules: `conv2d_…/{conv,norm}`, `mixed_…/branch…/{conv,norm}`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.models.fields import check_fields
from tl_jax.models.layers import BatchNorm, Conv, avg_pool, max_pool

MIN_SIZE = 75  # pixels: below, the last maps have no positions left


class Filters(NamedTuple):
    """One layer: `width` filters of `size`; with stride 1 zeros keep the map's size, with stride 2 there are none."""

    name: str
    width: int
    size: int | tuple[int, int]
    stride: int = 1


class Side(NamedTuple):
    """Layers side by side within a branch, each on the same input."""

    layers: tuple[Filters, ...]


class Mean(NamedTuple):
    """Means over 3×3 with stride 1, the zeros around the map counting as values."""


class Max(NamedTuple):
    """Maxima over 3×3 with stride 2."""


# A branch is a chain of steps; a block is its branches, whose channels are joined.
Branch = tuple[Filters | Side | Mean | Max, ...]


def block_a(pooled: int) -> tuple[Branch, ...]:
    """Figure 5 of the paper."""
    return (
        (Filters('branch1x1', 64, 1),),
        (Filters('branch5x5_1', 48, 1), Filters('branch5x5_2', 64, 5)),
        (Filters('branch3x3dbl_1', 64, 1), Filters('branch3x3dbl_2', 96, 3), Filters('branch3x3dbl_3', 96, 3)),
        (Mean(), Filters('branch_pool', pooled, 1)),
    )


def block_b() -> tuple[Branch, ...]:
    """To the 17×17 maps, as figure 10."""
    return (
        (Filters('branch3x3', 384, 3, 2),),
        (Filters('branch3x3dbl_1', 64, 1), Filters('branch3x3dbl_2', 96, 3), Filters('branch3x3dbl_3', 96, 3, 2)),
        (Max(),),
    )


def block_c(width: int) -> tuple[Branch, ...]:
    """Figure 6, n = 7."""
    row, column = (1, 7), (7, 1)
    return (
        (Filters('branch1x1', 192, 1),),
        (Filters('branch7x7_1', width, 1), Filters('branch7x7_2', width, row), Filters('branch7x7_3', 192, column)),
        (
            Filters('branch7x7dbl_1', width, 1),
            Filters('branch7x7dbl_2', width, column),
            Filters('branch7x7dbl_3', width, row),
            Filters('branch7x7dbl_4', width, column),
            Filters('branch7x7dbl_5', 192, row),
        ),
        (Mean(), Filters('branch_pool', 192, 1)),
    )


def block_d() -> tuple[Branch, ...]:
    """To the 8×8 maps, as figure 10."""
    return (
        (Filters('branch3x3_1', 192, 1), Filters('branch3x3_2', 320, 3, 2)),
        (
            Filters('branch7x7x3_1', 192, 1),
            Filters('branch7x7x3_2', 192, (1, 7)),
            Filters('branch7x7x3_3', 192, (7, 1)),
            Filters('branch7x7x3_4', 192, 3, 2),
        ),
        (Max(),),
    )


def block_e() -> tuple[Branch, ...]:
    """Figure 7."""
    return (
        (Filters('branch1x1', 320, 1),),
        (
            Filters('branch3x3_1', 384, 1),
            Side((Filters('branch3x3_2a', 384, (1, 3)), Filters('branch3x3_2b', 384, (3, 1)))),
        ),
        (
            Filters('branch3x3dbl_1', 448, 1),
            Filters('branch3x3dbl_2', 384, 3),
            Side((Filters('branch3x3dbl_3a', 384, (1, 3)), Filters('branch3x3dbl_3b', 384, (3, 1)))),
        ),
        (Mean(), Filters('branch_pool', 192, 1)),
    )


STEM = ('conv2d_1a_3x3', 'conv2d_2a_3x3', 'conv2d_2b_3x3', 'conv2d_3b_1x1', 'conv2d_4a_3x3')
BLOCKS = {
    'mixed_5b': block_a(32),
    'mixed_5c': block_a(64),
    'mixed_5d': block_a(64),
    'mixed_6a': block_b(),
    'mixed_6b': block_c(128),
    'mixed_6c': block_c(160),
    'mixed_6d': block_c(160),
    'mixed_6e': block_c(192),
    'mixed_7a': block_d(),
    'mixed_7b': block_e(),
    'mixed_7c': block_e(),
}


class InceptionV3(nn.Module):
    """The network; made for images of 299 pixels, at least 75 needed.

    Attributes:
      width: multiplier of every layer's filters.
      transform_input: takes images normalised by ImageNet's mean and deviation, and turns them into (x − 0.5) / 0.5, as
        torchvision's weights want them. Without it, normalise so yourself.
      dtype: of the computation.
    """

    width: float = 1.0
    transform_input: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, factors=('width',))

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        if min(image.shape[1:3]) < MIN_SIZE:
            raise UserError(
                f'model: images of {image.shape[1]} × {image.shape[2]}; Inception v3 needs at least {MIN_SIZE} a side'
            )
        if self.transform_input and image.shape[-1] != 3:
            raise UserError(
                f'model.transform_input: is of 3 colours, and the images have {image.shape[-1]} channels; leave it out'
            )
        x = _renormalised(image) if self.transform_input else image
        endpoints = {}
        for name, width, size, stride, padding in (
            (STEM[0], 32, 3, 2, 0),
            (STEM[1], 32, 3, 1, 0),
            (STEM[2], 64, 3, 1, 1),
            (STEM[3], 80, 1, 1, 0),
            (STEM[4], 192, 3, 1, 0),
        ):
            x = Layer(self._scaled(width), size, stride, padding, self.dtype, name=name)(x, train)
            endpoints[name] = x
            if name in (STEM[2], STEM[4]):
                x = max_pool(x, 3, 2)
        for name, branches in BLOCKS.items():
            x = endpoints[name] = Mixed(self._with_widths(branches), self.dtype, name=name)(x, train)
        return {**endpoints, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of the leaves, from the input to the output."""
        return tuple(f'{name}/.*' for name in (*STEM, *BLOCKS))

    def _scaled(self, width: int) -> int:
        return max(1, round(self.width * width))

    def _with_widths(self, steps):
        """Branches, or steps, with their filters scaled."""
        if isinstance(steps, Filters):
            return steps._replace(width=self._scaled(steps.width))
        if isinstance(steps, Side):
            return Side(self._with_widths(steps.layers))
        return tuple(map(self._with_widths, steps)) if type(steps) is tuple else steps


class Layer(nn.Module):
    """A convolution, normalised with epsilon 0.001, and rectified."""

    width: int
    size: int | tuple[int, int]
    stride: int
    padding: int | str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = Conv(self.width, self.size, self.stride, self.padding, dtype=self.dtype, name='conv')(x)
        return nn.relu(BatchNorm(epsilon=1e-3, dtype=self.dtype, name='norm')(x, train))


class Mixed(nn.Module):
    """Branches side by side, their channels joined."""

    branches: tuple[Branch, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def layer(step: Filters, x: Array) -> Array:
            padding = 'same' if step.stride == 1 else 'valid'
            return Layer(step.width, step.size, step.stride, padding, self.dtype, name=step.name)(x, train)

        def after(step: Filters | Side | Mean | Max, x: Array) -> Array:
            match step:
                case Filters():
                    return layer(step, x)
                case Side(layers):
                    return jnp.concatenate([layer(each, x) for each in layers], -1)
                case Mean():
                    return avg_pool(x, 3, 1, padding=1)
                case Max():
                    return max_pool(x, 3, 2)

        joined = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = after(step, y)
            joined.append(y)
        return jnp.concatenate(joined, -1)


def _renormalised(image: Array) -> Array:
    """From (x − ImageNet's mean) / ImageNet's deviation to (x − 0.5) / 0.5."""
    mean, std = jnp.asarray((0.485, 0.456, 0.406)), jnp.asarray((0.229, 0.224, 0.225))
    return image * (std / 0.5) + (mean - 0.5) / 0.5


MODELS = {'inception_v3': InceptionV3}
