"""Two towers, of images and of texts: CLIP (Radford et al. 2021, arXiv:2103.00020) and SigLIP.

SigLIP is Zhai et al. 2023 (arXiv:2303.15343). `ImageTower` and `TextTower` are backbones of their own, for zero-shot
classification, LiT, or a classifier on top; `Clip` is both and the temperature, and compares each image with each text.

Texts: tokens int32 [batch, length], or `{'tokens', 'mask'}`, mask bool [batch, length], true for what may be seen; all
of it unless given, as both were trained. CLIP's vector is that of the end of text, wherever it stands; SigLIP's that
of the last position, so its texts are padded to `length`.

Endpoints of a tower: `embedding`, `block1`, … and `encoded` [batch, tokens, width] (CLIP's images have no `encoded`:
their final norm is of the pooled token), and `features` [batch, dim] float32, not of unit length. `Clip` has both
towers' by the prefixes `image_` and `text_`, where `image_features` and `text_features` are unit vectors,
`logits_per_image` [images, texts], and `features`, the image tower's.

Modules: `encoder` (a `VisionTransformer`) and `projection` of an image tower; `token`,
`block{i}/{norm1,attention,norm2,mlp}`, `norm`, `projection` and the parameter `position` of a text tower; `image`,
`text`, and the parameters `log_scale` and, of SigLIP, `bias` of both.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from tl_jax.errors import UserError, nearest
from tl_jax.models.bert import text_inputs
from tl_jax.models.fields import check_activation, check_fields, check_heads
from tl_jax.models.transformer import INIT, Dense, LayerNorm, outer_dtype
from tl_jax.models.vit import Block, VisionTransformer

Kind = Literal['clip', 'siglip']
ACTIVATION = {'clip': 'quick_gelu', 'siglip': 'gelu_tanh'}
EPSILON = {'clip': 1e-5, 'siglip': 1e-6}
START = {'clip': {'log_scale': math.log(1 / 0.07)}, 'siglip': {'log_scale': math.log(10), 'bias': -10.0}}


class ImageTower(nn.Module):
    """A vision transformer and a projection.

    Attributes:
      kind: 'clip' normalises the embeddings and has a class token, normalised at last; 'siglip' has attention pooling.
      width: of a token.
      depth: blocks.
      heads: of attention.
      patch_size: pixels, side of a patch.
      image_size: pixels, side or (height, width), for which there are position embeddings; others get them resized.
      antialias: of that, as `vit.resize_positions` has it: not in Hugging Face, yes in open_clip and timm.
      mlp_width: of the hidden layer; 4 · width unless given.
      activation: of the MLP, by `kind` unless given.
      epsilon: of the norms, by `kind` unless given.
      projection: width of the features; None for those of the transformer.
      dropout: of embeddings and branches.
      drop_path: rate at the last block; from 0 at the first it grows linearly.
      dtype: of the computation.
    """

    kind: Kind = 'clip'
    width: int = 768
    depth: int = 12
    heads: int = 12
    patch_size: int = 32
    image_size: int | tuple[int, int] = 224
    antialias: bool = False
    mlp_width: int | None = None
    activation: str | None = None
    epsilon: float | None = None
    projection: int | None = 512
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, sizes=('projection',))
        self.transformer(parent=None)  # which refuses bad fields

    def transformer(self, **options: Any) -> VisionTransformer:
        """The network before the projection."""
        if self.kind == 'clip':
            options |= dict(norm_pre=True, final_norm='after_pool', patch_bias=False)
        else:
            options |= dict(use_cls=False, pool='map')
        return VisionTransformer(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            patch_size=self.patch_size,
            image_size=self.image_size,
            antialias=self.antialias,
            mlp_width=self.mlp_width,
            activation=self.activation or ACTIVATION[self.kind],
            epsilon=self.epsilon or EPSILON[self.kind],
            dropout=self.dropout,
            drop_path=self.drop_path,
            dtype=self.dtype,
            **options,
        )

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths from input to output."""
        blocks = (f'encoder/block{i}/.*' for i in range(1, self.depth + 1))
        return r'encoder/((stem|embedding_norm)/.*|cls|position)', *blocks, '(encoder/(norm|pooler)|projection)/.*'

    @nn.compact
    def __call__(self, image: Float[Array, 'batch height width channels'], train: bool = False) -> dict[str, Array]:
        endpoints = self.transformer(name='encoder')(image, train)
        if self.projection is None:
            return endpoints
        features = Dense(self.projection, use_bias=False, dtype=self.dtype, name='projection')(endpoints['features'])
        return {**endpoints, 'features': features.astype(jnp.float32)}


