"""Low-rank adapters: LoRA and its kin."""

import jax.numpy as jnp
from jax import nn

from tl_jax.errors import UserError
from tl_jax.peft.base import Adapter, Call, Parts, Site


def lora(*, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, targets: str | None = None) -> Adapter:
    """LoRA (Hu et al. 2021, arXiv:2106.09685, sec. 4.1): y = x W + (α / r) x A B, with B = 0 at first.

    Args:
      rank: r, at most the smaller side of the kernel.
      alpha: α.
      dropout: of what goes through A, in training.
      targets: regex of module paths; the family's attention queries and values unless given.
    """

    def init(key, site: Site, weights) -> Parts:
        del weights
        rows, columns = site.weights['kernel'].shape
        if rank > min(rows, columns):
            raise UserError(
                f"config.model.peft.rank: {rank} is above the smaller side of '{site.path}', {rows} × {columns}"
            )
        a = nn.initializers.he_uniform()(key, (rows, rank), jnp.float32)
        return Parts({'lora_a': a, 'lora_b': jnp.zeros((rank, columns))})

    def call(parts: Parts, call: Call, site: Site):
        change = call.drop(dropout, call.inputs) @ parts.params['lora_a'] @ parts.params['lora_b']
        return call.run(call.inputs) + alpha / rank * change

    def merge(parts: Parts, weights, site: Site):
        return {**weights, 'kernel': weights['kernel'] + alpha / rank * parts.params['lora_a'] @ parts.params['lora_b']}

    def unmerge(parts: Parts, weights, site: Site):
        return {**weights, 'kernel': weights['kernel'] - alpha / rank * parts.params['lora_a'] @ parts.params['lora_b']}

    return Adapter(init, call, merge, unmerge, targets=targets)
