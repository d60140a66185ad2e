"""A frozen base in few bits: codes and scales in the place of a leaf, from which each step makes the leaf anew.

A leaf `kernel` [..., columns] becomes
  `kernel_codes`   int8 [..., columns], or two nf4 codes a byte: uint8 [..., columns / 2];
  `kernel_scales`  float32 [columns] for int8, [blocks] for nf4; with double quantisation int8 [blocks], and then
  `kernel_units` [blocks / 256] and `kernel_mean` [], float32, of those.
Codes keep the leaf's axes, so that a sharding rule fits both. Nothing else is stored: `restored` needs the leaves alone.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.objectives.base import Model

CODES, SCALES, UNITS, MEAN = '_codes', '_scales', '_units', '_mean'
HELD = 'held'  # the collection in which `quantized` hands codes to `forgetful`
KERNELS = r'backbone/.*/kernel'  # what `config.model.quantize` means unless it has a rule
BLOCK = 64  # entries of one scale, row by row
SCALE_BLOCK = 256  # scales of one scale's scale

# Dettmers et al. 2023, arXiv:2305.14314, appendix E: quantiles of a standard normal, normalised to [-1, 1], 0 among them.
NF4 = np.asarray(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def quantized(
    model: Model, *, name: Literal['int8', 'nf4'], rule: str = KERNELS, double: bool = False, dtype: Any
) -> Model:
    """The network with leaves of its base held in few bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, sec. 3).

    Each step restores them. They are constants: a rule that would train one is refused where the stage is built.

    Args:
      model: the network, its adapters included, with `forgetful` innermost, whose `init` gives the values that are held.
      name: 'nf4', four bits a weight and a scale for every 64, or 'int8', eight and a scale for each output.
      rule: regex of the leaves, `role/module/…/leaf`.
      double: whether the scales of nf4 are themselves held in eight bits, 256 of them to a scale and a mean.
      dtype: of the computation, which the restored leaves have.
    """
    if double and name != 'nf4':
        raise UserError("config.model.quantize.double: is of the scales of 'nf4'; leave it out for 'int8'")

    def init(key, inputs):
        variables = model.init(key, inputs)
        return {**variables, 'params': held(variables['params'], rule, name, double=double)}

    def apply(variables, inputs, **options):
        params = variables['params']
        small = trees.split(params, lambda path: not path.startswith('adapters/'))[0]
        return model.apply({**variables, 'params': restored(params, dtype), HELD: small}, inputs, **options)

    def classify(variables, features, **options):
        return model.classify({**variables, 'params': restored(variables['params'], dtype)}, features, **options)

    return Model(init, apply, classify)


def forgetful(model: Model, *, dtype: Any) -> Model:
    """The plain network within `quantized`: a layer that is held in codes restores them for itself, and for its gradient anew.

    So neither pass keeps what has the size of a restored leaf. Adapters go between the two.
    """

    def apply(variables, inputs, **options):
        variables = dict(variables)
        layers = _layers_in_codes(variables.pop(HELD, {}))

        def intercept(run, args, kwargs, context):
            own = layers.get('/'.join(context.module.path)) if context.method_name == '__call__' else None
            if own is None:
                return run(*args, **kwargs)
            module = context.module.clone(parent=None)
            layer = lambda own, x: module.apply({'params': restored(own, dtype)}, x, *args[1:], **kwargs)
            return jax.checkpoint(layer)(own, args[0])

        with nn.intercept_methods(intercept):
            return model.apply(variables, inputs, **options)

    return model._replace(apply=apply)


def kept_whole(variables: trees.Tree, modules: Sequence[str]) -> dict[str, Any]:
    """The variables by which `forgetful` runs these modules on their leaves as given, which an adapter has changed."""
    small = trees.flatten(variables.get(HELD, {}))
    left = {path: leaf for path, leaf in small.items() if path.rpartition('/')[0] not in modules}
    return {**variables, HELD: trees.unflatten(left)} if small else dict(variables)


def _layers_in_codes(params: trees.Tree) -> dict[str, dict[str, Array]]:
    """`{module: its leaves}` of the modules that have codes, and no modules within."""
    flat, layers = trees.flatten(params), {}
    for module in {path.rpartition('/')[0] for path in flat if path.endswith(CODES)}:
        own = {path.removeprefix(module + '/'): leaf for path, leaf in flat.items() if path.startswith(module + '/')}
        if not any('/' in path for path in own):
            layers[module] = own
    return layers


def held(params: trees.Tree, rule: str, name: str, *, double: bool = False) -> dict[str, Any]:
    """The parameters with those that the rule matches in few bits; arguments as of `quantized`."""
    flat = trees.flatten(params)
    chosen = trees.match([(rule, True)], flat, field='config.model.quantize.rule', default=False)
    small = {}
    for path, leaf in flat.items():
        if not chosen[path]:
            small[path] = leaf
        elif name == 'int8':
            small |= _int8(path, leaf)
        else:
            small |= _nf4(path, leaf, double)
    return trees.unflatten(small)


def holds_codes(params: trees.Tree) -> bool:
    """Whether some of the parameters are held in few bits."""
    return any(path.endswith(CODES) for path in trees.flatten(params))


def restored(params: trees.Tree, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameters with every leaf that is held in few bits as numbers of `dtype` again."""
    flat = trees.flatten(params)
    whole = {path: leaf for path, leaf in flat.items() if not path.endswith(CODES)}
    for path in flat.keys() - whole.keys():
        stem = path.removesuffix(CODES)
        scales = whole.pop(stem + SCALES)
        if scales.dtype == jnp.int8:
            scales = _single(scales, whole.pop(stem + UNITS), whole.pop(stem + MEAN))
        restore = _from_int8 if flat[path].dtype == jnp.int8 else _from_nf4
        whole[stem] = restore(flat[path], scales).astype(dtype)
    return trees.unflatten(whole)


