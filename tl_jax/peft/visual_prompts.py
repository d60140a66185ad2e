"""Visual prompt tuning: learned tokens among the patches of an image."""

import math

import jax
import jax.numpy as jnp

from tl_jax.errors import UserError
from tl_jax.models.vit import Block
from tl_jax.peft.base import Adapter, Call, Parts, Site
from tl_jax.peft.products import check_dropout

BLOCKS = r'backbone/block\d+'


def vpt(*, tokens: int = 10, deep: bool = True, dropout: float = 0.0, patch_size: int = 16) -> Adapter:
    """Visual prompt tuning (Jia et al. 2022, arXiv:2203.12119, sec. 3.2): P [tokens, width] beside class token and patches.

    shallow (eq. 4-5): [x₁, Z₁, E₁] = L₁([x₀, P, E₀]), then [xᵢ, Zᵢ, Eᵢ] = Lᵢ([xᵢ₋₁, Zᵢ₋₁, Eᵢ₋₁]);
    deep (eq. 7): [xᵢ, _, Eᵢ] = Lᵢ([xᵢ₋₁, Pᵢ₋₁, Eᵢ₋₁]), new prompts for each block.

    They stand before all other tokens: attention knows no order, and positions were added before. No endpoint has them.

    Args:
      tokens: how many, a block if deep.
      deep: whether every block has its own.
      dropout: of the prompts, in training.
      patch_size: pixels; the authors draw from U(±√(6 / (3 · patch_size² + width))).
    """
    if tokens < 1:
        raise UserError(f'config.model.peft.tokens: there must be at least 1 prompt, not {tokens}')
    check_dropout(dropout)

    def init(key, site: Site, weights) -> Parts:
        del weights
        if not isinstance(site.module, Block):
            raise UserError(
                "config.model.peft.name: 'vpt' is for vision transformers (vit, deit, dinov2, CLIP's image towers); texts take "
                "'prompt'"
            )
        width = site.inputs.shape[-1]
        bound = math.sqrt(6 / (3 * patch_size**2 + width))
        if not deep and site.place:
            return Parts({})
        return Parts({'prompt': jax.random.uniform(key, (tokens, width), minval=-bound, maxval=bound)})

    def call(parts: Parts, call: Call, site: Site):
        x = call.inputs
        if call.kwargs.get('mask') is not None:
            raise UserError("config.model.peft.name: 'vpt' is for images, and this network masks its tokens")
        if 'prompt' in parts.params:
            rows = jnp.broadcast_to(parts.params['prompt'].astype(x.dtype), (len(x), *parts.params['prompt'].shape))
            x = jnp.concatenate([call.drop(dropout, rows), x], 1)
        y = call.run(x)
        return y[:, tokens:] if deep or site.place == site.places - 1 else y

    def around(parts, run, inputs):
        endpoints = dict(run(inputs))
        for path in list(parts)[:-1]:
            name = path.rpartition('/')[2]
            endpoints[name] = endpoints[name][:, tokens:]
        return endpoints

    return Adapter(
        init,
        call,
        around=None if deep else around,
        kinds=('module',),
        targets=BLOCKS,
        identity=False,
        suits='vision transformers',
    )
