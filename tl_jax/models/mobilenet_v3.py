"""MobileNetV3 (Howard et al. 2019, arXiv:1905.02244): inverted residuals, squeeze-and-excitation and hard swish.

Endpoints: `stem`, `block1`, `block2`, …, `final` [batch, height, width, channels], and `features` [batch, dense width]: the
mean over positions, through the dense layer that stands before the classifier. Modules: `stem/{conv,norm}`,
`block{i}/{expand,expand_norm,depthwise,depthwise_norm,se/{reduce,expand},project,project_norm}` (a block whose input is as
wide as its inside has no `expand`), `final/{conv,norm}`, `dense`. The paper's dropout stands before the classifier: it is
the head's.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.models.fields import check_fields
from tl_jax.models.mobilenet import ConvNorm, InvertedResidual, Style, scaled
from tl_jax.models.transformer import Dense

# Kernel, channels inside, output channels, squeeze-and-excitation, activation, stride: tables 1 and 2 of the paper.
LARGE = (
    (3, 16, 16, False, 'relu', 1),
    (3, 64, 24, False, 'relu', 2),
    (3, 72, 24, False, 'relu', 1),
    (5, 72, 40, True, 'relu', 2),
    (5, 120, 40, True, 'relu', 1),
    (5, 120, 40, True, 'relu', 1),
    (3, 240, 80, False, 'hard_swish', 2),
    (3, 200, 80, False, 'hard_swish', 1),
    (3, 184, 80, False, 'hard_swish', 1),
    (3, 184, 80, False, 'hard_swish', 1),
    (3, 480, 112, True, 'hard_swish', 1),
    (3, 672, 112, True, 'hard_swish', 1),
    (5, 672, 160, True, 'hard_swish', 2),
    (5, 960, 160, True, 'hard_swish', 1),
    (5, 960, 160, True, 'hard_swish', 1),
)
SMALL = (
    (3, 16, 16, True, 'relu', 2),
    (3, 72, 24, False, 'relu', 2),
    (3, 88, 24, False, 'relu', 1),
    (5, 96, 40, True, 'hard_swish', 2),
    (5, 240, 40, True, 'hard_swish', 1),
    (5, 240, 40, True, 'hard_swish', 1),
    (5, 120, 48, True, 'hard_swish', 1),
    (5, 144, 48, True, 'hard_swish', 1),
    (5, 288, 96, True, 'hard_swish', 2),
    (5, 576, 96, True, 'hard_swish', 1),
    (5, 576, 96, True, 'hard_swish', 1),
)


class MobileNetV3(nn.Module):
    """The network.

    Attributes:
      blocks: kernel, channels inside, output channels, squeeze-and-excitation or not, activation and stride of each.
      dense_width: of the layer before the classifier.
      width: multiplier of every channel count, each rounded to a multiple of 8 and by at most 10 % down.
      padding: 'torch', the same zeros on every side, or 'same', as TensorFlow places them.
      epsilon: of the batch norms: 1e-3 for TensorFlow's and torchvision's weights, 1e-5 for those that timm trained.
      momentum: share of the running statistics that a step keeps.
      dtype: of the computation.
    """

    blocks: Sequence[Sequence[Any]] = LARGE
    dense_width: int = 1280
    width: float = 1.0
    padding: Literal['torch', 'same'] = 'torch'
    epsilon: float = 1e-3
    momentum: float = 0.99
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, sizes=('dense_width',), factors=('width',))

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        style = Style('batch', self.padding, self.epsilon, self.momentum, self.dtype)
        x = ConvNorm(scaled(16, self.width), 3, 2, 'hard_swish', style, name='stem')(image, train)
        endpoints = {'stem': x}
        for i, (kernel_size, wide, channels, squeeze, activation, stride) in enumerate(self.blocks, start=1):
            wide = scaled(wide, self.width)
            block = InvertedResidual(
                scaled(channels, self.width),
                wide,
                stride,
                style,
                kernel_size,
                activation,
                squeeze=scaled(wide, 0.25) if squeeze else 0,
                gate='hard_sigmoid',
                name=f'block{i}',
            )
            x = endpoints[f'block{i}'] = block(x, train)
        x = endpoints['final'] = ConvNorm(6 * x.shape[-1], 1, 1, 'hard_swish', style, name='final')(x, train)
        x = jnp.mean(x, (1, 2), dtype=jnp.float32)
        x = nn.hard_swish(Dense(scaled(self.dense_width, self.width), dtype=self.dtype, name='dense')(x))
        return {**endpoints, 'features': x.astype(jnp.float32)}

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of the leaves, from input to output."""
        return ('stem/.*', *(f'block{i}/.*' for i in range(1, len(self.blocks) + 1)), 'final/.*', 'dense/.*')


MODELS = {
    'mobilenet_v3_large': MobileNetV3,
    'mobilenet_v3_small': functools.partial(MobileNetV3, blocks=SMALL, dense_width=1024),
}
