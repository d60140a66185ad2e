import pytest

from tl_jax import trees
from tl_jax.errors import UserError

TREE = {'backbone': {'stem': {'kernel': 1, 'bias': 2}, 'block1': {'kernel': 3}}, 'head': {'kernel': 4, 'bias': 5}}


def test_flatten_and_unflatten_are_inverse():
    flat = trees.flatten(TREE)
    assert list(flat)[:3] == ['backbone/stem/kernel', 'backbone/stem/bias', 'backbone/block1/kernel']
    assert trees.unflatten(flat) == TREE


def test_first_match_wins():
    rules = [('.*/bias', 'a'), ('head/.*', 'b'), ('.*', 'c')]
    assert trees.match(rules, trees.flatten(TREE), field='f') == {
        'backbone/stem/kernel': 'c',
        'backbone/stem/bias': 'a',
        'backbone/block1/kernel': 'c',
        'head/kernel': 'b',
        'head/bias': 'a',
    }


@pytest.mark.parametrize(
    ('rules', 'message'),
    [
        ([('hed/.*', 1)], r"f\[0\]: the rule 'hed/\.\*' does nothing: it matches no leaf; did you mean 'head/\.\*'"),
        ([('head', 1)], r"must match the whole path, such as 'head/kernel'"),
        ([('.*', 1), ('head/.*', 2)], r'f\[1\]: .* taken by an earlier rule'),
        ([('(', 1)], r'f\[0\]: .* is not a regular expression'),
        ([('head/.*', 1)], r"f: no rule matches the leaf 'backbone/stem/kernel'"),
    ],
)
def test_rules_are_strict(rules, message):
    with pytest.raises(UserError, match=message):
        trees.match(rules, trees.flatten(TREE), field='f')


def test_default_covers_leaves_without_a_rule_but_not_rules_without_a_leaf():
    assert trees.match([('head/.*', 1)], trees.flatten(TREE), field='f', default=0)['backbone/stem/bias'] == 0
    with pytest.raises(UserError, match='does nothing'):
        trees.match([('nothing', 1)], trees.flatten(TREE), field='f', default=0)


def test_split_and_merge_are_inverse_and_leave_no_empty_branch():
    heads, rest = trees.split(TREE, lambda path: path.startswith('head/'))
    assert heads == {'head': TREE['head']} and rest == {'backbone': TREE['backbone']}
    assert trees.merge(rest, heads) == TREE
    nothing, everything = trees.split(TREE, lambda path: False)
    assert nothing == {} and everything == TREE


def test_merge_takes_the_later_leaf_and_copies_nothing_else():
    merged = trees.merge(TREE, {'head': {'bias': 9}})
    assert merged['head'] == {'kernel': 4, 'bias': 9} and TREE['head']['bias'] == 5
