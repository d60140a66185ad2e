"""Every kind of source on small files made here, slices, shots, and each kind of bad input."""

import gzip
import json
import re
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from tl_jax.data import class_weights, num_classes, open_files, open_source
from tl_jax.data.base import stratified_order
from tl_jax.errors import UserError


def refuses(message: str):
    """The block raises a UserError of one line that matches."""
    return pytest.raises(UserError, match=re.compile(rf'^[^\n]*{message}[^\n]*$'))


@pytest.fixture
def pets(tmp_path):
    """Two classes of images in every format and mode that occurs in the wild; 3 cats, 2 dogs."""
    root = tmp_path / 'pets'
    (root / 'dog').mkdir(parents=True)
    (root / 'cat' / 'more').mkdir(parents=True)
    colour = np.arange(12 * 8 * 3, dtype=np.uint8).reshape(12, 8, 3)
    Image.fromarray(colour).save(root / 'cat' / 'a.png')
    Image.fromarray(colour[..., 0]).save(root / 'cat' / 'b.jpg', quality=95)
    Image.fromarray(np.dstack([colour, colour[..., :1]])).save(root / 'cat' / 'more' / 'c.png')
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it
    Image.fromarray(colour).save(root / 'dog' / 'a.png', exif=exif)
    Image.fromarray(colour).quantize(16).save(root / 'dog' / 'b.gif')
    (root / 'dog' / 'notes.txt').write_text('not an image')
    (root / 'dog' / '.hidden.png').write_text('nor this')
    return root, colour


def test_folder_reads_every_mode_as_rgb(pets):
    root, colour = pets
    source = open_source(f'folder:{root}')
    assert source.class_names == ('cat', 'dog') and num_classes(source) == 2
    assert source.labels.tolist() == [0, 0, 0, 1, 1] and source.labels.dtype == np.int32
    images = [source.get(i)['image'] for i in range(source.length)]
    assert [image.shape for image in images] == [(12, 8, 3)] * 3 + [(8, 12, 3), (12, 8, 3)]
    assert all(image.dtype == np.uint8 for image in images)
    np.testing.assert_array_equal(images[0], colour)
    np.testing.assert_array_equal(images[2], colour)  # the alpha channel is dropped
    np.testing.assert_array_equal(images[3], np.rot90(colour, -1))
    assert open_source(f'folder:{root}', channels=1).get(0)['image'].shape == (12, 8, 1)


def test_folder_keeps_the_numbering_of_class_names(pets):
    root, _ = pets
    source = open_source(f'folder:{root}', class_names=['bird', 'cat', 'dog'])
    assert source.labels.tolist() == [1, 1, 1, 2, 2] and source.class_names == ('bird', 'cat', 'dog')
    with refuses("folder 'dog' is not in class_names; did you mean 'dogs'"):
        open_source(f'folder:{root}', class_names=['cat', 'dogs'])


def test_16_bit_grey_keeps_its_high_byte(tmp_path):
    (tmp_path / 'a').mkdir()
    Image.fromarray(np.array([[0, 300], [0x8000, 0xFFFF]], np.uint16)).save(tmp_path / 'a' / 'x.png')
    image = open_source(f'folder:{tmp_path}', channels=1).get(0)['image']
    assert image[..., 0].tolist() == [[0, 1], [128, 255]]


def test_decoded_images_stay_in_memory_up_to_the_limit(pets):
    root, _ = pets
    kept, anew = open_source(f'folder:{root}'), open_source(f'folder:{root}', cache_bytes=100)
    assert kept.get(0)['image'] is kept.get(0)['image']
    assert anew.get(0)['image'] is not anew.get(0)['image']
    with pytest.raises(ValueError, match='read-only'):
        kept.get(0)['image'][:] = 0


def test_folder_bad_input(pets, tmp_path):
    root, _ = pets
    with refuses(r"'pest' does not exist in .*did you mean 'pets'"):
        open_source(f'folder:{tmp_path}/pest')
    with refuses("'nowhere' does not exist"):
        open_source('folder:/nowhere/at/all')
    with refuses('no class folders .it holds images itself.; make one folder per class'):
        open_source(f'folder:{root}/cat/more')
    (tmp_path / 'splits' / 'train' / 'cat').mkdir(parents=True)
    (tmp_path / 'splits' / 'val').mkdir(parents=True)
    with refuses(r'holds splits, not classes; use folder:.*/splits/train'):
        open_source(f'folder:{tmp_path}/splits')
    (root / 'eel').mkdir()
    with refuses("class folder 'eel' holds no image"):
        open_source(f'folder:{root}')


