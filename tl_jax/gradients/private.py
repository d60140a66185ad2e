"""Differentially private gradients: DP-SGD, and the privacy that it spends."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.gradients.base import Gradient, strided_parts

Accountant = Literal['rdp', 'rdp_basic', 'pld']
# Opacus's orders of the Rényi divergence.
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))


def private(
    *,
    clip: float,
    delta: float | None = None,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    accountant: Accountant = 'rdp',
    parts: int = 1,
    sample_rate: float | None,
    num_examples: int,
    batch_size: int,
    steps: int,
) -> Gradient:
    """DP-SGD (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

    g = (Σ_i m_i g_i min(1, C / |g_i|) + σ C N(0, I)) / (q N)

    g_i is the gradient of the loss of example i alone, over all trained parameters together; m_i the mask of the Poisson
    sample, in which each of the N examples lies with probability q (`config.data.poisson`); q N the expected batch. The update
    is (ε, δ)-private for adding or removing one example. The logged loss, accuracy and gradient norm are not. The noise
    follows from `config.seed`, which must then be secret.

    Args:
      clip: C, in units of the gradient's norm.
      delta: δ, well below 1 / N.
      noise_multiplier: σ.
      epsilon: the ε to spend over the stage, from which σ follows; instead of `noise_multiplier`.
      accountant: see `epsilon_of`.
      parts: of the batch, taken one after the other; memory holds one gradient for each example of a part.
      sample_rate: q.
      num_examples: N.
      batch_size: the room for a sample.
      steps: of the stage.
    """
    if sample_rate is None:
        raise UserError(
            "config.gradient: 'private' counts on Poisson sampling; add config.data.poisson=0.004, the rate of an example in a"
            ' step'
        )
    if delta is None or not 0 < delta < 1:
        raise UserError(
            'config.gradient.delta: ε means nothing without δ; give one well below 1 / examples, such as 1e-5'
        )
    for field, value in (('clip', clip), ('noise_multiplier', noise_multiplier), ('epsilon', epsilon)):
        if value is not None and value <= 0:
            raise UserError(f'config.gradient.{field}: must be above 0, not {value}')
    if (noise_multiplier is None) == (epsilon is None):
        raise UserError('config.gradient: give exactly one of noise_multiplier and epsilon')
    if parts < 1 or batch_size % parts:
        raise UserError(f'config.gradient.parts: {parts} parts do not divide a batch of {batch_size}')
    spent = functools.partial(epsilon_of, sample_rate=sample_rate, delta=delta, accountant=accountant)
    noise = noise_multiplier or calibrated_noise(lambda sigma: spent(sigma, steps=steps), epsilon)

    def transform(loss: Callable) -> Callable:
        def gradient(params, collections, batch, key):
            examples_key, noise_key = jax.random.split(key)
            total, value, aux = clipped_sum(loss, params, collections, batch, examples_key, clip=clip, parts=parts)
            noisy = add_noise(total, noise_key, noise * clip)
            return jax.tree.map(lambda g: g / (sample_rate * num_examples), noisy), value, aux

        return gradient

    def figures(steps):
        return {'privacy/epsilon': spent(noise, steps=steps), 'privacy/delta': delta}

    return Gradient(transform, figures)


def clipped_sum(
    loss: Callable, params: Any, collections: Any, batch: Any, key: Array, *, clip: float, parts: int = 1
) -> tuple[Any, Float[Array, ''], Any]:
    """Σ_i m_i g_i min(1, clip / |g_i|) over the batch's examples; with the loss and aux as means over those with m_i = 1.

    Args:
      loss: (params, collections, batch, key) -> (scalar, Aux); it is called with batches of one example.
      params: what the gradients are taken of.
      collections: constants.
      batch: of one stream, with `mask`.
      key: each example gets its own.
      clip: bound of each example's norm over all leaves together.
      parts: of the batch, in a scan.
    """
    _refuse_mixing(collections, batch)
    ((stream, fields),) = batch.items()

    def of_example(example, key):
        alone = {stream: jax.tree.map(lambda x: x[None], example)}
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, collections, alone, key)
        moved = [name for name in aux.collections if name != 'batch_stats']
        if moved:
            raise UserError(
                f"config.gradient: 'private' cannot keep the examples apart in '{moved[0]}', which the objective changes"
            )
        return grads, {'loss': value, **aux.metrics}, aux

    def of_part(fields, keys):
        grads, figures, aux = jax.vmap(of_example)(fields, keys)
        squares = sum(jnp.sum(jnp.square(g.reshape(len(keys), -1)), -1) for g in jax.tree.leaves(grads))
        norms, mask = jnp.sqrt(squares), fields['mask']
        figures['clipped'] = norms > clip
        factors = mask * jnp.minimum(1, clip / jnp.maximum(norms, 1e-12))
        sums = jax.tree.map(lambda g: jnp.tensordot(factors, g, 1), grads)
        return sums, {name: mask @ values.astype(jnp.float32) for name, values in figures.items()}, aux

    count = len(fields['mask'])
    split = jax.tree.map(lambda x: strided_parts(x, parts), fields)
    keys = jax.random.split(key, (parts, count // parts))
    shapes = jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], (split, keys)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[:2])
    (total, sums), _ = jax.lax.scan(lambda sums, part: (_plus(sums, of_part(*part)[:2]), None), zeros, (split, keys))
    drawn = jnp.maximum(jnp.sum(fields['mask']), 1)
    means = {name: value / drawn for name, value in sums.items()}
    return total, means.pop('loss'), shapes[2]._replace(metrics=means, collections={}, losses={})


def add_noise(tree: Any, key: Array, scale: float) -> Any:
    """Every number of the tree plus an independent N(0, scale²)."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noisy = [x + scale * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def epsilon_of(
    noise_multiplier: float, *, sample_rate: float, steps: int, delta: float, accountant: Accountant = 'rdp'
) -> float:
    """ε that `steps` Poisson-sampled Gaussian mechanisms have spent at δ, by Google's `dp-accounting`.

    accountant:
      'rdp'        Rényi divergences (Mironov et al. 2019, arXiv:1908.10530), turned into ε by Canonne et al. 2020
                   (arXiv:2004.00010, proposition 12), as Opacus does since 1.0.1;
      'rdp_basic'  the same divergences by Mironov 2017 (arXiv:1702.07476, proposition 3): larger; published with older runs;
      'pld'        numerically composed privacy loss distributions (Koskela et al. 2020, arXiv:1906.03049): the tightest.
    """
    if not steps:
        return 0.0
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(sample_rate, gaussian), steps)
    if accountant == 'pld':
        from dp_accounting import pld

        return float(pld.PLDAccountant().compose(event).get_epsilon(delta))
    from dp_accounting import rdp

    spent = rdp.RdpAccountant(ORDERS).compose(event)
    if accountant == 'rdp':
        return float(spent.get_epsilon(delta))
    return float(min(r + math.log(1 / delta) / (a - 1) for a, r in zip(ORDERS, spent.rdp, strict=True)))


