"""mixup and cutmix against their closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.data.mixing import cutmix, mixup

BATCH, SIDE = 8, 16
MIXUP = jax.jit(partial(mixup, alpha=0.4))
CUTMIX = jax.jit(partial(cutmix, alpha=1.0))


@pytest.fixture(scope='module')
def batch():
    """Image i is filled with i + 1, target i is one-hot i: what came from whom can be read off."""
    image = jnp.broadcast_to(jnp.arange(1.0, BATCH + 1)[:, None, None, None], (BATCH, SIDE, SIDE, 3))
    return image, jnp.eye(BATCH)


@pytest.mark.parametrize('seed', range(3))
def test_mixup_blends_pairs_by_the_same_share(batch, seed):
    image, target = MIXUP(jax.random.key(seed), *batch)
    values = np.arange(1, BATCH + 1)
    np.testing.assert_allclose(image[:, 0, 0, 0], target @ values, rtol=1e-5)
    assert np.ptp(image, axis=(1, 2, 3)).max() == 0
    np.testing.assert_allclose(target.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(target.sum(0), 1, rtol=1e-5)  # partners are a permutation
    shares = np.unique(np.round(target[target > 1e-6], 5))
    assert len(shares) <= 3 and (len(shares) == 1 or shares[0] + shares[1] == pytest.approx(1, abs=1e-4))


@pytest.mark.parametrize('seed', range(6))
def test_cutmix_target_is_the_share_of_pixels(batch, seed):
    image, target = CUTMIX(jax.random.key(seed), *batch)
    for i in range(BATCH):
        shares = np.bincount(np.asarray(image[i, :, :, 0], int).ravel(), minlength=BATCH + 1)[1:] / SIDE**2
        np.testing.assert_allclose(target[i], shares, atol=1e-6)
    pasted = np.argwhere(np.asarray(image[0, :, :, 0]) != 1)
    if len(pasted):
        (top, left), (bottom, right) = pasted.min(0), pasted.max(0)
        assert len(pasted) == (bottom - top + 1) * (right - left + 1)  # one full rectangle


def test_cutmix_area_follows_beta(batch):
    """Where the border does not clip the box, its share is 1 - λ, uniform for α = 1; clipping only shrinks it."""
    areas = []
    for seed in range(200):
        image, _ = CUTMIX(jax.random.key(seed), *batch)
        areas.append(max(float((image[i] != i + 1).mean()) for i in (0, 1)))  # 0 where i is its own partner
    assert 0.2 < np.mean(areas) < 0.4 and min(areas) < 0.05 and max(areas) > 0.7


@pytest.mark.parametrize('function', [mixup, cutmix])
def test_alpha_zero_changes_nothing_and_dtype_stays(batch, function):
    image, target = function(jax.random.key(0), *batch, 0.0)
    assert image is batch[0] and target is batch[1]
    mixed = jax.eval_shape(partial(function, alpha=1.0), jax.random.key(0), batch[0].astype(jnp.bfloat16), batch[1])
    assert [array.dtype for array in mixed] == [jnp.bfloat16, jnp.float32]
