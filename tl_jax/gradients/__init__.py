"""How a loss becomes a gradient: plainly, in parts, per task, per example, elsewhere, or not as a derivative at all."""

from collections.abc import Callable, Mapping

from tl_jax.gradients.accumulated import accumulated
from tl_jax.gradients.base import Gradient, plain
from tl_jax.gradients.private import private
from tl_jax.gradients.reptile import reptile
from tl_jax.gradients.sharpness import sam
from tl_jax.gradients.surgery import mgda, pcgrad

__all__ = ['GRADIENTS', 'Gradient', 'accumulated', 'mgda', 'pcgrad', 'plain', 'private', 'reptile', 'sam']

# name -> constructor(**fields of config.gradient)
GRADIENTS: Mapping[str, Callable[..., Gradient]] = {
    'plain': plain,
    'accumulated': accumulated,
    'pcgrad': pcgrad,
    'mgda': mgda,
    'private': private,
    'reptile': reptile,
    'sam': sam,
}
