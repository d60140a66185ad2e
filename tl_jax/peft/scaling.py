"""Adapters that scale activations: (IA)³ and SSF. Both vanish into the weights when merged."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tl_jax.errors import UserError
from tl_jax.peft.base import Adapter, Call, Parts, Site, contracted
from tl_jax.trees import compiled

HIDDEN = r'.*/(mlp/dense2|mlp2)'
IA3 = rf'backbone/(.*/)?(attention|cross)/(key|value)|backbone{HIDDEN}'


def ia3(*, hidden: str = HIDDEN, targets: str | None = None) -> Adapter:
    """(IA)³ (Liu et al. 2022, arXiv:2205.05638, sec. 3.3): keys, values and hidden units, each times a learned factor.

    attention: softmax(q (l_k ⊙ k)ᵀ / √d) (l_v ⊙ v); mlp: (l_ff ⊙ activation(x W₁)) W₂. Every l [features] starts at 1.

    Args:
      hidden: regex of the modules whose inputs are scaled, not their outputs: l_ff stands behind the activation.
      targets: regex of module paths; keys, values and the last layer of each MLP unless given.
    """

    pattern = compiled(hidden, 'config.model.peft.hidden')

    def is_hidden(site: Site) -> bool:
        return pattern.fullmatch(site.path) is not None

    def init(key, site: Site, weights) -> Parts:
        del key, weights
        return Parts({'ia3': jnp.ones(site.inputs.shape[-1:] if is_hidden(site) else features_of(site))})

    def call(parts: Parts, call: Call, site: Site):
        factor = parts.params['ia3']
        return call.run(_times(call.inputs, factor)) if is_hidden(site) else _times(call.run(call.inputs), factor)

    def scaled(factor, weights, site: Site):
        if is_hidden(site):
            return {**weights, 'kernel': weights['kernel'] * factor[:, None]}
        return {name: leaf * factor for name, leaf in weights.items()}

    def merge(parts: Parts, weights, site: Site):
        return scaled(parts.params['ia3'], weights, site)

    def unmerge(parts: Parts, weights, site: Site):
        return scaled(1 / parts.params['ia3'], weights, site)

    return Adapter(init, call, merge, unmerge, kinds=('dense', 'conv'), targets=targets or IA3, suits='transformers')


def ssf(*, spread: float = 0.0, shift: Literal['biased', 'all'] = 'biased', targets: str | None = None) -> Adapter:
    """SSF, scaling and shifting features (Lian et al. 2022, arXiv:2210.08823, eq. 2): y ← γ ⊙ y + β behind every layer.

    γ, β [features] start at 1 and 0, behind every dense layer, convolution and norm.

    Args:
      spread: standard deviation of the start around that; 0.02 in the authors' code, which changes the network at once.
      shift: which modules get a β: 'biased' those whose bias can hold it when merged, which in the paper is every one;
        'all' also those without a bias, which then cannot be merged.
      targets: regex of module paths.
    """

    def init(key, site: Site, weights) -> Parts:
        del weights
        keys, features = jax.random.split(key), features_of(site)
        learned = {'scale': 1 + spread * jax.random.normal(keys[0], features)}
        if shift == 'all' or 'bias' in site.weights:
            learned['shift'] = spread * jax.random.normal(keys[1], features)
        return Parts(learned)

    def call(parts: Parts, call: Call, site: Site):
        scale, shift = (parts.params.get(name) for name in ('scale', 'shift'))
        return _times(call.run(call.inputs), scale, 0 if shift is None else shift)

    def merge(parts: Parts, weights, site: Site):
        _check_mergeable(parts, site)
        one = _unit(site)
        weights = {name: (leaf + one[name]) * parts.params['scale'] - one[name] for name, leaf in weights.items()}
        return weights if 'bias' not in weights else {**weights, 'bias': weights['bias'] + parts.params['shift']}

    def unmerge(parts: Parts, weights, site: Site):
        _check_mergeable(parts, site)
        if 'bias' in weights:
            weights = {**weights, 'bias': weights['bias'] - parts.params['shift']}
        one = _unit(site)
        return {name: (leaf + one[name]) / parts.params['scale'] - one[name] for name, leaf in weights.items()}

    kinds = ('dense', 'conv', 'norm')
    everywhere = targets or 'backbone/.*'
    return Adapter(
        init, call, merge, unmerge, kinds=kinds, by_kind=targets is None, targets=everywhere, identity=not spread
    )


def _times(x: Array, factor: Array, shift: Array | float = 0) -> Array:
    """x · factor + shift in x's dtype; the factor keeps its own, as in bfloat16 1.003 is 1."""
    return (x * factor + shift).astype(x.dtype)


def features_of(site: Site) -> tuple[int, ...]:
    """The shape of what a dense layer, a convolution or a norm gives at one place of one example."""
    if site.kind == 'norm':
        return site.weights['scale'].shape
    kernel = site.weights['kernel']
    return kernel.shape[contracted(kernel, site.inputs, site.outputs) :] if site.kind == 'dense' else kernel.shape[-1:]


def _check_mergeable(parts: Parts, site: Site) -> None:
    if 'shift' in parts.params and 'bias' not in site.weights:
        raise UserError(
            f"config.model.peft.shift: '{site.path}' has no bias that could hold its shift; to merge, train with 'biased'"
        )


def _unit(site: Site) -> dict[str, int]:
    """What to add to a leaf for the factor that it stands for: Gemma's norms multiply by 1 + scale."""
    centred = getattr(site.module, 'zero_centered', False)
    return {name: int(name == 'scale' and centred) for name in site.weights}
