"""Bottleneck adapters: a narrow MLP behind or beside the attention and the MLP of a transformer's blocks.

Each starts as exactly nothing: the layer back up is zero, where Houlsby et al. draw it near zero.
"""

import jax.numpy as jnp
from jax import nn

from tl_jax.errors import UserError
from tl_jax.models.fields import check_activation
from tl_jax.models.transformer import ACTIVATIONS
from tl_jax.peft.base import Adapter, Call, Parts, Site
from tl_jax.peft.products import check_dropout

MLP = r'backbone/(.*/)?block\d+/mlp'
# `mlp2` is the layer that ends an MLP which is no module of its own: what is behind it is behind the MLP.
AFTER_MLP = rf'{MLP}2?'
AFTER_ATTENTION_AND_MLP = rf'{AFTER_MLP}|backbone/(.*/)?block\d+/(attention|cross)'
SUITS = 'transformers'


def houlsby(*, width: int = 64, activation: str = 'gelu', dropout: float = 0.0, targets: str | None = None) -> Adapter:
    """Adapters behind attention and MLP (Houlsby et al. 2019, arXiv:1902.00751, sec. 2.1), ahead of the residual.

    y ← y + σ(y W_down + b_down) W_up + b_up

    The paper trains the layer norms with them, anew for each task; here a rule of the stage does, as in configs/glue.py. In
    its code (google-research/adapter-bert, optimization.py) that is every norm, the embeddings' too, without weight decay.

    Args:
      width: m of the bottleneck, columns of W_down.
      activation: σ, of `transformer.ACTIVATIONS`.
      dropout: of what goes into it, in training.
      targets: regex of module paths.
    """
    return _bottleneck(width, activation, dropout, targets or AFTER_ATTENTION_AND_MLP)


def pfeiffer(*, width: int = 48, activation: str = 'relu', dropout: float = 0.0, targets: str | None = None) -> Adapter:
    """Adapters behind the MLP alone (Pfeiffer et al. 2020, arXiv:2005.00052, sec. 4.1): y ← y + σ(y W_down + b_down) W_up + b_up.

    The paper's adapter reads the norm of residual and y, and adds to y; here it reads y, so that any block can have it.

    Args:
      width: of the bottleneck; the paper's is 1/16 of BERT-base's.
      activation: σ, of `transformer.ACTIVATIONS`.
      dropout: of what goes into it, in training.
      targets: regex of module paths.
    """
    return _bottleneck(width, activation, dropout, targets or AFTER_MLP)


def parallel(
    *,
    width: int = 64,
    scale: float = 4.0,
    activation: str = 'relu',
    dropout: float = 0.0,
    targets: str | None = None,
) -> Adapter:
    """Scaled parallel adapter (He et al. 2021, arXiv:2110.04366, table 1): y ← y + s · (σ(x W_down + b_down) W_up + b_up).

    x is what the MLP reads and y what it gives; 4 is the paper's s.

    Args:
      width: of the bottleneck; the paper's is 512 on BART-large.
      scale: s.
      activation: σ, of `transformer.ACTIVATIONS`.
      dropout: of what goes into it, in training.
      targets: regex of module paths.
    """
    adapter = _bottleneck(width, activation, dropout, targets or MLP, beside=True, scale=scale)
    return adapter._replace(kinds=('module',), suits=f'{SUITS} whose MLP is a module')


def _bottleneck(
    width: int, activation: str, dropout: float, targets: str, *, beside: bool = False, scale: float = 1.0
) -> Adapter:
    """y ← y + scale · (σ(z W_down + b_down) W_up + b_up), z what the module reads where it stands beside it, else y."""
    check_activation(activation, 'peft.activation')
    if width < 1:
        raise UserError(f'config.model.peft.width: a bottleneck has at least 1 unit, not {width}')
    check_dropout(dropout)

    def init(key, site: Site, weights) -> Parts:
        del weights
        rows, columns = (site.inputs if beside else site.outputs).shape[-1], site.outputs.shape[-1]
        return Parts(
            {
                'down': nn.initializers.he_uniform()(key, (rows, width), jnp.float32),
                'down_bias': jnp.zeros(width),
                'up': jnp.zeros((width, columns)),
                'up_bias': jnp.zeros(columns),
            }
        )

    def call(parts: Parts, call: Call, site: Site):
        del site
        y = call.run(call.inputs)
        return y + scale * _narrow(parts.params, call.drop(dropout, call.inputs if beside else y), activation)

    return Adapter(init, call, kinds=('module', 'dense'), targets=targets, suits=SUITS)


def _narrow(params, x, activation: str):
    """σ(x W_down + b_down) W_up + b_up, in the dtype of x."""
    down, down_bias, up, up_bias = (params[name].astype(x.dtype) for name in ('down', 'down_bias', 'up', 'up_bias'))
    return ACTIVATIONS[activation](x @ down + down_bias) @ up + up_bias