@pytest.mark.parametrize('damage', ['truncated', 'text', 'empty', 'postscript', 'bomb'])
def test_unreadable_image_is_named_or_skipped(pets, damage, capsys):
    root, _ = pets
    bad = root / 'cat' / 'a.png'
    data = bad.read_bytes()
    bad.write_bytes(
        {
            'truncated': data[: len(data) // 2],
            'text': b'hello',
            'empty': b'',
            'postscript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n',
            # A header that declares 60000 × 60000 pixels.
            'bomb': data[:16] + struct.pack('>II', 60000, 60000) + data[24:],
        }[damage]
    )
    source = open_source(f'folder:{root}')
    with refuses(r'cat/a\.png: not a readable image \(.+\)'):
        source.get(0)
    source = open_source(f'folder:{root}', unreadable='skip')
    assert source.length == 4 and source.labels.tolist() == [0, 0, 1, 1]
    assert [source.get(i)['label'] for i in range(4)] == [0, 0, 1, 1]
    assert 'skipped 1 of 5 images' in capsys.readouterr().err
    with refuses("known: 'error', 'skip'"):
        open_source(f'folder:{root}', unreadable='ignore')


def test_max_pixels(pets):
    root, _ = pets
    with refuses('8×12 is more than max_pixels=95'):
        open_source(f'folder:{root}', max_pixels=95).get(0)


def test_files_for_prediction(pets):
    root, colour = pets
    source = open_files([root / 'dog', root / 'cat' / 'a.png'])
    assert source.length == 3 and source.labels is None
    assert set(source.get(2)) == {'image'} and np.array_equal(source.get(2)['image'], colour)
    with refuses('does not exist'):
        open_files([root / 'fox.png'])


def test_csv_of_paths(pets):
    root, colour = pets
    table = root / 'list.csv'
    table.write_text('label,path\ndog,dog/a.png\ncat,cat/a.png\n')
    for spec, options in ((f'folder:{table}', {}), (f'csv:{table}', {'image': 'path'})):
        source = open_source(spec, **options)
        assert source.labels.tolist() == [1, 0] and source.class_names == ('cat', 'dog')
        np.testing.assert_array_equal(source.get(1)['image'], colour)
    table.write_text('path,label\ndog/a.png,0\ncat/z.png,1\n')
    with refuses("line 3: 'z.png' does not exist"):
        open_source(f'folder:{table}')
    table.write_text('file,label\ndog/a.png,0\n')
    with refuses("no column 'path'; known: file, label"):
        open_source(f'folder:{table}')


def test_csv_and_jsonl_tables(tmp_path):
    csv, jsonl = tmp_path / 't.csv', tmp_path / 't.jsonl'
    csv.write_text('a,label,b\n1,0,2.5\n-3,1,4e2\n')
    jsonl.write_text('{"a": [1, 2.5], "label": 0}\n\n{"a": [-3, 400.0], "label": 1}\n')
    for spec in (f'csv:{csv}', f'jsonl:{jsonl}'):
        source = open_source(spec)
        assert source.labels.tolist() == [0, 1] and source.class_names is None
        assert source.get(0)['inputs'].tolist() == [1, 2.5] and source.get(1)['inputs'].dtype == np.float32
        assert source.get(1)['inputs'].tolist() == [-3, 400]
    assert open_source(f'csv:{csv}', label='label', inputs=['b']).get(0)['inputs'].tolist() == [2.5]


@pytest.mark.parametrize(
    ('names', 'labels'),
    [
        (['0', '2', '1'], [1, 2, 0]),
        (['2', '1', '0'], [0, 1, 2]),
        (['0', '1', '2'], [2, 1, 0]),
        (['cat', 'dog', 'eel'], [2, 1, 0]),
        (['3', '1', '2'], None),
    ],
)
def test_numbers_that_are_class_names(tmp_path, names, labels):
    (tmp_path / 't.csv').write_text('a,label\n1,2\n1,1\n1,0\n')
    if labels is None:
        with refuses("line 4: label '0' is not in class_names"):
            open_source(f'csv:{tmp_path}/t.csv', class_names=names)
        return
    source = open_source(f'csv:{tmp_path}/t.csv', class_names=names)
    assert source.labels.tolist() == labels and source.class_names == tuple(names)


def test_tables_of_texts(tmp_path):
    table = tmp_path / 'reviews.tsv'
    table.write_text('label\tsentence\ngood\tA "fine" film\nbad\tdull\n')
    source = open_source(f'tsv:{table}', text='sentence', tokenizer='bytes', length=15)
    assert source.class_names == ('bad', 'good') and source.length == 2
    first = source.get(0)
    assert first['label'] == 1 and first['tokens'].dtype == np.int32
    assert bytes(int(t) - 1 for t in first['tokens'] if t).decode() == 'A "fine" film'
    assert first['tokens'].shape == (15,)
    with refuses(r"no column 'sentense'; .*'sentence'"):
        open_source(f'tsv:{table}', text='sentense')
    with refuses("tokenizer: there is no 'word'"):
        open_source(f'tsv:{table}', text='sentence', tokenizer='word')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'has no rows'),
        ('a,label\n', 'has no rows'),
        ('a,lable\n1,0\n', "no column 'label'; did you mean 'lable'"),
        ('a,label,a\n1,0,2\n', "column 'a' occurs twice"),
        ('a,label\n1,0\n2\n', 'line 3: 1 fields for 2 columns'),
        ('a,label\n1,0\nnan,1\n', "line 3: a='nan' is not finite"),
        ('a,label\n1,0\n1e39,1\n', "line 3: a='1e39' is not finite in float32"),
        ('a,label\n1,0\nx,1\n', "line 3: a='x' is not a number"),
        ('a,label\n1,0\n2,1.5\n', 'line 3: label 1.5 is not a whole number'),
        ('a,label\n1,0\n2,\n', "line 3: label '' is missing"),
        ('a,label\n1,0\n2,nan\n', "line 3: label 'nan' is missing"),
        ('a,label\n1,0\n2,-1\n', r'label -1 of example 1 is out of range; expected 0 … 2 \(1 such\)'),
        ('a,label\n1,0\n2,3\n', 'label 3 of example 1 is out of range; expected 0 … 2'),
        ('a,label\n1,0\n2,1e12\n', 'label 1e12 is out of range'),
        ('a,label\n1,0\n2,cat\n', r"labels mix numbers \(.*line 2: '0'\) and names \(.*line 3: 'cat'\)"),
        ('a,label\n1,\xff\n'.encode('latin-1'), 'not a text file in UTF-8'),
        ('label\n0\n', 'no column is left for inputs'),
    ],
)
def test_bad_csv(tmp_path, text, message):
    file = tmp_path / 't.csv'
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with refuses(message):
        open_source(f'csv:{file}', num_classes=3)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"a": 1, "label": 0}\n{"a": NaN, "label": 0}\n', 'line 2: a=nan is not finite'),
        ('{"a": 1' + '0' * 400 + ', "label": 0}\n', 'line 1: a=10{40,}.* is not a number'),
        ('{"a": 1, "label": 0}\n{"a": null, "label": 0}\n', 'line 2: a=None is not a number'),
        ('{"a": 1, "label": 0}\n{"a": [1, 2], "label": 0}\n', 'line 2: 2 numbers, 1 in the rows before'),
        ('{"a": [], "label": 0}\n{"a": [1], "label": 0}\n', 'line 1: no number in a; fill'),
        ('{"a": 1, "label": 0}\n{"b": 1, "label": 0}\n', "line 2: column 'a' is not in every line"),
        ('{"a": 1, "label": 0}\n{"a": 1, \n', 'line 2: not JSON'),
        ('[1]\n', 'line 1: not an object'),
    ],
)
def test_bad_jsonl(tmp_path, text, message):
    (tmp_path / 't.jsonl').write_text(text)
    with refuses(message):
        open_source(f'jsonl:{tmp_path}/t.jsonl')


