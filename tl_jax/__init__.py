"""tl_jax: adapt pretrained models to new tasks and domains, in JAX."""

__version__ = '0.1.0'
