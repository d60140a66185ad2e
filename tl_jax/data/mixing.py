"""Mixtures of the examples of a batch, on the device: pure functions of a key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def mixup(
    key: PRNGKeyArray,
    image: Float[Array, 'batch height width channel'],
    target: Float[Array, 'batch classes'],
    alpha: float,
) -> tuple[Float[Array, 'batch height width channel'], Float[Array, 'batch classes']]:
    """mixup (Zhang et al. 2018, arXiv:1710.09412, eq. 1), as the authors' code: one λ ~ Beta(α, α) a batch.

    image = λ image + (1 - λ) image[pair], target likewise; `pair` is a random permutation. α = 0 changes
    nothing.
    """
    if alpha == 0:
        return image, target
    ratio_key, pair_key = jax.random.split(key)
    ratio = jax.random.beta(ratio_key, alpha, alpha)
    pair = jax.random.permutation(pair_key, len(image))
    return _blend(ratio, image, image[pair]), _blend(ratio, target, target[pair])


def cutmix(
    key: PRNGKeyArray,
    image: Float[Array, 'batch height width channel'],
    target: Float[Array, 'batch classes'],
    alpha: float,
) -> tuple[Float[Array, 'batch height width channel'], Float[Array, 'batch classes']]:
    """CutMix (Yun et al. 2019, arXiv:1905.04899, sec. 3.1), as the authors' code: one box a batch.

    A box of area share 1 - λ, λ ~ Beta(α, α), around a uniformly drawn centre is pasted from a random
    partner. The target weighs the partner by the share of pixels that the box covers once clipped at the
    border. α = 0 changes nothing.
    """
    if alpha == 0:
        return image, target
    ratio_key, box_key, pair_key = jax.random.split(key, 3)
    inside = _box(box_key, image.shape[1:3], jax.random.beta(ratio_key, alpha, alpha))
    pair = jax.random.permutation(pair_key, len(image))
    mixed = jnp.where(inside[None, :, :, None], image[pair], image)
    return mixed, _blend(1 - inside.mean(dtype=target.dtype), target, target[pair])


def _blend(ratio: Float[Array, ''], first: Array, second: Array) -> Array:
    ratio = ratio.astype(first.dtype)
    return ratio * first + (1 - ratio) * second


def _box(key: PRNGKeyArray, size: tuple[int, int], ratio: Float[Array, '']) -> Array:
    """Mask bool [height, width] of a box of area share 1 - ratio and of the image's shape, clipped at the
    border."""
    masks = []
    for axis_key, length in zip(jax.random.split(key), size, strict=True):
        half = jnp.floor(length * jnp.sqrt(1 - ratio)).astype(int) // 2
        centre = jax.random.randint(axis_key, (), 0, length)
        place = jnp.arange(length)
        masks.append((place >= centre - half) & (place < centre + half))
    return masks[0][:, None] & masks[1][None, :]