def test_npz_and_idx_agree(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (7, 5, 4), np.uint8), np.array([0, 1, 2, 0, 1, 2, 9], np.uint8)
    np.savez_compressed(tmp_path / 'm.npz', x_train=images, y_train=labels, pictures=images, kinds=labels[:, None])
    idx_file(tmp_path / 'train-images-idx3-ubyte.gz', images, gzip.open)
    idx_file(tmp_path / 'train-labels-idx1-ubyte', labels, open)
    for source in (
        open_source(f'npz:{tmp_path}/m.npz/train'),
        open_source(f'npz:{tmp_path}/m.npz', image_key='pictures', label_key='kinds'),
        open_source(f'idx:{tmp_path}/train'),
    ):
        assert source.length == 7 and source.labels.tolist() == labels.tolist() and num_classes(source) == 10
        np.testing.assert_array_equal(source.get(3)['image'], images[3][..., None])


def idx_file(file, array, opened):
    with opened(file, 'wb') as stream:
        stream.write(struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_bad_npz(tmp_path):
    file, images = tmp_path / 'm.npz', np.zeros((3, 4, 4), np.uint8)

    def check(message, spec='', options=None, **arrays):
        if arrays:
            np.savez(file, **arrays)
        with refuses(message):
            open_source(spec or f'npz:{file}/train', **(options or {}))

    good = {'x_train': images, 'y_train': np.arange(3)}
    check("no split 'trian'; did you mean 'train'", f'npz:{file}/trian', **good)
    check("'n.npz' does not exist .* did you mean 'm.npz'", f'npz:{tmp_path}/n.npz/train')
    check('expected npz:FILE.npz/SPLIT', f'npz:{tmp_path}/m/train')
    check("no array 'x_tran'", options={'image_key': 'x_tran', 'label_key': 'y_train'})
    check('give both', options={'image_key': 'x_train'})
    check('would take 0.0 GiB of memory; the limit is max_bytes=10', options={'max_bytes': 10})
    check('2 labels for 3 examples', x_train=images, y_train=np.arange(2))
    check('label 0.5 of example 1 is not a whole', x_train=images, y_train=np.array([0, 0.5, 1]))
    check('label nan of example 1 is not a whole', x_train=images, y_train=np.array([0, np.nan, 1]))
    check('label -2 of example 2 is out of range', x_train=images, y_train=np.array([0, 0, -2]))
    check('expected uint8 images', x_train=images.astype(np.float32), y_train=np.arange(3))
    check('example 1, feature 2 is not finite', x_train=np.array([[0] * 3, [0, 0, np.inf]]), y_train=np.arange(2))
    check('has no examples', x_train=images[:0], y_train=np.arange(0))
    check('no arrays x_SPLIT and y_SPLIT', a=images)
    file.write_bytes(file.read_bytes()[:-30])
    check('not a readable npz file')


def test_npz_never_runs_a_pickle_nor_trusts_a_header(tmp_path):
    file = tmp_path / 'm.npz'
    objects = np.array([print], dtype=object)
    np.savez(file, x_train=objects, y_train=np.arange(1), allow_pickle=True)
    with refuses("array 'x_train' holds pickled objects"):
        open_source(f'npz:{file}/train')
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 28, 28), }".ljust(117) + b'\n'
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('x_train.npy', b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header)
        archive.writestr('y_train.npy', b'junk')
    with refuses("array 'x_train' declares 784000000 bytes and holds 128"):
        open_source(f'npz:{file}/train')