def calibrated_noise(epsilon_of_noise: Callable[[float], float], target: float, tolerance: float = 1e-3) -> float:
    """The least σ, to a relative `tolerance` and from above, that spends at most `target`; σ from 0.1 to 1000.

    Args:
      epsilon_of_noise: σ -> ε, falling.
      target: ε.
      tolerance: relative.
    """
    low, high = 0.1, 1000.0
    if epsilon_of_noise(high) > target:
        raise UserError(f'config.gradient.epsilon: {target} is out of reach at any noise up to σ = {high:g}')
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if epsilon_of_noise(middle) <= target else (middle, high)
    return high


def _plus(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def _refuse_mixing(collections: Any, batch: Any) -> None:
    """Refuses what makes an example's gradient depend on other examples."""
    if len(batch) != 1:
        raise UserError(f"config.gradient: 'private' is for one stream; the objective reads {' and '.join(batch)}")
    statistics = trees.flatten(collections.get('batch_stats', {}))
    layers = dict.fromkeys(path.rpartition('/')[0] for path in statistics)
    moving = [layer for layer in layers if f'{layer}/frozen' not in statistics]
    if moving:
        raise UserError(
            f"config.gradient: 'private' needs examples that do not mix; batch normalisation in '{moving[0]}' mixes them:"
            " freeze that layer, or use a network without it (norm='none')"
        )
