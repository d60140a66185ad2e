"""A bidirectional LSTM over words, from token ids to a vector.

Inputs: ids int32 [batch, length], 0 for padding, which changes nothing. Endpoints: `mask` bool [batch, length], `lstm1`, …
[batch, length, 2 hidden], `dense1`, … [batch, width], and `features` [batch, dim], float32. Modules: `token`, `forward{i}`,
`backward{i}`, `dense{i}`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from tl_jax.models.fields import check_fields
from tl_jax.models.transformer import Dense


class TextLstm(nn.Module):
    """A bidirectional LSTM, the last states of both directions, then dense layers (Tang et al. 2019, arXiv:1903.12136, fig. 1).

    Attributes:
      vocabulary: number of ids, padding included.
      width: of the embeddings.
      hidden: width of each direction; 150 or 300 in the paper.
      depth: number of layers, each over both directions of the one below.
      dense: widths of the layers with ReLU after it; 200 or 400 in the paper.
      dropout: share of the embeddings, of each layer's output and of each dense layer that is dropped in training.
      dtype: of the matrix products; states are float32.
    """

    vocabulary: int = 8192
    width: int = 300
    hidden: int = 150
    depth: int = 1
    dense: Sequence[int] = (200,)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, sizes=('vocabulary', 'width', 'hidden', 'depth', 'dense'), rates=('dropout',))

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Regexes of leaf paths from input to output."""
        layers = (f'(forward|backward){i}/.*' for i in range(1, self.depth + 1))
        return 'token/.*', *layers, *(f'dense{i}/.*' for i in range(1, len(self.dense) + 1))

    @nn.compact
    def __call__(self, tokens: Int[Array, 'batch length'], train: bool = False) -> dict[str, Array]:
        real = tokens != 0
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = drop(nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name='token')(tokens))
        endpoints = {'mask': real}
        for i in range(1, self.depth + 1):
            there = Lstm(self.hidden, dtype=self.dtype, name=f'forward{i}')(x, real)
            back = Lstm(self.hidden, reverse=True, dtype=self.dtype, name=f'backward{i}')(x, real)
            endpoints[f'lstm{i}'] = jnp.where(real[..., None], jnp.concatenate([there, back], -1), 0)
            x = drop(endpoints[f'lstm{i}'])
        # Padding hands a state on, so each direction's last is at its end whatever the length.
        x = drop(jnp.concatenate([there[:, -1], back[:, 0]], -1))
        for i, width in enumerate(self.dense, start=1):
            x = drop(nn.relu(nn.Dense(width, name=f'dense{i}')(x)))
            endpoints[f'dense{i}'] = x
        return {**endpoints, 'features': x}


class Lstm(nn.Module):
    """One direction of a long short-term memory (Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000).

    i, f, g, o = x_t W + h_{t-1} U + b;   c_t = σ(f) c_{t-1} + σ(i) tanh(g);   h_t = σ(o) tanh(c_t)

    Parameters: `input/kernel` W [width, 4 hidden], `recurrent` U [hidden, 4 hidden], `bias`, the gates in that order. The forget
    gate's bias starts at 1 (Jozefowicz et al. 2015). A position that is not real leaves the state as it is.
    """

    hidden: int
    reverse: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch length width'], real: Bool[Array, 'batch length']
    ) -> Float[Array, 'batch length hidden']:
        # All positions' products with W are one: only U has to wait for the state.
        inputs = Dense(4 * self.hidden, False, self.dtype, nn.initializers.lecun_normal(), name='input')(x)
        bias = self.param('bias', self._forget_one, (4 * self.hidden,), jnp.float32)
        recurrent = self.param('recurrent', nn.initializers.orthogonal(), (self.hidden, 4 * self.hidden), jnp.float32)
        inputs = inputs.astype(jnp.float32) + bias

        def step(state, given):
            now, there = given
            c, h = state
            gates = now + jnp.matmul(
                h.astype(self.dtype), recurrent.astype(self.dtype), preferred_element_type=jnp.float32
            )
            i, f, g, o = jnp.split(gates, 4, -1)
            new_c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            new = new_c, nn.sigmoid(o) * jnp.tanh(new_c)
            c, h = (jnp.where(there[:, None], after, before) for after, before in zip(new, state, strict=True))
            return (c, h), h

        begin = (jnp.zeros((x.shape[0], self.hidden)),) * 2
        _, states = jax.lax.scan(step, begin, (inputs.swapaxes(0, 1), real.T), reverse=self.reverse)
        return states.swapaxes(0, 1)

    @staticmethod
    def _forget_one(key: Array, shape: Sequence[int], dtype: Any) -> Array:
        del key
        return jnp.zeros(shape, dtype).at[shape[0] // 4 : shape[0] // 2].set(1)


MODELS = {'text_lstm': TextLstm}
