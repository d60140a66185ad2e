"""How a loss becomes a gradient: plainly, in parts, per task, per example, or not as a derivative at all."""

from collections.abc import Callable, Mapping

from tl_jax.gradients.accumulated import accumulated
from tl_jax.gradients.base import Gradient, plain

__all__ = ['GRADIENTS', 'Gradient', 'accumulated', 'plain']

# name -> constructor(**fields of config.gradient)
GRADIENTS: Mapping[str, Callable[..., Gradient]] = {'plain': plain, 'accumulated': accumulated}
