"""A network that teaches itself: classifiers at inner layers learn from the one at its end."""

import jax
import jax.numpy as jnp
import optax
from jax import lax, nn
from jaxtyping import Array, Float

from tl_jax.errors import UserError
from tl_jax.objectives.base import targets_of
from tl_jax.objectives.distillation.base import Pair, Term
from tl_jax.objectives.distillation.layers import FIELD, Layers, at_least_float32, layer_pairs
from tl_jax.objectives.distillation.logits import check_temperature, divergence
from tl_jax.objectives.distillation.projectors import batch_norm, conv, conv_init, dense, dense_init, norm_init


def exits(
    *,
    layers: Layers,
    temperature: float = 3.0,
    imitation: float = 0.1,
    feature_weight: float = 2e-3,
    student: str = 'logits',
    features: str = 'features',
    num_classes: int,
) -> Term:
    """Be your own teacher (Zhang et al. 2019, arXiv:1905.08094, eq. 7): self-distillation towards the end of the same pass.

    Σ_i (1 - α) CE(z_i, y) + α τ² KL(softmax(z / τ) ‖ softmax(z_i / τ)) + λ ‖F_i - F‖²

    of the exits z_i = W_i F_i at `layers`, with the network's own logits z and features F as constants; the wrapped loss is
    theirs against the labels. F_i of a map is the mean over positions of relu(norm(conv3×3(s_i))), of a sequence or a vector
    that of a dense layer; the authors' have a strided convolution for each deeper stage and compare maps. No teacher is
    asked. The exits learn with the rule 'projectors/.*' and are not part of the stored network.

    Args:
      layers: inner endpoints [B, H, W, C], [B, L, C] or [B, C].
      temperature: τ; 3 in a common implementation, as the next two.
      imitation: α.
      feature_weight: λ; theirs is 1e-6 of the sum over a batch of 128 and 16 positions.
      student: endpoint of z [B, C].
      features: of F [B, D].
      num_classes: of the data.

    Returns nats per example.
    """
    check_temperature(temperature)
    if not 0 <= imitation <= 1:
        raise UserError(f'{FIELD}: exits.imitation is a share, 0 … 1, not {imitation}; 0.1 is usual')
    names = [name for name, _ in layer_pairs(layers)]
    if not all(isinstance(layer, str) for layer in layers):
        raise UserError(f'{FIELD}: exits.layers names endpoints of the one network, not pairs; give {names}')

    def init(key, pair: Pair):
        width = pair.student[features].shape[-1]
        shapes = [pair.student[name].shape for name in names]
        for name, shape in zip(names, shapes, strict=True):
            if len(shape) not in (2, 3, 4):
                raise UserError(f"{FIELD}: exits stand on maps, sequences or vectors, and '{name}' is {list(shape)}")
        keys = jax.random.split(key, len(names))
        return {
            f'layer{i}': exit_init(k, shape, width, num_classes)
            for i, (k, shape) in enumerate(zip(keys, shapes, strict=True), start=1)
        }

    def loss(params, state, pair, key):
        deepest, wanted = (lax.stop_gradient(at_least_float32(pair.student[name])) for name in (student, features))
        target = targets_of(pair.fields, num_classes)
        value = 0.0
        for i, name in enumerate(names, start=1):
            own = params[f'layer{i}']
            found = exit_features(own, at_least_float32(pair.student[name]))
            logits = dense(own['classifier'], found)
            taught = temperature**2 * divergence(deepest / temperature, logits / temperature)
            value += (1 - imitation) * optax.softmax_cross_entropy(logits, target) + imitation * taught
            value += feature_weight * jnp.sum(jnp.square(found - wanted), -1)
        return value, state

    return Term(loss, student=(*names, student, features), init=init)


def exit_init(key: Array, shape: tuple[int, ...], width: int, num_classes: int) -> dict:
    """What leads from an endpoint of a shape to features of a width, and from there to logits."""
    first, last = jax.random.split(key)
    inner = (conv_init if len(shape) == 4 else dense_init)(first, shape[-1], width, bias=False)
    return {'inner': inner, 'norm': norm_init(width), 'classifier': dense_init(last, width, num_classes)}


def exit_features(params: dict, x: Float[Array, 'batch *positions channels']) -> Float[Array, 'batch width']:
    inner = (conv if x.ndim == 4 else dense)(params['inner'], x)
    x = nn.relu(batch_norm(params['norm'], inner))
    return jnp.mean(x, tuple(range(1, x.ndim - 1)))
