"""Random views of images on the device, for objectives that compare what a network says of two of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, PRNGKeyArray

from tl_jax.errors import UserError


def random_view(
    *, translation: float = 0.0, affine: float = 0.0, flip: bool = False, noise: float = 0.0, fill: float = 0.0
) -> Callable[[PRNGKeyArray, Float[Array, 'batch *shape']], Float[Array, 'batch *shape']]:
    """Returns `(key, images [B, H, W, C]) -> one random view of each`, after French et al. 2018 (arXiv:1706.05208, sec. 4.1).

    A view maps the place p of the image, in pixels from its centre, to A p + t, reads it bilinearly with `fill` around
    it, and adds noise:

      A = F + E, F = diag(1, ±1), E_ij ~ N(0, affine²);   t_i ~ U(-translation, translation);   noise ~ N(0, noise²)

    Args:
      translation: the largest shift along each axis, in pixels (2 in the paper).
      affine: standard deviation of the linear map's entries (0.1 in the paper).
      flip: whether half of the images are mirrored left to right.
      noise: standard deviation added to every value (0.1 in the paper); the only one that vectors [B, F] can have.
      fill: value outside the image; 0 in the paper, whose images are standardised.
    """
    for name, size in (('translation', translation), ('affine', affine), ('noise', noise)):
        if size < 0:
            raise UserError(f'view.{name}: must be at least 0, not {size}')
    moves = bool(translation or affine or flip)

    def view(key: PRNGKeyArray, image: Array) -> Array:
        matrix_key, offset_key, flip_key, noise_key = jax.random.split(key, 4)
        if moves:
            mirrored = jnp.where(flip & jax.random.bernoulli(flip_key), -1.0, 1.0)
            matrix = jnp.diag(jnp.array([1.0, mirrored])) + affine * jax.random.normal(matrix_key, (2, 2))
            offset = jax.random.uniform(offset_key, (2,), minval=-translation, maxval=translation)
            image = warp(image - fill, matrix, offset) + fill
        if noise:
            image = image + noise * jax.random.normal(noise_key, image.shape, image.dtype)
        return image

    def views(key: PRNGKeyArray, images: Array) -> Array:
        if moves and images.ndim != 4:
            raise UserError(
                f'view: only images can move, not inputs of shape {images.shape[1:]}; leave only noise in it'
            )
        return jax.vmap(view)(jax.random.split(key, len(images)), images)

    return views


def warp(
    image: Float[Array, 'height width channels'], matrix: Float[Array, '2 2'], offset: Float[Array, '2']
) -> Float[Array, 'height width channels']:
    """Moves what is at p to `matrix @ p + offset`: (row, column) in pixels from the centre; bilinear, zeros around it."""
    centre = (jnp.array(image.shape[:2]) - 1) / 2
    (a, b), (c, d) = matrix
    inverse = jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)
    there = jnp.stack(jnp.meshgrid(*map(jnp.arange, image.shape[:2]), indexing='ij'), -1)
    rows, columns = jnp.moveaxis((there - centre - offset) @ inverse.T + centre, -1, 0)
    read = lambda plane: map_coordinates(plane, [rows, columns], order=1, mode='constant')
    return jax.vmap(read, in_axes=-1, out_axes=-1)(image)
