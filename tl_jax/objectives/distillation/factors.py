"""Factor transfer: a paraphraser learns what the teacher's features say in fewer numbers, and the student says the same."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax, nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.objectives.distillation.base import Pair, Term
from tl_jax.objectives.distillation.layers import (
    FIELD,
    Layer,
    aligned,
    layer_pair,
    mean_of_example,
    reads,
    require_maps,
)
from tl_jax.objectives.distillation.projectors import conv, conv_init


def factor_transfer(*, layer: Layer, stage: Literal['paraphrase', 'transfer'], rate: float = 0.5) -> Term:
    """Paraphrasing complex networks: factor transfer (Kim, Park & Kwak 2018, arXiv:1802.04977, eq. 1 and 3).

    'paraphrase': the mean of (P(t) - t)², P = decoder(encoder(t)), to which the teacher alone is needed;
    'transfer': the mean of |unit(encoder(t)) - unit(translator(s))|, each factor divided by its length as one vector.

    Encoder, decoder and translator are three 3×3 convolutions with biases and leaky ReLUs of slope 0.1; a factor has `rate` of
    the teacher's channels. A stage of 'paraphrase' with `label_weight=0` and rules for `…/factor_transfer/(encoder|decoder)/.*`
    comes before one of 'transfer' with rules for the student and `…/factor_transfer/translator/.*`; in it no gradient enters
    the encoder. The weight 500 of 'transfer' is the authors' code's; RepDistiller's reading, 200 times the mean square of the
    lengths over channels, is another loss.

    Args:
      layer: a map [B, H, W, C], the last stage in the paper: 'stage3', or the pair of student's and teacher's.
      stage: which of the two losses this stage has.
      rate: k; 0.5 in the authors' code.
    """
    names = layer_pair(layer)
    if not 0 < rate <= 1:
        raise UserError(f'{FIELD}: factor_transfer.rate must lie in 0 … 1, above 0, not {rate}; 0.5 is the authors’')

    def init(key, pair: Pair):
        require_maps('factor_transfer', pair, [names])
        own, wide = pair.student[names[0]].shape[-1], pair.teacher[names[1]].shape[-1]
        factor = max(1, int(wide * rate))
        keys = jax.random.split(key, 3)
        widths = ((wide, wide, factor, factor), (factor, factor, wide, wide), (own, own, factor, factor))
        return {
            part: convs_init(k, *w)
            for part, k, w in zip(('encoder', 'decoder', 'translator'), keys, widths, strict=True)
        }

    def loss(params, state, pair, key):
        s, t = aligned(pair, names)
        factor = leaky_convs(params['encoder'], t)
        if stage == 'paraphrase':
            return mean_of_example(jnp.square(leaky_convs(params['decoder'], factor) - t)), state
        translated = leaky_convs(params['translator'], s)
        return jnp.mean(jnp.abs(flat_unit(lax.stop_gradient(factor)) - flat_unit(translated)), 1), state

    return Term(loss, weight=1.0 if stage == 'paraphrase' else 500.0, init=init, **reads([names]))


def convs_init(key: Array, *widths: int) -> dict:
    keys = jax.random.split(key, len(widths) - 1)
    steps = zip(keys, widths, widths[1:], strict=False)
    return {f'conv{i}': conv_init(k, a, b) for i, (k, a, b) in enumerate(steps, start=1)}


def leaky_convs(params, x: Float[Array, 'batch height width channels']) -> Array:
    for name in sorted(params):
        x = nn.leaky_relu(conv(params[name], x), 0.1)
    return x


def flat_unit(x: Array) -> Float[Array, 'batch rest']:
    """All numbers of an example as one vector of length 1."""
    x = x.reshape(len(x), -1)
    return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))
