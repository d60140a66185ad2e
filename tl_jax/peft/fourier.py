"""FourierFT: a change of the weights with few frequencies."""

import jax
import jax.numpy as jnp

from tl_jax.errors import UserError
from tl_jax.peft.base import Adapter, Parts, Site
from tl_jax.peft.products import LAYERS, added, matrix_shape


def fourierft(*, frequencies: int = 1000, alpha: float = 300.0, seed: int = 0, targets: str | None = None) -> Adapter:
    """FourierFT (Gao et al. 2024, arXiv:2405.03003, eq. 2-4): ΔW = α Re(F⁻¹(c at fixed random places, 0 elsewhere)).

    F⁻¹ is the discrete inverse transform of both axes, with its factor 1 / (rows · columns). Learns `spectrum` [n], 0 at
    first, where the paper draws it. The product with ΔW is no cheaper in parts, so the network runs on W + ΔW, and a
    gradient of W's size is formed.

    Args:
      frequencies: n, the coefficients of each layer.
      alpha: α.
      seed: of the places, which layers of one shape share.
      targets: regex of module paths; the family's own unless given.
    """

    def init(key, site: Site, weights) -> Parts:
        del key, weights
        rows, columns = matrix_shape(site)
        if not 1 <= frequencies <= rows * columns:
            raise UserError(
                f"config.model.peft.frequencies: {frequencies} is not within 1 … {rows * columns}, the entries of '{site.path}'"
            )
        places = jax.random.choice(jax.random.key(seed), rows * columns, (frequencies,), replace=False)
        return Parts({'spectrum': jnp.zeros(frequencies)}, {'places': places.astype(jnp.int32)})

    def delta(parts: Parts, site: Site):
        rows, columns = matrix_shape(site)
        flat = jnp.zeros(rows * columns).at[parts.constants['places']].set(parts.params['spectrum'])
        return alpha * jnp.fft.ifft2(flat.reshape(rows, columns)).real

    def merge(parts: Parts, weights, site: Site):
        return added(weights, delta(parts, site), site)

    def unmerge(parts: Parts, weights, site: Site):
        return added(weights, -delta(parts, site), site)

    return Adapter(init, None, merge, unmerge, kinds=LAYERS, targets=targets)