class TextTower(nn.Module):
    """Pre-norm transformer blocks over tokens, one of them projected.

    Attributes:
      kind: 'clip' looks back only and takes the end of text; 'siglip' looks both ways, takes the last position, and its
        projection has a bias.
      vocabulary: number of ids.
      length: the most tokens that a text may have.
      width: of a token.
      depth: blocks.
      heads: of attention.
      mlp_width: of the hidden layer; 4 · width unless given.
      activation: of the MLP, by `kind` unless given.
      epsilon: of the norms, by `kind` unless given.
      projection: width of the features; None for those of the transformer.
      eot: of 'clip', the id that ends a text; None for the text's highest id, as which CLIP's own vocabulary has it.
      dropout: of embeddings and branches.
      dtype: of the computation.
    """

    kind: Kind = 'clip'
    vocabulary: int = 49408
    length: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_width: int | None = None
    activation: str | None = None
    epsilon: float | None = None
    projection: int | None = 512
    eot: int | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        sizes = ('vocabulary', 'length', 'width', 'depth', 'mlp_width', 'projection')
        check_fields(self, sizes=sizes, rates=('dropout',))
        check_heads(self.heads, self.width)
        if self.activation is not None:
            check_activation(self.activation)

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths from input to output."""
        blocks = (f'block{i}/.*' for i in range(1, self.depth + 1))
        return r'token/.*|position', *blocks, '(norm|projection)/.*'

    @nn.compact
    def __call__(
        self, inputs: Int[Array, 'batch length'] | Mapping[str, Array], train: bool = False
    ) -> dict[str, Array]:
        tokens, mask, _ = text_inputs(inputs, pad_id=-1, length=self.length)
        mask, epsilon = mask[:, None, None, :], self.epsilon or EPSILON[self.kind]
        if self.kind == 'clip':
            mask = mask & jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        position = self.param('position', nn.initializers.normal(0.01), (self.length, self.width), jnp.float32)
        x = nn.Embed(self.vocabulary, self.width, embedding_init=INIT, name='token')(tokens)
        x = (x + position[: tokens.shape[1]]).astype(outer_dtype(self.dtype))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        endpoints = {'embedding': x}
        for i in range(1, self.depth + 1):
            x = endpoints[f'block{i}'] = Block(
                heads=self.heads,
                mlp_width=self.mlp_width or 4 * self.width,
                gated=False,
                activation=self.activation or ACTIVATION[self.kind],
                qkv_bias=True,
                epsilon=epsilon,
                layer_scale=None,
                dropout=self.dropout,
                drop_path=0.0,
                dtype=self.dtype,
                name=f'block{i}',
            )(x, train, mask)
        x = endpoints['encoded'] = LayerNorm(epsilon, dtype=self.dtype, name='norm')(x)
        features = self._pooled(x, tokens)
        if self.projection is not None:
            features = Dense(self.projection, self.kind == 'siglip', self.dtype, name='projection')(features)
        return {**endpoints, 'features': features.astype(jnp.float32)}

    def _pooled(self, x: Float[Array, 'batch length width'], tokens: Int[Array, 'batch length']) -> Array:
        if self.kind == 'siglip':
            return x[:, -1]
        place = jnp.argmax(tokens if self.eot is None else tokens == self.eot, 1)
        return jnp.take_along_axis(x, place[:, None, None], 1)[:, 0]


class Clip(nn.Module):
    """Both towers: inputs are `{'image', 'tokens'}`, perhaps with 'mask'; after `init` either may be left out.

    Attributes:
      kind: as the towers have it.
      projection: width of both towers' features; SigLIP's images are not projected, so there it is `image_width`.
      image_width, image_depth, image_heads, image_mlp_width, patch_size, image_size, antialias: of `ImageTower`.
      text_width, text_depth, text_heads, text_mlp_width, vocabulary, length, eot: of `TextTower`.
      activation, epsilon, dropout, dtype: of both.
      drop_path: of the image tower.
    """

    kind: Kind = 'clip'
    projection: int = 512
    image_width: int = 768
    image_depth: int = 12
    image_heads: int = 12
    image_mlp_width: int | None = None
    patch_size: int = 32
    image_size: int | tuple[int, int] = 224
    antialias: bool = False
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    text_mlp_width: int | None = None
    vocabulary: int = 49408
    length: int = 77
    eot: int | None = None
    activation: str | None = None
    epsilon: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if self.kind == 'siglip' and self.projection != self.image_width:
            raise UserError(
                f'model.projection: {self.projection}, and images of SigLIP have the width {self.image_width}; make '
                'model.projection and model.image_width equal'
            )
        for which in ('image', 'text'):
            self.tower(which, parent=None)  # which refuses bad fields

    def tower(self, which: Literal['image', 'text'], **options: Any) -> ImageTower | TextTower:
        """One of the towers."""
        shared = ('kind', 'activation', 'epsilon', 'dropout', 'dtype')
        own = {name: getattr(self, f'{which}_{name}') for name in ('width', 'depth', 'heads', 'mlp_width')}
        projection = self.projection
        if which == 'image':
            shared += ('patch_size', 'image_size', 'antialias', 'drop_path')
            projection = None if self.kind == 'siglip' else projection
        else:
            shared += ('vocabulary', 'length', 'eot')
        own |= {name: getattr(self, name) for name in shared}
        return (ImageTower if which == 'image' else TextTower)(projection=projection, **own, **options)

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths from input to output; layers as far from the output in either tower are one."""
        towers = [
            [f'{which}/({layer})' for layer in reversed(self.tower(which, parent=None).layer_order)]
            for which in ('image', 'text')
        ]
        layers = ['|'.join(filter(None, pair)) for pair in itertools.zip_longest(*towers)]
        return (*reversed(layers), 'log_scale|bias')

    @nn.compact
    def __call__(self, inputs: Mapping[str, Array], train: bool = False) -> dict[str, Array]:
        inputs = self._checked(inputs)
        endpoints, units = {}, {}
        temperature = {name: self.param(name, nn.initializers.constant(v), ()) for name, v in START[self.kind].items()}
        if 'image' in inputs:
            image = self.tower('image', name='image')(inputs.pop('image'), train)
            units['image'] = unit(image['features'])
            endpoints |= {f'image_{name}': x for name, x in image.items()} | {'features': image['features']}
        if inputs:
            text = self.tower('text', name='text')(inputs, train)
            units['text'] = unit(text['features'])
            endpoints |= {f'text_{name}': x for name, x in text.items()}
        endpoints |= {f'{which}_features': x for which, x in units.items()}
        if len(units) == 2:
            # By default an accelerator would round the operands, and a scale of 100 multiplies that error.
            cosine = jnp.matmul(units['image'], units['text'].T, precision='highest')
            logits = jnp.exp(temperature['log_scale']) * cosine + temperature.get('bias', 0.0)
            endpoints['logits_per_image'] = logits
        return endpoints

    def _checked(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs by name.

        Raises:
          UserError: one is unknown, has another shape, or is missing.
        """
        if not isinstance(inputs, Mapping):
            raise UserError("inputs: two towers need them by name: {'image': …, 'tokens': …}")
        for name in inputs:
            if name not in ('image', 'tokens', 'mask'):
                raise UserError(f'inputs: two towers take no {name!r}; {nearest(name, ("image", "tokens", "mask"))}')
        missing = [name for name in ('image', 'tokens') if name not in inputs]
        if len(missing) == 2 or (missing and self.is_initializing()):
            when = 'init needs both towers' if self.is_initializing() else 'give it'
            raise UserError(f'inputs: there is no {missing[0]!r}; {when}')
        if 'mask' in inputs and 'tokens' in missing:
            raise UserError("inputs: 'mask' is of 'tokens', and there are none; leave it out")
        if 'image' in inputs and jnp.ndim(inputs['image']) != 4:
            shape = list(jnp.shape(inputs['image']))
            raise UserError(f'inputs: an image is [batch, height, width, channels], not {shape}')
        return dict(inputs)


def unit(x: Float[Array, 'batch dim']) -> Float[Array, 'batch dim']:
    """Rows of length 1."""
    # The floor stands under the root: the gradient at zero is then zero, not NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


_TEXT = {  # width, depth, heads, and what differs from the defaults
    'clip_base': dict(width=512, depth=12, heads=8),
    'clip_large': dict(width=768, depth=12, heads=12, projection=768),
    'siglip_base': dict(width=768, depth=12, heads=12, projection=768),
    'siglip_large': dict(width=1024, depth=24, heads=16, projection=1024),
    'siglip_so400m': dict(width=1152, depth=27, heads=16, projection=1152, mlp_width=4304),
}
_IMAGE = {
    'clip_base': dict(width=768, depth=12, heads=12),
    'clip_large': dict(width=1024, depth=24, heads=16, projection=768),
    'siglip_base': dict(width=768, depth=12, heads=12),
    'siglip_large': dict(width=1024, depth=24, heads=16),
    'siglip_so400m': dict(width=1152, depth=27, heads=16, mlp_width=4304),
}
_PATCHES = {
    'clip_base': ((16, 224), (32, 224)),
    'clip_large': ((14, 224),),
    'siglip_base': ((16, 224),),
    'siglip_large': ((16, 256),),
    'siglip_so400m': ((14, 384),),
}
_SIGLIP = dict(kind='siglip', vocabulary=32000, length=64)


def _towers(name: str) -> dict[str, Any]:
    """The models of one size, such as 'clip_base': its text tower, and image towers and pairs by size of the patch."""
    kind, _, size = name.partition('_')
    text, image = (_SIGLIP if kind == 'siglip' else {}) | _TEXT[name], _IMAGE[name] | dict(kind=kind)
    if kind == 'siglip':
        image['projection'] = None
    models = {f'{kind}_text_{size}': functools.partial(TextTower, **text)}
    for patch_size, image_size in _PATCHES[name]:
        pixels = dict(patch_size=patch_size, image_size=image_size)
        models[f'{kind}_vision_{size}_patch{patch_size}'] = functools.partial(ImageTower, **image, **pixels)
        sizes = ('width', 'depth', 'heads', 'mlp_width')
        both = {f'{which}_{s}': own[s] for which, own in (('image', image), ('text', text)) for s in sizes if s in own}
        both |= {k: v for k, v in text.items() if k not in sizes}
        models[f'{kind}_{size}_patch{patch_size}'] = functools.partial(Clip, **both, **pixels)
    return models


MODELS = {name: model for size in _TEXT for name, model in _towers(size).items()}
