"""Each transform against its closed form or Pillow; RandAugment's and the colours' ranges; configuration errors."""

import colorsys
import re

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tl_jax.data import augment, list_transforms, make_transform
from tl_jax.data import transforms as T
from tl_jax.errors import UserError

# One working set of options for every transform that needs some.
OPTIONS = {
    'resize': {'size': 9},
    'center_crop': {'size': 6},
    'random_crop': {'size': 10, 'padding': 2},
    'random_resized_crop': {'size': (6, 7)},
    'pad': {'padding': 2},
    'rotate': {'degrees': 30},
    'normalize': {'mean': [0.5] * 3, 'std': [0.25] * 3},
    'standardize': {'mean': [0.5] * 3, 'std': [0.25] * 3},
    'noise': {'stddev': 0.1},
    'multiply': {'factor': 0.5},
    'cutout': {'length': 4},
    'color_jitter': {'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.1},
}


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.mark.parametrize('name', list_transforms())
@pytest.mark.parametrize('channels', [1, 3])
def test_pure_in_image_and_rng(name, channels, image):
    options = {k: v[:channels] if k in ('mean', 'std') else v for k, v in OPTIONS.get(name, {}).items()}
    transform = make_transform([{'name': name, **options}])
    image = image[..., :channels]
    image.flags.writeable = False
    example = {'image': image, 'label': 3}
    before = image.copy()
    first, again = (transform(example, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first['image'], again['image'])
    np.testing.assert_array_equal(image, before)
    assert first['label'] == 3 and first['image'].ndim == 3


def test_order_and_field():
    transform = make_transform(['to_float', {'name': 'normalize', 'mean': [0.5], 'std': [0.5]}])
    assert transform({'image': np.full((1, 1, 1), 255, np.uint8)}, None)['image'] == 1
    transform = make_transform([{'name': 'standardize', 'mean': [1.0, 2.0], 'std': [2.0, 4.0]}])
    assert transform({'inputs': np.array([3, 10], np.float32)}, None)['inputs'].tolist() == [1, 2]


def test_elementwise_tail_equals_one_by_one(image):
    items = ['flip', 'to_float', 'reverse_channels', {'name': 'normalize', **OPTIONS['normalize']}]
    first, last = T.split_elementwise(items)
    assert first == ['flip'] and len(last) == 3
    batch = np.stack([image, image[::-1]])
    together = make_transform(last)({'image': batch}, None)['image']
    for one, whole in zip(batch, together, strict=True):
        np.testing.assert_array_equal(make_transform(last)({'image': one}, None)['image'], whole)


def test_resize(image, rng):
    pil = Image.fromarray(image)
    np.testing.assert_array_equal(
        T.resize(image, rng, size=5), np.asarray(pil.resize((5, 6), Image.Resampling.BILINEAR))
    )
    np.testing.assert_array_equal(
        T.resize(image, rng, size=(7, 20), interpolation='bicubic'),
        np.asarray(pil.resize((20, 7), Image.Resampling.BICUBIC)),
    )
    checkers = (np.indices((8, 8)).sum(0)[..., None] % 2 * 200).astype(np.uint8)
    small = T.resize(checkers, rng, size=2)
    assert abs(small.astype(int) - 100).max() < 10  # antialiased, not sampled
    many = np.concatenate([image, image[..., :2]], axis=-1)
    np.testing.assert_array_equal(T.resize(many, rng, size=5)[..., :3], T.resize(image, rng, size=5))


def test_crops_hold_the_right_pixels(image, rng):
    np.testing.assert_array_equal(T.center_crop(image, rng, size=(6, 4)), image[3:9, 3:7])
    padded = T.center_crop(image, rng, size=14)
    np.testing.assert_array_equal(padded[1:13, 2:12], image)
    assert padded.sum() == image.sum()
    corners = set()
    numbered = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    for _ in range(200):
        crop = T.random_crop(numbered, rng, size=3)
        corners.add(int(crop[0, 0, 0]))
        np.testing.assert_array_equal(crop - crop[0, 0, 0], numbered[:3, :3])
    assert corners == {0, 1, 4, 5}
    reflected = T.random_crop(numbered, rng, size=8, padding=2, mode='reflect')
    assert reflected[0, :, 0].tolist() == [10, 9, 8, 9, 10, 11, 10, 9]


def test_random_resized_crop(rng):
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 200, 1))
    np.testing.assert_array_equal(T.random_resized_crop(ramp, rng, size=200, scale=(1, 1), ratio=(1, 1)), ramp)
    boxes = np.array([T._inception_box(100, 200, rng, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(3000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 100).all() and (left + width <= 200).all()
    share, aspect = height * width / 20000, width / height
    assert share.min() > 0.07 and aspect.min() > 0.73 and aspect.max() < 1.37
    assert abs(np.log(aspect[share < 0.4]).mean()) < 0.02  # log-uniform: a ratio and its inverse are equally likely
    assert T._inception_box(10, 1000, rng, (0.9, 1), (3 / 4, 4 / 3)) == (0, 493, 10, 13)


def test_pad(image, rng):
    padded = T.pad(image, rng, padding=(1, 2, 3, 0), fill=7)
    assert padded.shape == (15, 13, 3) and (padded[0] == 7).all() and (padded[:, :3] == 7).all()
    np.testing.assert_array_equal(padded[1:13, 3:], image)
    assert T.pad(image, rng, padding=(1, 2)).shape == (14, 14, 3)


def test_flip_is_an_involution(image, rng):
    for axis, flipped in (('horizontal', image[:, ::-1]), ('vertical', image[::-1])):
        once = T.flip(image, rng, probability=1, axis=axis)
        np.testing.assert_array_equal(once, flipped)
        np.testing.assert_array_equal(T.flip(once, rng, probability=1, axis=axis), image)
    assert T.flip(image, rng, probability=0) is image
    count = sum(T.flip(image, rng) is not image for _ in range(1000))
    assert 440 < count < 560


def test_rotation_by_quarter_turns_is_exact(image, rng):
    square = image[:10]
    np.testing.assert_array_equal(T.rotate(square, rng, degrees=(90, 90)), np.rot90(square))
    np.testing.assert_array_equal(T.rotate(image, rng, degrees=(180, 180)), np.rot90(image, 2))
    np.testing.assert_array_equal(T.rotate(image, rng, degrees=0), image)


def test_zoom(rng):
    image = np.zeros((8, 8, 1), np.uint8)
    image[3:5, 3:5] = 100
    double = T.zoom(image, rng, scale=(2, 2), interpolation='nearest')
    assert (double[2:6, 2:6] == 100).all() and double.sum() == 16 * 100
    half = T.zoom(np.full((8, 8, 1), 50, np.uint8), rng, scale=(0.5, 0.5), interpolation='nearest', fill=9)
    assert (half[2:6, 2:6] == 50).all() and (half == 9).sum() == 48


def test_to_float_and_normalize_are_exact(image, rng):
    unit = T.to_float(image, rng)
    np.testing.assert_array_equal(unit, image.astype(np.float32) / np.float32(255))
    assert unit.dtype == np.float32 and T.to_float(unit, rng) is unit
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = (image / 255 - mean) / std
    for start in (image, unit):
        np.testing.assert_allclose(T.normalize(start, rng, mean=mean, std=std), expected, atol=1e-6)
        caffe = T.normalize(start, rng, mean=[104, 117, 123], std=[1], max_value=255)
        np.testing.assert_allclose(caffe, image - np.array([104.0, 117, 123]), atol=1e-4)
    inception = T.normalize(image, rng, mean=[0.5], std=[0.5])
    np.testing.assert_allclose(inception, image / 127.5 - 1, atol=1e-6)
    with pytest.raises(UserError, match='2 values of mean for 3 channels'):
        T.normalize(image, rng, mean=[0, 0], std=[1])


def test_noise(rng):
    grey = np.full((100, 100, 1), 128, np.uint8)
    noisy = T.noise(grey, rng, stddev=0.1)
    assert noisy.dtype == np.uint8 and abs(noisy.std() / 255 - 0.1) < 0.005 and abs(noisy.mean() - 128) < 1
    floats = T.noise(T.to_float(grey, rng), rng, stddev=0.1)
    assert floats.dtype == np.float32 and abs(floats.std() - 0.1) < 0.005


def test_cutout_is_one_clipped_square(rng):
    ones = np.ones((9, 9, 2), np.uint8)
    areas = set()
    for _ in range(300):
        hole = np.argwhere(T.cutout(ones, rng, length=4)[..., 0] == 0)
        (top, left), (bottom, right) = hole.min(0), hole.max(0)
        assert len(hole) == (bottom - top + 1) * (right - left + 1)
        areas.add((int(bottom - top + 1), int(right - left + 1)))
    assert areas == {(h, w) for h in (2, 3, 4) for w in (2, 3, 4)}
    assert (T.cutout(ones, rng, length=99, fill=5) == 5).all()


def test_channels(image, rng):
    luma = np.asarray(Image.fromarray(image).convert('L'))
    np.testing.assert_array_equal(T.to_gray(image, rng)[..., 0], luma)
    np.testing.assert_array_equal(T.grayscale(image, rng), np.dstack([luma] * 3))
    assert np.abs(T.to_gray(T.to_float(image, rng), rng)[..., 0] * 255 - luma).max() < 1
    np.testing.assert_array_equal(T.to_rgb(image[..., :1], rng), np.dstack([image[..., 0]] * 3))
    np.testing.assert_array_equal(T.reverse_channels(image, rng), image[..., ::-1])


def test_color_jitter(image, rng):
    assert augment.color_jitter(image, rng) is image
    doubled = augment.on_pil(image, lambda plane: ImageEnhance.Brightness(plane).enhance(2))
    assert np.abs(doubled.astype(int) - np.minimum(2 * image.astype(int), 255)).max() <= 1
    factors = []
    grey = np.full((1, 1, 3), 100, np.uint8)
    for _ in range(500):
        factors.append(augment.color_jitter(grey, rng, brightness=0.5)[0, 0, 0] / 100)
    assert 0.49 <= min(factors) < 0.55 and 1.45 < max(factors) <= 1.5 and abs(np.mean(factors) - 1) < 0.06
    assert (augment.color_jitter(image, rng, saturation=0.5).mean(-1) - image.mean(-1)).std() < 40
    gray = image[..., :1]
    np.testing.assert_array_equal(augment.color_jitter(gray, rng, saturation=1, hue=0.5), gray)
    with pytest.raises(UserError, match=r'hue=0.6 must lie in 0 … 0.5'):
        augment.color_jitter(image, rng, hue=0.6)


def test_hue_shift_turns_the_colour_circle():
    red = Image.new('RGB', (1, 1), (255, 0, 0))
    for turns, rgb in ((1 / 3, (0, 255, 0)), (-1 / 3, (0, 0, 255)), (0.5, (0, 255, 255))):
        hue = colorsys.rgb_to_hsv(*(v / 255 for v in augment.shift_hue(red, turns).getpixel((0, 0))))[0]
        assert abs(hue - colorsys.rgb_to_hsv(*rgb)[0]) < 0.02


def test_rand_augment_operations(image):
    """torchvision's table at full strength: 0.3 of shear, 150/331 of translation, 30°, ±0.9, 4 bits, threshold 0."""
    pil = Image.fromarray(image)

    def run(name, sign=1, strength=1.0):
        return augment.OPERATIONS[name](image, strength, sign, 0)

    assert len(augment.OPERATIONS) == 14
    np.testing.assert_array_equal(run('identity'), image)
    np.testing.assert_array_equal(run('shear_x')[0], image[0])
    np.testing.assert_array_equal(run('shear_x')[10, :7], image[10, 3:])  # row y shifts by 0.3 y
    np.testing.assert_array_equal(run('shear_y')[:9, 9], image[3:, 9])  # column x by 0.3 x
    np.testing.assert_array_equal(run('translate_x')[:, 4:], image[:, :-4])  # int(150 / 331 * 10) to the right
    np.testing.assert_array_equal(run('translate_y', -1)[:-5], image[5:])
    np.testing.assert_array_equal(run('rotate'), np.asarray(pil.rotate(30)))
    np.testing.assert_array_equal(run('brightness', -1), np.asarray(ImageEnhance.Brightness(pil).enhance(0.1)))
    np.testing.assert_array_equal(run('color'), np.asarray(ImageEnhance.Color(pil).enhance(1.9)))
    np.testing.assert_array_equal(run('contrast'), np.asarray(ImageEnhance.Contrast(pil).enhance(1.9)))
    np.testing.assert_array_equal(run('sharpness'), np.asarray(ImageEnhance.Sharpness(pil).enhance(1.9)))
    np.testing.assert_array_equal(run('posterize'), image & 0xF0)
    np.testing.assert_array_equal(run('posterize', strength=0.0), image)
    np.testing.assert_array_equal(run('solarize'), 255 - image)
    np.testing.assert_array_equal(run('solarize', strength=0.0), np.where(image == 255, 0, image))
    np.testing.assert_array_equal(run('autocontrast'), np.asarray(ImageOps.autocontrast(pil)))
    np.testing.assert_array_equal(run('equalize'), np.asarray(ImageOps.equalize(pil)))


def test_rand_augment(image, rng):
    outcomes = {augment.rand_augment(image, rng, num_ops=1, magnitude=15).tobytes() for _ in range(400)}
    assert 20 <= len(outcomes) <= 23  # 9 signed operations twice, 5 others
    assert augment.rand_augment(image, rng, num_ops=0) is image
    with pytest.raises(UserError, match=r'magnitude=31 must lie in 0 … 30'):
        augment.rand_augment(image, rng, magnitude=31)


@pytest.mark.parametrize(
    ('items', 'message'),
    [
        (['filp'], "unknown transform 'filp'; did you mean 'flip'"),
        ([{'name': 'flip', 'probabilty': 1}], "flip has no option 'probabilty'; did you mean 'probability'"),
        (['resize'], 'resize needs size'),
        ([{'size': 3}], 'is neither a name nor dict'),
        ([3], '3 is neither a name nor dict'),
    ],
)
def test_bad_configuration(items, message):
    with pytest.raises(UserError, match=message):
        make_transform(items)


def test_multiply_rounds_and_clips_bytes_and_leaves_floats_their_range(rng):
    bits = np.array([[[0], [1]], [[1], [0]]], np.uint8)
    white = T.multiply(bits, rng, factor=255)
    assert white.dtype == np.uint8 and white[..., 0].tolist() == [[0, 255], [255, 0]]
    halves = T.multiply(np.array([3, 7, 200], np.uint8), rng, factor=1.5)
    assert halves.tolist() == [4, 10, 255]  # 4.5 and 10.5 are rounded to even
    np.testing.assert_allclose(T.multiply(np.array([0.5, 2.0], np.float32), rng, factor=3), [1.5, 6.0])


def test_bad_use(image, rng):
    with pytest.raises(UserError, match=re.escape('random_crop of 20×20 from 12×10; add a resize before it')):
        T.random_crop(image, rng, size=20)
    with pytest.raises(UserError, match="unknown interpolation 'bilinaer'; did you mean 'bilinear'"):
        T.resize(image, rng, size=3, interpolation='bilinaer')
    with pytest.raises(UserError, match="flip has no axis 'up'"):
        T.flip(image, rng, axis='up')
    with pytest.raises(UserError, match='need a uint8 image; put to_float and normalize after them'):
        T.resize(T.to_float(image, rng), rng, size=3)
