"""The total account, on a hand-made model of one block and the tensors that torchvision would store for it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.pretrained import Contents, Tensor, fill, maps, names
from tl_jax.trees import flatten, unflatten

RANDOM = np.random.default_rng(0)
SHAPES = {
    'params/backbone/stem/conv/kernel': (3, 3, 2, 4),
    'params/backbone/stem/norm/scale': (4,),
    'params/backbone/stem/norm/bias': (4,),
    'params/backbone/stage1/block1/conv1/kernel': (3, 3, 4, 4),
    'params/head/kernel': (4, 10),
    'params/head/bias': (10,),
    'batch_stats/backbone/stem/norm/mean': (4,),
    'batch_stats/backbone/stem/norm/var': (4,),
}
ARRAYS = {
    'conv1.weight': RANDOM.normal(size=(4, 2, 3, 3)).astype(np.float32),
    'bn1.weight': np.ones(4, np.float32),
    'bn1.bias': np.zeros(4, np.float32),
    'bn1.running_mean': np.zeros(4, np.float32),
    'bn1.running_var': np.ones(4, np.float32),
    'bn1.num_batches_tracked': np.array(7),
    'layer1.0.conv1.weight': RANDOM.normal(size=(4, 4, 3, 3)).astype(np.float32),
    'fc.weight': RANDOM.normal(size=(10, 4)).astype(np.float32),
    'fc.bias': np.zeros(10, np.float32),
}


def contents(arrays=ARRAYS, *, read=None, **changes) -> Contents:
    """Tensors of arrays; `read` collects the names of those that are read."""
    read = [] if read is None else read
    merged = {**arrays, **{name.replace('__', '.'): array for name, array in changes.items()}}
    tensors = {
        name: Tensor(array.shape, array.dtype, lambda name=name, array=array: read.append(name) or array)
        for name, array in merged.items()
        if array is not None
    }
    return Contents(tensors)


# A map that sends two names to one leaf.
TWICE = maps.choose(ARRAYS, 'resnet')
TWICE = TWICE._replace(rules=(*TWICE.rules, *names.dense('linear', 'head')))


def model(**shapes) -> dict:
    """Shapes only; a changed shape of None removes the leaf."""
    merged = {**SHAPES, **{name.replace('__', '/'): shape for name, shape in shapes.items()}}
    return unflatten({path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in merged.items() if s is not None})


def test_fills_every_leaf():
    variables, account = fill(model(), contents())
    leaves = flatten(variables)
    assert list(leaves) == list(SHAPES)
    assert {path: leaf.shape for path, leaf in leaves.items()} == SHAPES
    np.testing.assert_array_equal(
        leaves['params/backbone/stem/conv/kernel'], ARRAYS['conv1.weight'].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(leaves['params/head/kernel'], ARRAYS['fc.weight'].T)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves.values())
    assert account.used['params/head/kernel'] == 'fc.weight'
    assert account.ignored == {
        'bn1.num_batches_tracked': r'(.*\.)?num_batches_tracked (a counter of torch, unused here)'
    }
    assert not account.fresh and not account.cast
    assert account.size == 4 * sum(map(np.prod, SHAPES.values()))


def test_a_file_without_a_head_leaves_ours_fresh():
    _, account = fill(model(), contents(fc__weight=None, fc__bias=None))
    assert account.fresh == dict.fromkeys(['params/head/kernel', 'params/head/bias'], 'head/.* (the file has no head)')


def test_the_account_is_a_few_lines():
    changed = contents(fc__weight=ARRAYS['fc.weight'].astype(np.float16))
    _, account = fill(model(), changed, source='net.pth', sha256='0123456789abcdef')
    assert str(account).splitlines() == [
        'loaded net.pth (torchvision, sha256 0123456789ab)',
        '  used     8 tensors, 1,048 bytes, 1 of them cast from float16 to float32',
        r'  ignored  1 tensors by (.*\.)?num_batches_tracked (a counter of torch, unused here)',
    ]


def test_takes_the_prefix_of_wrappers_off():
    wrapped = contents({f'module.{name}': array for name, array in ARRAYS.items()})
    _, account = fill(model(), wrapped)
    assert account.notes == ("names without their 'module.'",)
    assert account.used['params/head/bias'] == 'module.fc.bias'


def test_another_head_is_fresh_by_a_named_rule():
    given = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, 7.0), model(params__head__kernel=(4, 3), params__head__bias=(3,))
    )
    variables, account = fill(given, contents())
    rule = "head/.* (the file's head/kernel is (4, 10), the model's (4, 3))"
    assert account.fresh == {'params/head/kernel': rule, 'params/head/bias': rule}
    assert account.ignored['fc.weight'] == account.ignored['fc.bias'] == rule
    assert (flatten(variables)['params/head/kernel'] == 7).all()
    assert (flatten(variables)['batch_stats/backbone/stem/norm/var'] == 1).all()


def test_a_model_without_a_head_ignores_the_files():
    _, account = fill(model(params__head__kernel=None, params__head__bias=None), contents())
    assert account.ignored['fc.weight'] == 'head/.* (the model has no head)' and not account.fresh


def test_fresh_and_ignore_rules():
    one = contents(teacher__weight=np.ones(3, np.float32))
    variables, account = fill(model(), one, ignore=['teacher.*'], fresh=['head/.*', 'backbone/stem/norm/(mean|var)'])
    assert account.ignored['teacher.weight'] == 'teacher.*'
    assert account.ignored['fc.bias'] == 'head/.*'
    assert account.fresh['batch_stats/backbone/stem/norm/var'] == 'backbone/stem/norm/(mean|var)'
    assert isinstance(flatten(variables)['params/head/bias'], jax.ShapeDtypeStruct)


def test_fresh_covers_a_head_of_other_parts():
    mlp = model(params__head__kernel=None, params__head__bias=None, params__head__dense1__kernel=(4, 8))
    _, account = fill(mlp, contents(), fresh=['head/.*'])
    assert account.fresh == {'params/head/dense1/kernel': 'head/.*'} and account.ignored['fc.weight'] == 'head/.*'


@pytest.mark.parametrize('dtype', [np.float16, np.float64, ml_dtypes.bfloat16])
def test_casts_visibly(dtype):
    values = ARRAYS['fc.weight'].astype(dtype)
    variables, account = fill(model(), contents(fc__weight=values))
    leaf = flatten(variables)['params/head/kernel']
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, values.astype(np.float32).T)
    assert account.cast == {'params/head/kernel': f'{np.dtype(dtype)} to float32'}


@pytest.mark.parametrize(
    ('tensors', 'leaves', 'rules', 'message'),
    [
        ({'extra__weight': np.ones(3, 'f4')}, {}, {}, "1 tensors have no leaf in the model: 'extra.weight'"),
        (
            {'layer1__1__conv1__weight': np.ones((4, 4, 3, 3), 'f4')},
            {},
            {},
            'did you mean .*stage1/block1/conv1/kernel',
        ),
        ({'bn1__bias': None}, {}, {}, "1 leaves have no tensor in the file: 'backbone/stem/norm/bias'"),
        ({'bn1__running_var': None}, {}, {}, "no tensor in the file: 'backbone/stem/norm/var'"),
        ({'fc__bias': None}, {}, {}, "1 leaves have no tensor .*'head/bias'"),
        ({}, {'params__backbone__stem__conv__kernel': (7, 7, 2, 4)}, {}, r'backbone/stem/conv/kernel \(7, 7, 2, 4\)'),
        (
            {'bn1__weight': np.ones((4, 1), 'f4')},
            {},
            {},
            r"'bn1.weight' \(4, 1\) does not fit backbone/stem/norm/scale",
        ),
        ({'conv1__weight': np.ones((4, 2), 'f4')}, {}, {}, r"'conv1.weight' \(4, 2\) does not fit"),
        (
            {'bn1__weight': np.ones(4, np.int32)},
            {},
            {},
            "'bn1.weight' is int32, and backbone/stem/norm/scale takes floats",
        ),
        ({'bn1__weight': np.ones(4, bool)}, {}, {}, 'is bool'),
        ({'bn1__weight': np.ones(4, np.complex64)}, {}, {}, 'is complex64'),
        (
            {'linear__weight': ARRAYS['fc.weight']},
            {},
            {'name_map': TWICE},
            "'fc.weight', 'linear.weight' are both 'params/head/kernel'",
        ),
        ({}, {}, {'fresh': ['haed/.*']}, r"fresh\[0\]: the rule 'haed/\.\*' does nothing: .*'head/\.\*'"),
        ({}, {}, {'ignore': ['fc.wieght']}, r"ignore\[0\]: the rule 'fc.wieght' does nothing: .*'fc.weight'"),
        ({}, {}, {'ignore': ['fc.weight']}, "1 leaves have no tensor in the file: 'head/kernel'"),
    ],
)
def test_refuses_before_it_reads(tensors, leaves, rules, message):
    read = []
    with pytest.raises(UserError, match=message) as caught:
        fill(model(**leaves), contents(read=read, **tensors), **rules)
    assert not read and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('value', 'dtype', 'kind'), [(np.nan, 'f4', 'NaN'), (np.inf, 'f2', 'infinite'), (1e300, 'f8', 'infinite')]
)
def test_refuses_values_that_are_not_finite(value, dtype, kind):
    damaged = ARRAYS['bn1.weight'].astype(dtype)
    damaged[2] = value
    with pytest.raises(UserError, match=f"'bn1.weight', for params/backbone/stem/norm/scale, has .* {kind}"):
        fill(model(), contents(bn1__weight=damaged))
    _, account = fill(model(), contents(fc__weight=np.full((10, 4), value)), fresh=['head/.*'])
    assert 'fc.weight' in account.ignored


def test_refuses_names_that_no_map_knows():
    with pytest.raises(UserError, match=r"no name map knows its tensors \('a.b'\); known are .*ResNet"):
        fill(model(), contents({'a.b': np.ones(3, 'f4')}))


def test_absurd_shapes_take_no_memory():
    """A reader that is fooled into a huge tensor is stopped by its shape."""
    huge = Contents({**contents().tensors, 'fc.weight': Tensor((2**40, 2**20), np.dtype('f4'), lambda: 1 / 0)})
    _, account = fill(model(), huge)
    assert 'head/.*' in account.ignored['fc.weight']