def test_bad_idx(tmp_path):
    images, labels = tmp_path / 't10k-images-idx3-ubyte', tmp_path / 't10k-labels-idx1-ubyte'
    with refuses('no t10k-images'):
        open_source(f'idx:{tmp_path}/test')
    with refuses("no split 'tset'; did you mean 'test'"):
        open_source(f'idx:{tmp_path}/tset')
    idx_file(images, np.zeros((3, 2, 2), np.uint8), open)
    idx_file(labels, np.zeros(3, np.uint8), open)
    whole = images.read_bytes()
    for data, message in (
        (whole[:-1], 'declares 12 bytes and holds fewer'),
        (whole + b'x', 'holds more'),
        (whole[:3], 'not a readable idx'),
        (b'\x00\x00\x0d\x03' + whole[4:], 'not an idx file of unsigned bytes'),
        (whole[:4] + struct.pack('>3I', 2**31, 2**31, 2), 'GiB of memory'),
    ):
        images.write_bytes(data)
        with refuses(message):
            open_source(f'idx:{tmp_path}/test')


def test_digits_splits_are_fixed_and_stratified():
    whole = open_source('sklearn:digits')
    assert whole.length == 1797 and whole.get(0)['image'].shape == (8, 8, 1)
    assert max(whole.get(i)['image'].max() for i in range(20)) == 255
    parts = [open_source(f'sklearn:digits/{split}') for split in ('train', 'val', 'test')]
    assert [part.length for part in parts] == [600, 300, 897]
    for part in parts:
        expected = np.bincount(whole.labels) * part.length / whole.length
        assert np.abs(np.bincount(part.labels) - expected).max() < 2
    everything = {part.get(i)['image'].tobytes() for part in parts for i in range(part.length)}
    assert everything == {whole.get(i)['image'].tobytes() for i in range(whole.length)}
    order = stratified_order(whole.labels)
    assert sorted(order) == list(range(1797)) and order[:5].tolist() == [347, 303, 1266, 713, 1567]
    with refuses("no split 'vla'; did you mean 'val'"):
        open_source('sklearn:digits/vla')


