"""Parts of transformers: dense layers, norms, attention and MLP, shared by every family that has them.

Arrays are [batch, length, width]; attention's are [batch, length, heads, head width]. A mask is boolean, true where a query
may look; parameters, norms and softmax are float32. On CPU only the operands of matrix products take `dtype`, since
elementwise bfloat16 is slow there; elsewhere everything between the norms does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float


def gelu(x: Array) -> Array:
    """`x · Φ(x)`, by the error function (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    On CPU as torch writes it: the complement `erfc`, which jax takes, has two branches, and takes nearly three times as long
    (3152×768: 7.5 against 2.6 ms, forward and backward 15.7 against 8.7).
    """
    if jax.default_backend() == 'cpu' and x.dtype == jnp.float32:
        return 0.5 * x * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))
    return nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'gelu': gelu,
    'gelu_tanh': lambda x: nn.gelu(x, approximate=True),
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
    'relu': nn.relu,
    'silu': nn.silu,
    'tanh': jnp.tanh,
}
INIT = nn.initializers.truncated_normal(0.02)


def outer_dtype(dtype: Any) -> Any:
    """The dtype between matrix products: `dtype`, but float32 on CPU."""
    return jnp.float32 if jax.default_backend() == 'cpu' else dtype


class Dense(nn.Module):
    """`x @ kernel + bias`, with the parameters of `nn.Dense`; the operands of the product are cast to `dtype`."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = INIT

    @nn.compact
    def __call__(self, x: Float[Array, '*batch width']) -> Float[Array, '*batch features']:
        kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        outer = outer_dtype(self.dtype)
        # On CPU one axis of positions: for the kernel's gradient, which contracts them, XLA would first copy both operands
        # transposed, and compute anew in the copy's order whatever elementwise chain led to them.
        rows = x.reshape(-1, x.shape[-1]) if jax.default_backend() == 'cpu' else x
        y = jnp.matmul(rows.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=outer)
        if self.use_bias:
            y += self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32).astype(outer)
        return y.reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32, with torch's two-pass variance."""

    epsilon: float = 1e-5
    use_bias: bool = True
    use_scale: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, '*batch width']) -> Float[Array, '*batch width']:
        x = x.astype(jnp.float32)
        x -= jnp.mean(x, -1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
        if self.use_scale:
            y *= self.param('scale', nn.initializers.ones, x.shape[-1:], jnp.float32)
        if self.use_bias:
            y += self.param('bias', nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return y.astype(outer_dtype(self.dtype))


class RMSNorm(nn.Module):
    """`x / rms(x) · scale` in float32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    With `zero_centered` the factor is `1 + scale`, and `scale` starts at zero, as in Gemma.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    zero_centered: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, '*batch width']) -> Float[Array, '*batch width']:
        x = x.astype(jnp.float32)
        init = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
        scale = self.param('scale', init, x.shape[-1:], jnp.float32) + self.zero_centered
        y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon) * scale
        return y.astype(outer_dtype(self.dtype))


def attend(
    query: Float[Array, 'batch queries heads dim'],
    key: Float[Array, 'batch keys kv_heads dim'],
    value: Float[Array, 'batch keys kv_heads dim'],
    *,
    mask: Bool[Array, '...'] | None = None,
    bias: Float[Array, '...'] | None = None,
    scale: float | None = None,
    cap: float | None = None,
    drop: Callable[[Array], Array] = lambda weights: weights,
    dtype: Any = jnp.float32,
) -> Float[Array, 'batch queries heads dim']:
    """`softmax(scale · query · key + bias) @ value`, a key and value head serving `heads / kv_heads` query heads.

    Args:
      query, key, value: projected and split into heads.
      mask: broadcasts to [batch, heads, queries, keys]. A query that may look nowhere gets the mean of all values.
      bias: added to the scores; broadcasts likewise.
      scale: 1 / √dim unless given.
      cap: scores become `cap · tanh(scores / cap)`, before the bias and the mask.
      drop: dropout of the weights.
      dtype: of the two products' operands.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = jnp.repeat(key, groups, 2), jnp.repeat(value, groups, 2)
    query, key, value = (x.astype(dtype).transpose(0, 2, 1, 3) for x in (query, key, value))
    scores = scale * jnp.einsum('bhqd,bhkd->bhqk', query, key, preferred_element_type=jnp.float32)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    if jax.default_backend() == 'cpu' and jnp.dtype(dtype) == jnp.float32:
        # The softmax's denominator after the product: there are `keys / dim` times fewer numbers to divide.
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True)))
        y = jnp.matmul(drop(weights).astype(dtype), value, preferred_element_type=jnp.float32)
        y /= jnp.sum(weights, -1, keepdims=True)
    else:
        y = jnp.matmul(drop(nn.softmax(scores)).astype(dtype), value, preferred_element_type=outer_dtype(dtype))
    return y.transpose(0, 2, 1, 3)


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself, or to `context`. Modules: `query`, `key`, `value`, `out`.

    A dict given as `projections` receives `query`, `key` and `value` [batch, length, heads, head width].

    Attributes:
      heads: of the queries.
      head_dim: width of a head; the input's width / heads unless given.
      use_bias: of query, key and value; `out_bias` of the last layer.
      dropout: of the attention weights.
      dtype: of the computation.
    """

    heads: int
    head_dim: int | None = None
    use_bias: bool = True
    out_bias: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch queries width'],
        context: Float[Array, 'batch keys other'] | None = None,
        *,
        mask: Array | None = None,
        bias: Array | None = None,
        projections: dict[str, Array] | None = None,
        train: bool = False,
    ) -> Float[Array, 'batch queries width']:
        context = x if context is None else context
        dim = self.head_dim or x.shape[-1] // self.heads
        projected = [
            Dense(self.heads * dim, self.use_bias, self.dtype, name=name)(inputs).reshape(
                inputs.shape[0], -1, self.heads, dim
            )
            for name, inputs in (('query', x), ('key', context), ('value', context))
        ]
        if projections is not None:
            projections.update(zip(('query', 'key', 'value'), projected, strict=True))
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = attend(*projected, mask=mask, bias=bias, drop=drop, dtype=self.dtype)
        return Dense(x.shape[-1], self.out_bias, self.dtype, name='out')(y.reshape(*x.shape[:2], self.heads * dim))


class Mlp(nn.Module):
    """`dense2(activation(dense1(x)))`, of `width` in between. Modules: `dense1`, `dense2`."""

    width: int
    activation: str = 'gelu'
    use_bias: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, '*batch width'], train: bool = False) -> Float[Array, '*batch width']:
        y = ACTIVATIONS[self.activation](Dense(self.width, self.use_bias, self.dtype, name='dense1')(x))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return Dense(x.shape[-1], self.use_bias, self.dtype, name='dense2')(y)


class GatedMlp(nn.Module):
    """`dense2(activation(gate(x)) · dense1(x))` (Shazeer 2020, arXiv:2002.05202). Modules: `gate`, `dense1`, `dense2`."""

    width: int
    activation: str = 'silu'
    use_bias: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, '*batch width'], train: bool = False) -> Float[Array, '*batch width']:
        gate = Dense(self.width, self.use_bias, self.dtype, name='gate')(x)
        y = ACTIVATIONS[self.activation](gate) * Dense(self.width, self.use_bias, self.dtype, name='dense1')(x)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return Dense(x.shape[-1], self.use_bias, self.dtype, name='dense2')(y)


class DropPath(nn.Module):
    """Drops the whole branch of an example with probability `rate`, and scales the rest (Huang et al. 2016, arXiv:1603.09382)."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, 'batch ...'], train: bool) -> Float[Array, 'batch ...']:
        return nn.Dropout(self.rate, broadcast_dims=tuple(range(1, x.ndim)), deterministic=not train)(x)


def drop_rates(sizes: Sequence[int], rate: float) -> list[tuple[float, ...]]:
    """`DropPath`'s rate of each block of each stage, growing linearly from 0 in the first block to `rate` in the last."""
    rates = np.linspace(0, rate, sum(sizes)).tolist()
    ends = np.cumsum(sizes).tolist()
    return [tuple(rates[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
