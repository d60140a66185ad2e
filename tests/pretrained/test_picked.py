"""A shallow network filled from chosen blocks of a deep one, through a file, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.networks import model_from
from tl_jax.pretrained import overlay, save_variables
from tl_jax.pretrained.picked import picked
from tl_jax.trees import flatten

SMALL = dict(name='bert_tiny', vocabulary=20, length=8, width=8, heads=2, mlp_width=12)
TOKENS = jnp.ones((1, 5), jnp.int32)


def built(**fields):
    return model_from(**SMALL, **fields, classes=2, dtype=jnp.float32, load=True)


@pytest.fixture(scope='module')
def deep(tmp_path_factory):
    """The leaves of four blocks, every one drawn at random, and their file."""
    variables = jax.eval_shape(built(depth=4).init, jax.random.key(0), TOKENS)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), variables)
    file = tmp_path_factory.mktemp('deep') / 'deep.safetensors'
    save_variables(file, variables, {})
    return flatten(variables), file


def test_each_block_is_the_one_that_was_picked(deep):
    leaves, file = deep
    shallow = flatten(built(depth=2, source=str(file), pick=[4, 2]).init(jax.random.key(1), TOKENS))
    assert len(shallow) == len(leaves) - 2 * sum('/block1/' in path for path in leaves)
    for path, leaf in shallow.items():
        origin = path.replace('/block1/', '/block4/') if '/block1/' in path else path
        np.testing.assert_array_equal(leaf, leaves[origin], err_msg=path)


def test_the_account_says_what_was_left(deep):
    leaves, file = deep
    shapes = jax.eval_shape(built(depth=1).init, jax.random.key(0), TOKENS)
    account = overlay(file, shapes, pick=[3])[1]
    assert set(account.ignored.values()) == {'pick [3]'}
    assert len(account.ignored) == sum('/block' in path and '/block3/' not in path for path in leaves)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(depth=2, pick=[2, 5]), r'model\.pick: .* has the blocks 1, 2, 3, 4, and no 5'),
        (dict(depth=2, pick=[2, 2]), r'model\.pick: names a block twice'),
        (dict(depth=2, pick=[2]), 'leaves have no tensor in the file: .backbone/block2'),
        (dict(depth=1, pick=[2, 3]), 'tensors have no leaf in the model: '),
    ],
)
def test_bad_picks_are_refused(deep, fields, message):
    shapes = jax.eval_shape(built(depth=fields['depth']).init, jax.random.key(0), TOKENS)
    with pytest.raises(UserError, match=message):
        overlay(deep[1], shapes, pick=fields['pick'])


def test_a_pick_is_of_a_source():
    with pytest.raises(UserError, match=r'config\.model\.pick: names blocks of weights, and there is no source'):
        built(depth=2, pick=[1, 2])


def test_what_has_no_blocks_has_none_to_pick():
    with pytest.raises(UserError, match='file has no blocks, and no 1'):
        picked(['params/backbone/dense1/kernel'], [1], 'file')
