import numpy as np
import pytest

from tl_jax import data
from tl_jax.data.base import Source
from tl_jax.data.episodes import episodes
from tl_jax.errors import UserError

LABELS = np.repeat([0, 1, 2, 5], [4, 7, 5, 9]).astype(np.int32)  # uneven, and a number left out
LABELS = LABELS[np.random.default_rng(0).permutation(len(LABELS))]


def labelled(labels=LABELS, **changes):
    """Every image tells its own index."""
    get = lambda i: {'image': np.full((2, 2, 1), i, np.uint8), 'label': int(labels[i])}
    return Source('made:up', len(labels), get, labels)._replace(**changes)


def test_an_episode_holds_what_it_says():
    source = episodes(labelled(), ways=3, shots=2, queries=2, count=50)
    assert (source.length, source.labels) == (50, None)
    seen = set()
    for i in range(50):
        task = source.get(i)
        assert {name: value.shape for name, value in task.items()} == {
            'support_image': (6, 2, 2, 1),
            'support_label': (6,),
            'query_image': (6, 2, 2, 1),
            'query_label': (6,),
        }
        assert task['support_label'].tolist() == task['query_label'].tolist() == [0, 0, 1, 1, 2, 2]
        index = {part: task[f'{part}_image'][:, 0, 0, 0] for part in ('support', 'query')}
        assert len({*index['support'], *index['query']}) == 12, 'no example twice'
        classes = [LABELS[index['support'][[2 * k, 2 * k + 1]]] for k in range(3)]
        assert all(len(set(c)) == 1 for c in classes) and len({c[0] for c in classes}) == 3
        np.testing.assert_array_equal(LABELS[index['query']], LABELS[index['support']])
        seen |= {(c[0], k) for k, c in enumerate(classes)}
    assert seen == {(c, k) for c in (0, 1, 2, 5) for k in range(3)}, 'every class under every name'


def test_an_episode_is_a_function_of_seed_and_number():
    a, b, c = (episodes(labelled(), ways=2, shots=1, queries=1, seed=seed) for seed in (3, 3, 4))
    b.get(7), b.get(1)
    images = [[s.get(i)['support_image'].ravel().tolist() for i in range(20)] for s in (a, b, c)]
    assert images[0] == images[1] != images[2]
    assert len({str(task) for task in images[0]}) > 10


def test_examples_are_drawn_evenly():
    source = episodes(labelled(), ways=4, shots=1, queries=2)
    support = np.zeros(len(LABELS))
    for i in range(2000):
        support[source.get(i)['support_image'][:, 0, 0, 0]] += 1 / 2000
    expected = 1 / np.bincount(LABELS)[LABELS]
    # Four standard errors of a Bernoulli mean.
    assert (abs(support - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)).all()


def test_transforms_act_on_every_image_and_are_reproducible():
    source = lambda items: episodes(labelled(), ways=2, shots=2, queries=1, transform=items).get(3)
    plain, scaled = source([]), source(['to_float'])
    np.testing.assert_allclose(scaled['query_image'], plain['query_image'] / np.float32(255))
    noise = [{'name': 'noise', 'stddev': 0.1}]
    first, again = source(noise), source(noise)
    difference = first['support_image'].astype(float) - plain['support_image']
    np.testing.assert_array_equal(first['support_image'], again['support_image'])
    assert len(np.unique(difference)) > 8, 'every image its own noise'


