"""Stochastic depth: the one `DropPath`, and that every network with a `drop_path` puts an example's branch through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tl_jax.models import MODELS, create_model
from tl_jax.models.clip import Clip
from tl_jax.models.transformer import DropPath

_TWO = dict(stage_sizes=(2,), widths=(8,))
_VIT = dict(width=8, depth=2, heads=2, patch_size=8, image_size=16)
# A network of each family, two blocks deep.
NETWORKS = {
    'bit_50x1': dict(_TWO, stem_width=8, groups=4),
    'clip_vision_base_patch32': _VIT,
    'convnext_tiny': _TWO,
    'efficientnet_b0': dict(stages=((1, 3, 1, 16, 2),), width=0.25),
    'resnet20': dict(_TWO, stem_width=8),
    'swin_t': dict(width=8, depths=(2,), heads=(1,), window=3),
    'vit_tiny_patch16': _VIT,
}


def assert_whole_examples(x, y, rate):
    """Each example's branch is 0 or x / (1 - rate), from its first value to its last; returns which are kept."""
    x, y = (np.asarray(a).reshape(len(a), -1) for a in (x, y))
    kept = y.any(1)
    np.testing.assert_allclose(y, np.where(kept[:, None], x / (1 - rate), 0), rtol=1e-6)
    return kept


@pytest.mark.parametrize('shape', [(3,), (4, 3), (2, 3, 3)], ids=str)
def test_drops_an_examples_branch_with_this_probability(shape):
    count, rate = 4000, 0.3
    x = np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)
    apply = lambda train: DropPath(rate).apply({}, x, train, rngs={'dropout': jax.random.key(0)})
    dropped = count - assert_whole_examples(x, apply(True), rate).sum()
    assert abs(dropped / count - rate) < 4 * np.sqrt(rate * (1 - rate) / count)
    np.testing.assert_array_equal(apply(False), x)


def test_every_family_with_stochastic_depth_is_here():
    made_of = {name: getattr(constructor, 'func', constructor) for name, constructor in MODELS.items()}
    having = {family for family in made_of.values() if hasattr(family, 'drop_path')}
    assert having == {made_of[name] for name in NETWORKS} | {Clip}  # whose image tower has it


@pytest.mark.parametrize('name', NETWORKS)
def test_in_a_network(name):
    module, image = create_model(name, **NETWORKS[name], drop_path=0.5), jnp.ones((16, 16, 16, 3))
    image += jax.random.normal(jax.random.key(1), image.shape)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: 1 + 0.2 * rng.standard_normal(s.shape).astype(np.float32), shapes)

    def branches(variables, train):
        seen = []

        def record(run, args, kwargs, context):
            y = run(*args, **kwargs)
            if isinstance(context.module, DropPath) and context.module.rate:
                seen.append((args[0], y, context.module.rate))
            return y

        with nn.intercept_methods(record):
            module.apply(variables, image, train=train, mutable=['batch_stats'], rngs={'dropout': jax.random.key(2)})
        return seen

    for train in (True, False):
        seen = jax.jit(branches, static_argnums=1)(variables, train)
        assert seen
        for x, y, rate in seen:
            assert len(x) == len(image)
            assert 0 < assert_whole_examples(x, y, float(rate) if train else 0).sum() <= (15 if train else 16)
