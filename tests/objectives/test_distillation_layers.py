import jax
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.objectives.distillation.base import Pair
from tl_jax.objectives.distillation.layers import aligned, averaged, layer_pairs, require_joinable


def test_a_layer_is_a_name_of_both_or_a_pair():
    assert layer_pairs(['stage1', ['stage2', 'block4']]) == (('stage1', 'stage1'), ('stage2', 'block4'))


@pytest.mark.parametrize('layers', [[], 'stage1', [['stage1']], [['a', 'b', 'c']], [['a', 1]]])
def test_other_layers_are_refused(layers):
    with pytest.raises(UserError, match='config.objective.distilled.terms: '):
        layer_pairs(layers)


@pytest.mark.parametrize(('size', 'wanted'), [((6, 4), (3, 2)), ((7, 5), (3, 4)), ((4, 4), (4, 4)), ((5, 3), (1, 1))])
def test_regions_are_averaged_as_torch_s_adaptive_pooling(size, wanted):
    x = np.random.default_rng(0).normal(size=(2, *size, 3))
    expected = np.empty((2, *wanted, 3))
    for i, j in np.ndindex(*wanted):  # the regions of torch's documentation: floor(i H / h) … ceil((i + 1) H / h)
        rows = slice(i * size[0] // wanted[0], int(np.ceil((i + 1) * size[0] / wanted[0])))
        columns = slice(j * size[1] // wanted[1], int(np.ceil((j + 1) * size[1] / wanted[1])))
        expected[:, i, j] = x[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(averaged(x.astype(np.float32), *wanted), expected, atol=1e-6)


def test_the_larger_map_is_brought_to_the_smaller_and_a_map_to_a_vector():
    draw = np.random.default_rng(1).normal
    pair = Pair({'map': draw(size=(2, 8, 4, 3)), 'vector': draw(size=(2, 5))}, {'map': draw(size=(2, 4, 6, 5))}, {})
    s, t = aligned(pair, ('map', 'map'))
    assert s.shape == (2, 4, 4, 3) and t.shape == (2, 4, 4, 5)
    np.testing.assert_allclose(s[:, 0, 0], pair.student['map'][:, :2, 0].mean(1), atol=1e-6)
    s, t = aligned(pair, ('vector', 'map'))
    np.testing.assert_allclose(t, pair.teacher['map'].mean((1, 2)), atol=1e-6)
    assert s.shape == (2, 5)


@pytest.mark.parametrize(('s', 't'), [((2, 7, 3), (2, 8, 3)), ((2, 4, 4, 3), (2, 16, 3)), ((2, 7, 3), (2, 3))])
def test_what_no_position_joins_is_refused(s, t):
    shape = lambda s: {'x': jax.ShapeDtypeStruct(s, np.float32)}
    with pytest.raises(UserError, match="hints cannot join the student's 'x'"):
        require_joinable('hints', Pair(shape(s), shape(t), {}), [('x', 'x')])
