import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.objectives.perturb import random_view, warp


def warped(image, matrix, offset):
    """The same in float64, pixel by pixel: every output place reads the four neighbours of where it came from."""
    height, width, _ = image.shape
    centre, inverse = np.array([(height - 1) / 2, (width - 1) / 2]), np.linalg.inv(np.float64(matrix))
    out = np.zeros(image.shape)
    for i in range(height):
        for j in range(width):
            y, x = inverse @ (np.array([i, j]) - centre - offset) + centre
            top, left = int(np.floor(y)), int(np.floor(x))
            for r, c in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= r < height and 0 <= c < width:
                    out[i, j] += (1 - abs(y - r)) * (1 - abs(x - c)) * image[r, c]
    return out


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(16, 7, 9, 2)).astype(np.float32)


def test_warp_equals_bilinear_reading_written_out(images):
    rng = np.random.default_rng(1)
    for image in images[:5]:
        matrix, offset = np.eye(2) + 0.2 * rng.normal(size=(2, 2)), rng.uniform(-2, 2, 2)
        np.testing.assert_allclose(jax.jit(warp)(image, matrix, offset), warped(image, matrix, offset), atol=2e-5)


def test_whole_shift_moves_pixels_and_fills_with_zeros(images):
    moved = np.asarray(jax.jit(warp)(images[0], jnp.eye(2), jnp.array([2.0, -1.0])))
    np.testing.assert_allclose(moved[2:, :-1], images[0][:-2, 1:], atol=1e-6)
    assert not moved[:2].any() and not moved[:, -1].any()


def test_flip_mirrors_about_half_of_the_images_exactly(images):
    many = np.tile(images, (8, 1, 1, 1))
    seen = np.asarray(jax.jit(random_view(flip=True))(jax.random.key(0), many))
    mirrored = np.array([np.allclose(s, m[:, ::-1], atol=1e-6) for s, m in zip(seen, many, strict=True)])
    same = np.array([np.allclose(s, m, atol=1e-6) for s, m in zip(seen, many, strict=True)])
    assert (mirrored ^ same).all() and 40 < mirrored.sum() < 88


def test_a_view_is_a_function_of_the_key_and_differs_between_images(images):
    views = jax.jit(random_view(translation=2.0, affine=0.1, noise=0.1))
    same = np.broadcast_to(images[:1], images.shape)
    first, again, other = views(jax.random.key(3), same), views(jax.random.key(3), same), views(jax.random.key(4), same)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[0] - first[1]).max() > 0.1 and np.abs(first - other).max() > 0.1


def test_translation_is_uniform_within_its_range():
    dots = np.zeros((2000, 13, 13, 1), np.float32)
    dots[:, 6, 6] = 1.0
    seen = np.asarray(jax.jit(random_view(translation=2.0))(jax.random.key(0), dots))[..., 0]
    place = np.arange(13) - 6.0
    rows, columns = seen.sum(2) @ place, seen.sum(1) @ place  # the centre of mass of a dot read bilinearly is its place
    for shift in (rows, columns):
        assert np.abs(shift).max() < 2 + 1e-4
        np.testing.assert_allclose([shift.mean(), shift.std()], [0, 2 / np.sqrt(3)], atol=0.1)
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.1


def test_affine_entries_have_their_spread():
    squares = np.zeros((4000, 41, 41, 1), np.float32)
    squares[:, 15:26, 15:26] = 1.0
    area = np.asarray(jax.jit(random_view(affine=0.1))(jax.random.key(0), squares)).sum((1, 2, 3)) / 121
    # The area of the image of a square is |det A|; with A = I + E its variance is 2 σ² + 2 σ⁴ … and its mean 1.
    np.testing.assert_allclose([area.mean(), area.std()], [1, np.sqrt(2 * 0.01 + 2 * 0.0001)], atol=0.01)


def test_fill_stands_where_nothing_was():
    even = np.full((64, 7, 9, 1), -1.0, np.float32)
    view = random_view(translation=2.0, affine=0.1, fill=-1.0)
    np.testing.assert_allclose(jax.jit(view)(jax.random.key(0), even), even, atol=1e-6)
    assert np.asarray(jax.jit(random_view(translation=2.0))(jax.random.key(0), even)).max() > -0.5


def test_noise_has_its_deviation_on_images_and_on_vectors(images):
    for inputs in (images, images.reshape(16, -1)):
        apart = np.asarray(jax.jit(random_view(noise=0.5))(jax.random.key(0), inputs)) - inputs
        np.testing.assert_allclose([apart.mean(), apart.std()], [0, 0.5], atol=0.04)


def test_no_view_is_the_image_itself(images):
    np.testing.assert_array_equal(random_view()(jax.random.key(0), images), images)


def test_what_cannot_be_is_refused(images):
    with pytest.raises(UserError, match='view.noise: must be at least 0'):
        random_view(noise=-1.0)
    with pytest.raises(UserError, match='only images can move'):
        random_view(translation=1.0)(jax.random.key(0), images.reshape(16, -1))