def test_features_and_a_part_that_is_empty():
    table = Source(
        'made:up', len(LABELS), lambda i: {'inputs': np.full(3, i, np.float32), 'label': int(LABELS[i])}, LABELS
    )
    task = episodes(table, ways=2, shots=3, queries=0).get(0)
    assert set(task) == {'support_inputs', 'support_label'}
    assert task['support_inputs'].shape == (6, 3)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'ways': 5}, 'made:up: has 4 classes, fewer than episodes.ways=5'),
        ({'shots': 4}, 'made:up: class 0 has 4 examples, fewer than the 5 of episodes.shots'),
        ({'ways': 0}, 'made:up: episodes of ways=0, .* are empty'),
        ({'queries': -1}, 'made:up: episodes of .*queries=-1, .* are empty'),
        ({'transform': ['to_flaot']}, "unknown transform 'to_flaot'; did you mean 'to_float'"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn(fields, message):
    with pytest.raises(UserError, match=message) as raised:
        episodes(labelled(), **{'ways': 2, 'shots': 1, 'queries': 1, **fields})
    assert '\n' not in str(raised.value)


def test_sources_that_cannot_be_drawn_from():
    with pytest.raises(UserError, match='made:up: episodes of 2 ways needs labels'):
        episodes(labelled()._replace(labels=None), ways=2, shots=1, queries=1)
    uneven = labelled(get=lambda i: {'image': np.zeros((2, 2 + i % 2, 1), np.uint8), 'label': 0})
    with pytest.raises(UserError, match=r'made:up: .*several shapes, such as \[2, 2, 1\] and \[2, 3, 1\].*transform'):
        episodes(uneven, ways=4, shots=2, queries=2).get(0)


def test_open_source_draws_episodes_of_what_is_left():
    task = data.open_source('sklearn:digits/train', shots=6, episodes={'ways': 10, 'shots': 5, 'queries': 1}).get(0)
    assert task['support_image'].shape == (50, 8, 8, 1)
    with pytest.raises(UserError, match="sklearn:digits/train: class '0' has 5 examples"):
        data.open_source('sklearn:digits/train', shots=5, episodes={'ways': 10, 'shots': 5, 'queries': 1})
    with pytest.raises(UserError, match=r'episodes\.way: unknown field; did you mean .ways.'):
        data.open_source('sklearn:digits/train', episodes={'way': 5, 'shots': 5, 'queries': 1})


def test_sinusoids():
    source = data.open_source('sinusoid:test', support=5, query=100, count=300)
    curves = [source.get(i) for i in range(300)]
    assert {name: (x.shape, x.dtype.name) for name, x in curves[0].items()} == {
        'support_inputs': ((5, 1), 'float32'),
        'support_target': ((5, 1), 'float32'),
        'query_inputs': ((100, 1), 'float32'),
        'query_target': ((100, 1), 'float32'),
    }
    found = []
    for task in curves:  # y = u sin x + v cos x: linear in u and v, which the support points alone then determine
        basis = lambda x: np.concatenate([np.sin(x), np.cos(x)], 1).astype(float)
        solution, *_ = np.linalg.lstsq(basis(task['query_inputs']), task['query_target'].astype(float), rcond=None)
        np.testing.assert_allclose(basis(task['support_inputs']) @ solution, task['support_target'], atol=1e-4)
        u, v = solution[:, 0]
        found.append([np.hypot(u, v), np.arctan2(-v, u)])
    amplitude, phase = np.transpose(found)
    assert 0.1 <= amplitude.min() < 0.4 and 4.7 < amplitude.max() <= 5
    assert -1e-3 <= phase.min() < 0.1 and 3.0 < phase.max() <= np.pi + 1e-3
    assert abs(amplitude.mean() - 2.55) < 0.33 and abs(phase.mean() - np.pi / 2) < 0.21  # four standard errors
    x = np.concatenate([task['query_inputs'] for task in curves])
    assert -5 <= x.min() < -4.9 and 4.9 < x.max() < 5


def test_sinusoids_by_split_seed_and_number():
    draw = lambda split='train', **options: data.open_source(f'sinusoid:{split}', **{'count': 20, **options})
    target = lambda source, i: source.get(i)['support_target'].ravel().tolist()
    assert target(draw(), 7) == target(draw(count=8), 7)
    assert len({str(target(s, 7)) for s in (draw(), draw('val'), draw('test'), draw(seed=1))}) == 4
    few, many = draw('test', support=2, query=50).get(3), draw('test', support=20, query=50).get(3)
    curve = lambda task: np.linalg.lstsq(
        np.concatenate([np.sin(task['query_inputs']), np.cos(task['query_inputs'])], 1).astype(float),
        task['query_target'].astype(float),
        rcond=None,
    )[0]
    np.testing.assert_allclose(curve(few), curve(many), atol=1e-3)
    with pytest.raises(UserError, match="sinusoid:tset: no split 'tset'; did you mean 'test'"):
        draw('tset')
    with pytest.raises(UserError, match='support=0, .* must be at least 1'):
        draw(support=0)