def _int8(path: str, leaf: Float[Array, '*rows columns']) -> dict[str, Array]:
    """Codes in −127 … 127 by the largest absolute value of each output, the last axis."""
    largest = jnp.max(jnp.abs(leaf), tuple(range(leaf.ndim - 1)))
    scales = jnp.where(largest > 0, largest, 1.0) / 127
    return {path + CODES: jnp.round(leaf / scales).astype(jnp.int8), path + SCALES: scales.astype(jnp.float32)}


def _from_int8(codes: Array, scales: Array) -> Array:
    return codes.astype(jnp.float32) * scales


def _nf4(path: str, leaf: Float[Array, '*rows columns'], double: bool) -> dict[str, Array]:
    """The nearest of the 16 levels, by the largest absolute value of each block of 64."""
    if leaf.shape[-1] % 2:
        raise UserError(
            f"config.model.quantize.rule: '{path}' is {list(leaf.shape)}, and nf4 packs two of a row into a byte; narrow the rule"
        )
    flat = jnp.pad(leaf.reshape(-1).astype(jnp.float32), (0, -leaf.size % BLOCK)).reshape(-1, BLOCK)
    largest = jnp.max(jnp.abs(flat), 1)
    small = {path + SCALES: largest}
    if double:
        small = dict(zip((path + SCALES, path + UNITS, path + MEAN), _doubled(largest), strict=True))
        largest = _single(*small.values())
    levels = jnp.asarray(NF4)
    between = (levels[1:] + levels[:-1]) / 2
    codes = jnp.searchsorted(between, flat / jnp.where(largest > 0, largest, 1.0)[:, None]).astype(jnp.uint8)
    codes = codes.reshape(-1)[: leaf.size].reshape(leaf.shape)
    return {path + CODES: codes[..., 0::2] << 4 | codes[..., 1::2], **small}


def _from_nf4(codes: Array, scales: Array) -> Array:
    both = jnp.stack([codes >> 4, codes & 15], -1).reshape(*codes.shape[:-1], -1)
    return jnp.asarray(NF4)[both] * jnp.repeat(scales, BLOCK)[: both.size].reshape(both.shape)


def _doubled(scales: Float[Array, 'blocks']) -> tuple[Array, Array, Array]:
    """Scales, less their mean, in eight bits: codes, the unit of each 256, the mean. (The authors' eight bits float.)"""
    mean = jnp.mean(scales)
    blocks = jnp.pad(scales - mean, (0, -scales.size % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
    largest = jnp.max(jnp.abs(blocks), 1)
    units = jnp.where(largest > 0, largest, 1.0) / 127
    return jnp.round(blocks / units[:, None]).astype(jnp.int8).reshape(-1)[: scales.size], units, mean


def _single(codes: Array, units: Array, mean: Array) -> Float[Array, 'blocks']:
    return codes.astype(jnp.float32) * jnp.repeat(units, SCALE_BLOCK)[: codes.size] + mean