def test_slices_are_disjoint_and_cover_everything():
    indices = [ids_of(f'sklearn:digits{part}') for part in ('[:80%]', '[80%:]', '[1000:1010]', '[:10]')]
    assert len(indices[0]) == 1437 and len(indices[1]) == 360
    assert indices[0] | indices[1] == ids_of('sklearn:digits') and not indices[0] & indices[1]
    assert len(indices[2]) == 10 and not indices[2] & indices[3]
    assert len(np.unique(open_source('sklearn:digits[:100]').labels)) == 10
    assert open_source('sklearn:digits/test[:10%]').length == 89
    for part, message in (
        ('[5:5]', 'is empty'),
        ('[:2000]', '2000 reaches beyond the 1797 examples'),
        ('[a:b]', 'is no slice'),
        ('[:150%]', '150% reaches beyond'),
    ):
        with refuses(message):
            open_source(f'sklearn:digits{part}')


def ids_of(spec):
    source = open_source(spec)
    return {source.get(i)['image'].tobytes() for i in range(source.length)}


def test_shots():
    source = open_source('sklearn:digits/train', shots=5)
    assert np.bincount(source.labels).tolist() == [5] * 10
    assert [source.get(i)['label'] for i in range(50)] == source.labels.tolist()
    again, other = (open_source('sklearn:digits/train', shots=5, shots_seed=s) for s in (0, 1))
    assert all(np.array_equal(source.get(i)['image'], again.get(i)['image']) for i in range(50))
    assert not all(np.array_equal(source.get(i)['image'], other.get(i)['image']) for i in range(50))
    with refuses(r"class '\d' has \d+ examples, fewer than shots=60"):
        open_source('sklearn:digits/train', shots=60)
    with refuses('shots=0 must be at least 1'):
        open_source('sklearn:digits/train', shots=0)


def test_unknown_kind_and_option(tmp_path):
    with refuses("unknown kind of data 'fodler'; did you mean 'folder'"):
        open_source('fodler:x')
    with refuses("unknown kind of data 'photos'"):
        open_source('photos')
    with refuses("names no data after 'csv'"):
        open_source('csv:')
    with refuses("unknown option 'shot'; did you mean 'shots'"):
        open_source('sklearn:digits', shot=5)
    with refuses("no such data set; did you mean 'digits'"):
        open_source('sklearn:digit')
    with refuses('label 9 of example 9 is out of range; expected 0 … 8'):
        open_source('sklearn:digits', num_classes=9)


def test_class_weights():
    weights = class_weights(np.array([0, 0, 0, 2]), 4)
    np.testing.assert_allclose(weights, [4 / 6, 0, 2, 0])
    assert weights.dtype == np.float32


@pytest.mark.shared
def test_mnist_as_published(shared):
    source = open_source(f'npz:{shared("data/mnist.npz")}/train')
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert source.length == 60000 and np.bincount(source.labels).tolist() == counts
    mean = np.mean([source.get(i)['image'].mean() for i in range(0, 60000, 60)]) / 255
    assert abs(mean - 0.13066) < 0.002


@pytest.mark.shared
def test_hymenoptera(shared, tmp_path):
    with tarfile.open(shared('data/hymenoptera.tar')) as archive:
        archive.extractall(tmp_path, filter='data')
    (root,) = tmp_path.glob('**/train')
    train = open_source(f'folder:{root}')
    val = open_source(f'folder:{root.parent}/val')
    assert (train.length, val.length) == (244, 153) and train.class_names == ('ants', 'bees')
    assert min(train.get(7)['image'].shape[:2]) <= 160
    with refuses('holds splits, not classes'):
        open_source(f'folder:{root.parent}')
    (root.parent / 'meta.json').write_text(json.dumps({}))


def test_omitted_classes_stay_classes():
    whole = open_source('sklearn:digits/train')
    without = open_source('sklearn:digits/train', omit=[3, 5])
    assert without.length == whole.length - np.isin(whole.labels, [3, 5]).sum()
    assert not np.isin(without.labels, [3, 5]).any() and without.class_names == whole.class_names
    assert without.get(0)['label'] == without.labels[0]
    with pytest.raises(UserError, match='sklearn:digits/train: omit names 10; the classes are 0 … 9'):
        open_source('sklearn:digits/train', omit=[10])
