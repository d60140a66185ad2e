import numpy as np
import pytest
from PIL import Image

from tl_jax import data
from tl_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Three characters of two drawings, at random."""
    bits = np.random.default_rng(0).random((6, 105, 105)) < 0.3
    np.savez(
        tmp_path / 'omniglot.npz',
        strokes=np.packbits(bits.reshape(6, -1), axis=1),
        character=np.array([0, 1, 2, 0, 1, 2], np.int32),
        names=np.array(['Latin/character01', 'Latin/character02', 'Greek/character01']),
    )
    (tmp_path / 'omniglot_splits').mkdir()
    lines = [
        f'{name}/rot{turn}' for name in ('Greek/character01', 'Latin/character02') for turn in ('000', '090', '270')
    ]
    (tmp_path / 'omniglot_splits' / 'test.txt').write_text('\n'.join(lines) + '\n')
    return tmp_path, bits


@pytest.mark.parametrize('interpolation', ['nearest', 'lanczos'])
def test_images_are_turned_and_resized_as_by_the_authors_code(folder, interpolation):
    """Pillow: of an image of bits turn, then resize; ours resizes first, once for the four turns."""
    path, bits = folder
    source = data.open_source(f'omniglot:{path}/test', size=14, interpolation=interpolation)
    assert (source.length, len(source.class_names)) == (12, 6)
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for i in range(12):
        character, turn = source.class_names[source.labels[i]].rsplit('/rot')
        drawing = bits[[2, 5] if character == 'Greek/character01' else [1, 4]][i % 2]
        page = Image.fromarray(~drawing).convert('1')  # the published images: paper is 1
        if interpolation == 'lanczos':
            page = page.convert('L')
        page = page.rotate(int(turn)).resize((14, 14), Image.Resampling[interpolation.upper()])
        expected = 1 - np.array(page, np.float32) / (1 if interpolation == 'nearest' else 255)
        example = source.get(i)
        assert example['label'] == source.labels[i]
        assert (example['image'].shape, example['image'].dtype) == ((14, 14, 1), np.uint8)
        np.testing.assert_allclose(
            example['image'][..., 0] / 255, expected, atol=4 / 255
        )  # Pillow rounds between its two passes


def test_what_is_not_omniglot(folder):
    path, _ = folder
    with pytest.raises(UserError, match="no split 'tset'; did you mean 'test'"):
        data.open_source(f'omniglot:{path}/tset')
    with pytest.raises(UserError, match="'train.txt' does not exist"):
        data.open_source(f'omniglot:{path}/train')
    with pytest.raises(UserError, match='size=0 must be at least 1'):
        data.open_source(f'omniglot:{path}/test', size=0)
    (path / 'omniglot_splits' / 'val.txt').write_text('Greek/character99/rot000\n')
    with pytest.raises(UserError, match=r"val.txt: 'Greek/character99/rot000' is no character.*Greek/character01"):
        data.open_source(f'omniglot:{path}/val')
    (path / 'omniglot.npz').write_bytes(b'no zip')
    with pytest.raises(UserError, match='omniglot.npz: not a readable npz file'):
        data.open_source(f'omniglot:{path}/test')


@pytest.mark.shared
def test_the_published_set(shared):
    source = data.open_source(f'omniglot:{shared("data/omniglot.npz").parent}/val')
    assert (source.length, len(source.class_names)) == (688 * 20, 688)
    assert source.class_names[:2] == ('Hebrew/character01/rot000', 'Hebrew/character01/rot090')
    images = np.stack([source.get(i)['image'] for i in range(80)]).reshape(4, 20, 28, 28)
    for turns in range(4):
        np.testing.assert_array_equal(images[turns], np.rot90(images[0], turns, (1, 2)))
    assert set(np.unique(images)) == {0, 255}
    assert 0.03 < (images > 0).mean() < 0.2, 'ink is 255 and rare'
