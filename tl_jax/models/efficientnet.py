"""EfficientNet (Tan & Le 2019, arXiv:1905.11946): inverted residuals whose width and depth grow together.

Endpoints: `stem`, `stage1` … `stage7`, `final` [batch, height, width, channels], and `features` [batch, channels], the mean
over positions of the last. Modules: `stem/{conv,norm}`,
`stage{i}/block{j}/{expand,expand_norm,depthwise,depthwise_norm,se/{reduce,expand},project,project_norm}` (the blocks of the
first stage have no `expand`), `final/{conv,norm}`. The paper's dropout stands before the classifier: it is the head's.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.models.fields import check_fields
from tl_jax.models.mobilenet import ConvNorm, InvertedResidual, Style, scaled

# Expansion, kernel, stride of the first, output channels, blocks: table 1 of the paper.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
# Multipliers of width and depth.
SIZES = {
    'b0': (1.0, 1.0),
    'b1': (1.0, 1.1),
    'b2': (1.1, 1.2),
    'b3': (1.2, 1.4),
    'b4': (1.4, 1.8),
    'b5': (1.6, 2.2),
    'b6': (1.8, 2.6),
    'b7': (2.0, 3.1),
}


class EfficientNet(nn.Module):
    """The network.

    Attributes:
      width: multiplier of every channel count, each rounded to a multiple of 8 and by at most 10 % down.
      depth: multiplier of the blocks of each stage, rounded up.
      stages: expansion, kernel, stride of the first block, output channels and blocks of each, before multiplication.
      padding: 'torch', the same zeros on every side, or 'same', as TensorFlow places them (timm's `tf_…`).
      epsilon: of the batch norms: 1e-3 in TensorFlow, and in torchvision from b5 on.
      momentum: share of the running statistics that a step keeps.
      drop_path: probability that training leaves an example's input to the last block as it is; rises from 0 block by block.
      dtype: of the computation.
    """

    width: float = 1.0
    depth: float = 1.0
    stages: Sequence[Sequence[int]] = STAGES
    padding: Literal['torch', 'same'] = 'torch'
    epsilon: float = 1e-5
    momentum: float = 0.9
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, factors=('width', 'depth'), rates=('drop_path',))

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        style = Style('batch', self.padding, self.epsilon, self.momentum, self.dtype)
        x = ConvNorm(scaled(32, self.width), 3, 2, 'silu', style, name='stem')(image, train)
        endpoints, sizes, done = {'stem': x}, self._sizes(), 0
        for i, (expansion, kernel_size, stride, channels, _) in enumerate(self.stages, start=1):
            rates = tuple(self.drop_path * (done + j) / sum(sizes) for j in range(sizes[i - 1]))
            stage = Stage(expansion, kernel_size, stride, scaled(channels, self.width), rates, style, name=f'stage{i}')
            x = endpoints[f'stage{i}'] = stage(x, train)
            done += len(rates)
        x = ConvNorm(scaled(1280, self.width), 1, 1, 'silu', style, name='final')(x, train)
        return {**endpoints, 'final': x, 'features': jnp.mean(x, (1, 2), dtype=jnp.float32)}

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of the leaves, from input to output."""
        blocks = (f'stage{i}/block{j}/.*' for i, n in enumerate(self._sizes(), start=1) for j in range(1, n + 1))
        return ('stem/.*', *blocks, 'final/.*')

    def _sizes(self) -> list[int]:
        """Blocks of each stage."""
        return [math.ceil(size * self.depth) for *_, size in self.stages]


class Stage(nn.Module):
    """Inverted residuals, the first of them with the stride; one for each of `drop_path`."""

    expansion: int
    kernel_size: int
    stride: int
    features: int
    drop_path: tuple[float, ...]
    style: Style

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for j, rate in enumerate(self.drop_path, start=1):
            block = InvertedResidual(
                self.features,
                self.expansion * x.shape[-1],
                self.stride if j == 1 else 1,
                self.style,
                self.kernel_size,
                'silu',
                squeeze=x.shape[-1] // 4,
                squeeze_activation='silu',
                drop_path=rate,
                name=f'block{j}',
            )
            x = block(x, train)
        return x


# torchvision's figures for the batch norms of its larger networks, which are TensorFlow's weights.
_TENSORFLOW = dict(epsilon=1e-3, momentum=0.99)
MODELS = {
    f'efficientnet_{size}': functools.partial(
        EfficientNet, width=width, depth=depth, **(_TENSORFLOW if size >= 'b5' else {})
    )
    for size, (width, depth) in SIZES.items()
}
