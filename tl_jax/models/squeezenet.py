"""SqueezeNet 1.0 and 1.1 (Iandola et al. 2016, arXiv:1602.07360): a narrow 1×1 convolution feeds two wide ones.

Endpoints: `stem`, `fire2`, `fire3`, … [batch, height, width, channels], `features` [batch, channels], the mean over positions
of the last of them, and, where `classes` is given, `logits`. Modules: `stem`, `fire{i}/{squeeze,expand1,expand3}`, `conv10`.

The published classifier is a 1×1 convolution, ReLU, and only then the mean over positions. Because of that ReLU no linear
head on `features` equals it, so it is not the role `head` but the layer `conv10` of the backbone, which `classes` asks for:

    create_model('squeezenet1_1', classes=1000)     the published network; `logits` are its scores, never negative
    create_model('squeezenet1_1', num_classes=10)   for transfer: a fresh head on `features`, the file's is left aside
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.models.fields import check_fields, check_stages
from tl_jax.models.layers import Conv, max_pool


class SqueezeNet(nn.Module):
    """A stem and stages of fire modules, a max pool before each stage.

    Attributes:
      stage_sizes: fire modules in each stage.
      widths: filters of each fire module's 1×1 expansion, and as many of its 3×3 one.
      squeeze: a module has this many times fewer squeezing filters than 1×1 expanding ones.
      stem_width: channels of the stem.
      stem_size: side of the stem's kernel.
      classes: of `conv10`, the published classifier; None for none.
      dropout: before `conv10`.
      dtype: of the computation.
    """

    stage_sizes: Sequence[int] = (2, 2, 4)
    widths: Sequence[int] = (64, 64, 128, 128, 192, 192, 256, 256)
    squeeze: int = 4
    stem_width: int = 64
    stem_size: int = 3
    classes: int | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_stages(self.stage_sizes)
        check_fields(self, sizes=('widths', 'squeeze', 'stem_width', 'stem_size', 'classes'), rates=('dropout',))
        if len(self.widths) != sum(self.stage_sizes):
            raise UserError(
                f'model.widths: {len(self.widths)} widths for {sum(self.stage_sizes)} fire modules; '
                'give one for each of model.stage_sizes'
            )

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        conv = functools.partial(Conv, use_bias=True, dtype=self.dtype)
        x = nn.relu(conv(self.stem_width, self.stem_size, 2, name='stem')(image))
        endpoints = {'stem': x}
        widths = iter(self.widths)
        for size in self.stage_sizes:
            x = pool(x)
            for _ in range(size):
                width, name = next(widths), f'fire{len(endpoints) + 1}'
                x = Fire(width, max(1, width // self.squeeze), self.dtype, name=name)(x)
                endpoints[name] = x
        endpoints['features'] = jnp.mean(x, (1, 2), dtype=jnp.float32)
        if self.classes is None:
            return endpoints
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.relu(conv(self.classes, 1, name='conv10')(x))
        return {**endpoints, 'logits': jnp.mean(x, (1, 2), dtype=jnp.float32)}

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of the leaves, from the input to the output."""
        fires = [f'fire{i}/.*' for i in range(2, len(self.widths) + 2)]
        return ('stem/.*', *fires, *(['conv10/.*'] if self.classes else []))


class Fire(nn.Module):
    """Squeezes by 1×1 filters, then expands by 1×1 and by 3×3 ones side by side."""

    width: int
    squeezed: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = functools.partial(Conv, use_bias=True, dtype=self.dtype)
        x = nn.relu(conv(self.squeezed, 1, name='squeeze')(x))
        expanded = [conv(self.width, 1, name='expand1')(x), conv(self.width, 3, padding=1, name='expand3')(x)]
        return nn.relu(jnp.concatenate(expanded, -1))


def pool(x: Float[Array, 'batch height width channels']) -> Float[Array, 'batch rows columns channels']:
    """The maximum over windows of 3×3 and stride 2, of which the last may reach beyond the map, as in Caffe."""
    pads = [(0, (size + 1) % 2) for size in x.shape[1:3]]
    return max_pool(jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf), 3, 2)


MODELS = {
    'squeezenet1_0': functools.partial(SqueezeNet, stage_sizes=(3, 4, 1), stem_width=96, stem_size=7),
    'squeezenet1_1': SqueezeNet,
}
