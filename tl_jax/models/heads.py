"""Heads: from a backbone's features to logits. Parameters and computation float32.

Every head is called as `head(features [batch, dim], train) -> logits [batch, classes]`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def uniform(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """U(-1/√fan-in, 1/√fan-in), as torch starts its linear layers. Drawn flat, for the reason in `layers.kaiming`."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)


class Linear(nn.Module):
    """`features @ kernel + bias`, after dropout of the features when training."""

    num_classes: int
    dropout: float = 0.0
    use_bias: bool = True

    @nn.compact
    def __call__(self, features: Float[Array, 'batch dim'], train: bool = False) -> Float[Array, 'batch classes']:
        features = nn.Dropout(self.dropout, deterministic=not train)(features.astype(jnp.float32))
        logits = features @ self.param('kernel', uniform, (features.shape[-1], self.num_classes), jnp.float32)
        if self.use_bias:
            logits += self.param('bias', nn.initializers.zeros, (self.num_classes,), jnp.float32)
        return logits


class Distilled(nn.Module):
    """The mean of two linear heads, on the two halves of the features (Touvron et al. 2020, arXiv:2012.12877, section 4).

    The first half is the class token's, whose head holds `kernel` and `bias`; that of the distillation token is `distillation`.
    """

    num_classes: int

    def __call__(self, features: Float[Array, 'batch dim'], train: bool = False) -> Float[Array, 'batch classes']:
        return self.endpoints(features)['logits']

    @nn.compact
    def endpoints(self, features: Float[Array, 'batch dim']) -> dict[str, Float[Array, 'batch classes']]:
        """`class_logits` and `distillation_logits`, by each head alone, and `logits`, their mean."""
        token, distillation = jnp.split(features.astype(jnp.float32), 2, -1)
        kernel = self.param('kernel', uniform, (token.shape[-1], self.num_classes), jnp.float32)
        one = token @ kernel + self.param('bias', nn.initializers.zeros, (self.num_classes,), jnp.float32)
        other = Linear(self.num_classes, name='distillation')(distillation)
        return {'class_logits': one, 'distillation_logits': other, 'logits': 0.5 * (one + other)}


class Mlp(nn.Module):
    """Hidden layers with ReLU and dropout (`hidden1`, …), then a linear one (`output`)."""

    num_classes: int
    widths: Sequence[int] = (256,)
    dropout: float = 0.0

    @nn.compact
    def __call__(self, features: Float[Array, 'batch dim'], train: bool = False) -> Float[Array, 'batch classes']:
        x = features.astype(jnp.float32)
        for i, width in enumerate(self.widths, start=1):
            x = nn.relu(nn.Dense(width, kernel_init=uniform, name=f'hidden{i}')(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=uniform, name='output')(x)


class WeightNorm(nn.Module):
    """`features @ (scale · kernel / ‖kernel‖) + bias`, norms of columns (Salimans & Kingma 2016, arXiv:1602.07868, eq. 2).

    Starts as `Linear` does: the scale of a class is its column's norm.
    """

    num_classes: int

    @nn.compact
    def __call__(self, features: Float[Array, 'batch dim'], train: bool = False) -> Float[Array, 'batch classes']:
        kernel = self.param('kernel', uniform, (features.shape[-1], self.num_classes), jnp.float32)
        scale = self.param('scale', lambda key: jnp.linalg.norm(kernel, axis=0))
        bias = self.param('bias', nn.initializers.zeros, (self.num_classes,), jnp.float32)
        return features.astype(jnp.float32) @ (scale * _unit(kernel, 0)) + bias


class Cosine(nn.Module):
    """`scale · cos(features, kernel[:, class])`: the classifier of Gidaris & Komodakis 2018 (arXiv:1804.09458).

    Attributes:
      scale: the initial factor, 10 in the paper.
      learn_scale: whether the factor is a parameter.
    """

    num_classes: int
    scale: float = 10.0
    learn_scale: bool = True

    @nn.compact
    def __call__(self, features: Float[Array, 'batch dim'], train: bool = False) -> Float[Array, 'batch classes']:
        kernel = self.param('kernel', uniform, (features.shape[-1], self.num_classes), jnp.float32)
        scale = self.scale
        if self.learn_scale:
            scale = self.param('scale', nn.initializers.constant(self.scale), (), jnp.float32)
        return scale * (_unit(features.astype(jnp.float32), -1) @ _unit(kernel, 0))


def _unit(x: Array, axis: int) -> Array:
    # The floor stands under the root: the gradient at zero is then zero, not NaN.
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis, keepdims=True), 1e-12))


HEADS = {
    'linear': Linear,
    'unbiased': functools.partial(Linear, use_bias=False),
    'mlp': Mlp,
    'cosine': Cosine,
    'weight_norm': WeightNorm,
    'distilled': Distilled,
}
