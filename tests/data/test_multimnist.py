"""MultiMNIST: made as in the authors' code, and pinned, since it is drawn anew by whoever builds it."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from tl_jax.data import open_source
from tl_jax.data.multimnist import overlaid, partners
from tl_jax.errors import UserError

# sha256 of images, left and right labels of seed 0
PINNED = {
    'test': 'b3da491d963d8e1f1e85ae691660ca567f965280c7ed6610919e9f65b2e4998c',
    'train': '8747d2aa6fa0e706c33aa3bee82f24e6320847cebed51f7b3eb1b0173371fa4c',
}


def one_by_one(left, right):
    """multi_mnist_loader.py's steps on one pair, the resize by Pillow."""
    canvas = np.zeros((36, 36))
    canvas[0:28, 0:28] = left
    canvas[6:34, 6:34] = right
    canvas[6:28, 6:28] = np.maximum(left[6:28, 6:28], right[0:22, 0:22])
    return np.asarray(Image.fromarray(canvas.astype(np.uint8)).resize((28, 28), Image.Resampling.NEAREST))


def test_overlay_is_the_loaders():
    left, right = np.random.default_rng(0).integers(0, 256, (2, 5, 28, 28), dtype=np.uint8)
    np.testing.assert_array_equal(overlaid(left, right), [one_by_one(a, b) for a, b in zip(left, right, strict=True)])


def save(path, size=(28, 28)):
    rng = np.random.default_rng(1)
    arrays = {'x_train': rng.integers(0, 256, (40, *size), dtype=np.uint8), 'y_train': rng.integers(0, 10, 40)}
    np.savez(path / 'digits.npz', **arrays)
    return arrays


def test_examples_have_two_labels(tmp_path):
    arrays = save(tmp_path)
    spec = f'multimnist:{tmp_path}/digits.npz/train'
    source = open_source(spec)
    other = partners(40, 0)
    for i in (0, 17, 39):
        example = source.get(i)
        assert set(example) == {'image', 'label_left', 'label_right'}
        assert example['label_left'] == arrays['y_train'][i] and example['label_right'] == arrays['y_train'][other[i]]
        expected = one_by_one(arrays['x_train'][i], arrays['x_train'][other[i]])
        np.testing.assert_array_equal(example['image'][..., 0], expected)
    assert source.length == 40 and len(source.class_names) == 10
    reseeded = open_source(spec, seed=1)
    assert any((reseeded.get(i)['image'] != source.get(i)['image']).any() for i in range(40))
    assert open_source(spec + '[:50%]').length == 20


def test_other_sizes_are_refused(tmp_path):
    save(tmp_path, (20, 28))
    with pytest.raises(UserError, match=r'expected digits of 28 × 28 × 1'):
        open_source(f'multimnist:{tmp_path}/digits.npz/train')


@pytest.mark.shared
@pytest.mark.parametrize('split', ['test', 'train'])
def test_the_draw_is_pinned(shared, split):
    source = open_source(f'multimnist:{shared("data/mnist.npz")}/{split}')
    examples = [source.get(i) for i in range(source.length)]
    digest = hashlib.sha256()
    for field, kind in (('image', np.uint8), ('label_left', '<i4'), ('label_right', '<i4')):
        digest.update(np.stack([example[field] for example in examples]).astype(kind).tobytes())
    assert digest.hexdigest() == PINNED[split]
