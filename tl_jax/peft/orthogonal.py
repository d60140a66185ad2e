"""Orthogonal fine-tuning: the neurons of a layer turned together."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.peft.base import Adapter, Call, Parts, Site
from tl_jax.peft.products import check_dropout, groups_of, matrix_shape, summed_axes


def oft(*, block: int = 4, dropout: float = 0.0, targets: str | None = None) -> Adapter:
    """OFT (Qiu et al. 2023, arXiv:2306.07280, sec. 3.3): y = x (R W), R orthogonal and block-diagonal.

    Each block is R = (I + Q)(I − Q)⁻¹ of a skew-symmetric Q (Cayley), so that angles between neurons stay. The inputs are
    turned, not the kernel: y = (x R) W. Of a convolution R turns channels, the same way at every position of the kernel.
    Learns `oft_skew` [blocks, block (block − 1) / 2], the entries of Q above its diagonal, 0 at first.

    Args:
      block: size of a block; divides the layer's inputs.
      dropout: share of the blocks' entries of Q that training takes for 0, each on its own.
      targets: regex of module paths; the family's own unless given.
    """
    check_dropout(dropout)

    def init(key, site: Site, weights) -> Parts:
        del key, weights
        size = _turned(site)
        if block < 2 or size % block:
            raise UserError(f"config.model.peft.block: {block} does not divide the {size} inputs of '{site.path}'")
        return Parts({'oft_skew': jnp.zeros((size // block, block * (block - 1) // 2))})

    def call(parts: Parts, call: Call, site: Site):
        x, rotation = call.inputs, cayley(call.drop(dropout, parts.params['oft_skew']), block)
        inner = x.reshape(*x.shape[: x.ndim - summed_axes(site)], -1, block)
        turned = jnp.einsum('...ni,nij->...nj', inner, rotation.astype(x.dtype))
        return call.run(turned.reshape(x.shape))

    def turn(rotation: Array, weights, site: Site):
        kernel = weights['kernel']
        rows = kernel.reshape(-1, rotation.shape[0], block, matrix_shape(site)[1])
        turned = jnp.einsum('nij,tnjo->tnio', rotation, rows.astype(jnp.float32))
        return {**weights, 'kernel': turned.reshape(kernel.shape).astype(kernel.dtype)}

    def merge(parts: Parts, weights, site: Site):
        return turn(cayley(parts.params['oft_skew'], block), weights, site)

    def unmerge(parts: Parts, weights, site: Site):
        return turn(jnp.swapaxes(cayley(parts.params['oft_skew'], block), 1, 2), weights, site)

    return Adapter(init, call, merge, unmerge, kinds=('dense', 'conv'), targets=targets)


def cayley(above: Float[Array, 'blocks entries'], size: int) -> Float[Array, 'blocks size size']:
    """(I + Q)(I − Q)⁻¹ of the skew-symmetric Q with these entries above its diagonal, row by row."""
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((above.shape[0], size, size)).at[:, rows, columns].set(above)
    skew = upper - jnp.swapaxes(upper, 1, 2)
    eye = jnp.eye(size)
    return jnp.linalg.solve(eye - skew, eye + skew)  # the two factors commute


def _turned(site: Site) -> int:
    """How many inputs there are to turn."""
    if groups_of(site) > 1:
        raise UserError(
            f"config.model.peft: '{site.path}' is a convolution in groups, which oft does not know; use lora"
        )
    return site.inputs.shape[-1] if site.kind == 'conv' else matrix_shape(site)[0]
