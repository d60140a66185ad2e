"""Sharpness-aware minimisation: the gradient where the loss is worst nearby."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tl_jax import trees
from tl_jax.gradients.accumulated import in_parts
from tl_jax.gradients.base import Gradient, plain


def sam(*, rho: float = 0.05, adaptive: bool = False, eta: float = 0.01, parts: int = 1) -> Gradient:
    """SAM (Foret et al. 2020, arXiv:2010.01412, eq. 2 and 3) and ASAM (Kwon et al. 2021, arXiv:2102.11600, eq. 7).

    ε = ρ T² g / |T g|₂ with g = ∇L(θ), and the gradient is ∇L(θ + ε), ε held fixed. T is 1 for SAM; for ASAM it is
    |θ| + η, elementwise, and 1 for biases, as in the authors' code.

    Both passes see the same batch and the same random numbers; value, metrics and batch statistics are of the first. What is
    frozen is not perturbed. A step costs two.

    Args:
      rho: ρ, the radius; SAM's papers take 0.05, ASAM's 0.5 to 2.
      adaptive: whether the radius goes by the size of each weight (ASAM).
      eta: η, of ASAM.
      parts: into how many the batch is cut, each with an ε of its own (m-sharpness, sec. 4.1: parts = B / m); the
        gradient is their mean.
    """

    def transform(loss: Callable) -> Callable:
        compute = plain().transform(loss)

        def gradient(params, collections, batch, key):
            grads, value, aux = compute(params, collections, batch, key)
            scales = scales_of(params, eta) if adaptive else None
            worst = jax.tree.map(jnp.add, params, perturbation(grads, rho, scales))
            grads, _, _ = compute(worst, collections, batch, key)
            return grads, value, aux

        return gradient if parts == 1 else in_parts(gradient, parts)

    return Gradient(transform)


def perturbation(grads: trees.Tree, rho: float, scales: trees.Tree | None = None) -> trees.Tree:
    """ε = ρ T² g / |T g|₂ over all leaves together; T = 1 where there are no scales."""
    stretched = grads if scales is None else jax.tree.map(jnp.multiply, scales, grads)
    squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g.astype(jnp.float32))), stretched)
    size = jnp.sqrt(jnp.sum(jnp.stack(jax.tree.leaves(squares))))
    # Where nothing pulls, nothing is perturbed.
    factor = rho / jnp.maximum(size, 1e-12)
    epsilon = stretched if scales is None else jax.tree.map(jnp.multiply, scales, stretched)
    return jax.tree.map(lambda e: (factor * e).astype(e.dtype), epsilon)


def scales_of(params: trees.Tree, eta: float) -> trees.Tree:
    """T of ASAM: |θ| + η, and 1 for biases."""
    flat = trees.flatten(params)
    return trees.unflatten(
        {path: jnp.ones_like(p) if path.endswith('bias') else jnp.abs(p) + eta for path, p in flat.items()}
    )
