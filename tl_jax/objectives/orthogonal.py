"""AdaLoRA's penalty: singular vectors that stay orthogonal."""

import jax.numpy as jnp

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.objectives.base import Objective
from tl_jax.objectives.penalties import added


def orthogonal(objective: Objective, *, weight: float = 0.5) -> Objective:
    """loss + weight · Σ_layers ‖Pᵀ P − I‖² + ‖Q Qᵀ − I‖², of `adalora`'s adapters (arXiv:2303.10512, eq. 4; γ = weight)."""

    def penalty(variables, batch, aux, key):
        del batch, aux, key
        flat = trees.flatten(variables['params'])
        total, layers = 0.0, [path[:-1] for path in flat if path.endswith('/lora_e')]
        if not layers:
            raise UserError("config.objective.orthogonal: is for model.peft=dict(name='adalora'), and there is none")
        for layer in layers:
            p, q = flat[layer + 'a'].astype(jnp.float32), flat[layer + 'b'].astype(jnp.float32)
            eye = jnp.eye(p.shape[1])
            total += jnp.sum((p.T @ p - eye) ** 2) + jnp.sum((q @ q.T - eye) ** 2)
        return weight * total, {}

    return added(objective, 'orthogonal', penalty)
