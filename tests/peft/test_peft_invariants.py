"""What holds for every method of ADAPTERS on every tiny network that it suits; a new method joins by its line in the table."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.models import create_model
from tl_jax.objectives.base import Model
from tl_jax.optimizers import create_partition
from tl_jax.peft import ADAPTERS, adapted, adapters_from, merged, unmerged

# What tiny layers ask for; every other field is the method's default.
FIELDS = {
    'adalora': dict(rank=2),
    'dora': dict(rank=2),
    'fourierft': dict(frequencies=12),
    'loha': dict(rank=2),
    'lokr': dict(rank=2),
    'lora': dict(rank=2),
    'oft': dict(block=4),
    'olora': dict(rank=2),
    'pissa': dict(rank=2),
    'rslora': dict(rank=2),
    'vera': dict(rank=4),
}
TEXT = dict(vocabulary=20, length=64, width=16, depth=1, heads=2, mlp_width=24)
IMAGE = dict(image_size=8, patch_size=4, width=16, depth=1, heads=2, mlp_width=24)
NETWORKS = {
    'text': ('bert_tiny', TEXT),
    'image': ('vit_tiny_patch16', IMAGE),
    'conv': ('convnet', dict(widths=[4, 8], norm='batch')),
}
CONV_TARGETS = 'backbone/conv2'  # the first one has a single channel, which nothing can rotate
ADAM = dict(name='adam', lr=3e-2)
DROPPING = [name for name, make in ADAPTERS.items() if 'dropout' in inspect.signature(make).parameters]


class Case(NamedTuple):
    """A method in a network, its adapters as they start and moved from there."""

    base: Model
    adapters: dict[str, Any]
    model: Model
    inputs: jax.Array
    start: Any
    moved: Any
    logits: np.ndarray  # of the moved ones


@functools.cache
def plain_network(name: str) -> tuple[Model, str, jax.Array]:
    """A network whose every parameter is random, biases and norms too; its family, and inputs."""
    architecture, fields = NETWORKS[name]
    module = create_model(architecture, num_classes=3, **fields)
    shape = {'text': (4, 8), 'image': (4, 8, 8, 3), 'conv': (4, 8, 8, 1)}[name]
    draw = np.random.default_rng(1)
    inputs = draw.integers(1, 20, shape).astype(np.int32) if name == 'text' else draw.normal(size=shape)
    inputs = jnp.asarray(inputs, jnp.int32 if name == 'text' else jnp.float32)
    variables = jax.jit(lambda key, x: module.init(key, x, train=False))(jax.random.key(0), inputs)
    variables = {**variables, 'params': shaken(variables['params'], 2, 0.1)}
    return Model(lambda key, inputs: variables, module.apply), type(module.backbone).__name__, inputs


def shaken(tree: Any, seed: int, scale: float) -> Any:
    """Every leaf with noise of its own, whatever the order of the leaves."""
    draw, flat = np.random.default_rng(seed), trees.flatten(tree)
    noise = {path: scale * draw.normal(size=flat[path].shape).astype(np.float32) for path in sorted(flat)}
    return trees.unflatten({path: jnp.asarray(leaf + noise[path]) for path, leaf in flat.items()})


@functools.cache
def case_of(method: str, network: str) -> Case | str:
    """The case, or why the method does not suit the network."""
    base, family, inputs = plain_network(network)
    fields = dict(FIELDS.get(method, {}))
    adapter = ADAPTERS[method](**fields)
    if network == 'conv' and adapter.targets is None:
        fields['targets'] = CONV_TARGETS
    adapters = adapters_from(dict(name=method, **fields), family)
    model = adapted(base, adapters)
    try:
        start = model.init(jax.random.key(0), inputs)
    except UserError as error:
        return str(error)
    own = {'adapters': shaken(start['params']['adapters'], 3, 0.1)}
    moved = {**start, 'params': {**start['params'], **own}}
    return Case(base, adapters, model, inputs, start, moved, outputs(model, moved, inputs))


@pytest.fixture(params=[(m, n) for m in ADAPTERS for n in NETWORKS], ids='-'.join)
def case(request):
    method, network = request.param
    if network == 'image' and not isinstance(case_of(method, 'text'), str):
        pytest.skip('a transformer of texts has shown it')
    found = case_of(method, network)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def outputs(model, variables, inputs):
    return np.asarray(model.apply(variables, inputs, train=False)['logits'])


def off_by(ours, reference):
    return np.abs(ours - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize('method', ADAPTERS)
def test_some_network_suits(method):
    assert any(not isinstance(case_of(method, network), str) for network in NETWORKS)


def test_no_op_at_init(case):
    if not next(iter(case.adapters.values()))[0].identity:
        pytest.skip('says of itself that it changes the network from the start')
    before = outputs(case.base, case.base.init(jax.random.key(0), case.inputs), case.inputs)
    assert off_by(outputs(case.model, case.start, case.inputs), before) <= 1e-6


def test_disabled_is_the_network_below(case):
    off = adapted(case.base, case.adapters, active=[])
    below = {name: tree for name, tree in case.moved.items() if name != 'adapter_constants'}
    below['params'] = {role: tree for role, tree in below['params'].items() if role != 'adapters'}
    expected = outputs(case.base, below, case.inputs)
    np.testing.assert_array_equal(outputs(off, case.moved, case.inputs), expected)
    assert off_by(case.logits, expected) > 1e-3, 'the moved adapter does nothing'


def test_merged_is_unmerged(case):
    adapter = next(iter(case.adapters.values()))[0]
    if adapter.merge is None or adapter.around is not None:
        with pytest.raises(UserError, match='cannot be merged'):
            merged(case.base, case.adapters, case.moved, case.inputs)
        return
    whole = merged(case.base, case.adapters, case.moved, case.inputs)
    assert off_by(outputs(case.base, whole, case.inputs), case.logits) <= 1e-5
    if adapter.unmerge is None:
        with pytest.raises(UserError, match='cannot be taken out'):
            unmerged(case.base, case.adapters, whole, case.moved, case.inputs)
        return
    again = trees.flatten(unmerged(case.base, case.adapters, whole, case.moved, case.inputs))
    between, changed = trees.flatten(whole), 0
    for path, leaf in trees.flatten({'params': case.moved['params']}).items():
        if path.startswith('params/adapters/'):
            continue
        # Half a unit in the last place for each of the two sums; a rotation sums a block of products.
        room = 4e-7 * np.maximum(np.abs(leaf), np.abs(between[path])).max()
        np.testing.assert_allclose(again[path], leaf, rtol=0, atol=room)
        changed += not np.array_equal(between[path], leaf)
    assert changed, 'merging changed nothing'


@pytest.mark.parametrize('method', DROPPING)
def test_dropout_in_training_alone(method):
    """It keeps the mean of what it drops from, and follows `train`, not the key: the cache of features gives one in either."""
    rate, draws = 0.3, 200
    network = next(name for name in NETWORKS if not isinstance(case_of(method, name), str))
    case = case_of(method, network)  # without dropout; the parts are the same
    ((name, (_, targets)),) = case.adapters.items()
    adapter = ADAPTERS[method](**FIELDS.get(method, {}), dropout=rate)

    def run(key, train):
        seen = []

        def record(parts, call, site):
            def drop(rate, x):
                seen.append((x, call.drop(rate, x)))
                return seen[-1][1]

            return adapter.call(parts, call._replace(drop=drop), site)

        model = adapted(case.base, {name: (adapter._replace(call=record), targets)})
        outputs, _ = model.apply(case.moved, case.inputs, train=train, mutable=['batch_stats'], rngs={'dropout': key})
        return outputs['logits'], seen[0]  # what later ones drop from depends on what the first one dropped

    logits, (x, same) = jax.jit(functools.partial(run, train=False))(jax.random.key(0))
    np.testing.assert_allclose(logits, case.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(same, x)
    keys = jax.random.split(jax.random.key(1), draws)
    logits, (_, dropped) = jax.jit(jax.vmap(lambda key: run(key, train=True)))(keys)
    assert off_by(np.asarray(logits[0]), case.logits) > 1e-4
    dropped = np.asarray(dropped)
    np.testing.assert_allclose(dropped, np.where(dropped, x / (1 - rate), 0), rtol=1e-5, atol=1e-6)
    error = np.abs(x) * np.sqrt(rate / (1 - rate) / draws)
    assert (np.abs(dropped.mean(0) - x) <= 5 * error + 1e-6).all()


def test_any_order_of_leaves(case):
    flat = trees.flatten(case.moved)
    again = trees.unflatten({path: flat[path] for path in sorted(flat, reverse=True)})
    np.testing.assert_array_equal(outputs(case.model, again, case.inputs), case.logits)


def test_only_adapters_learn_and_every_leaf_does(case):
    partition = create_partition([('adapters/.*', ADAM), ('head/.*', ADAM)], case.start['params'], steps=3)
    state = partition.optimizer.init(trees.split(case.start['params'], partition.trainable.__contains__)[0])
    labels = jnp.asarray([0, 1, 2, 1])

    @jax.jit
    def step(params, state):
        learning, frozen = trees.split(params, partition.trainable.__contains__)

        def loss(learning):
            variables = {**case.start, 'params': trees.merge(frozen, learning)}
            logits = case.model.apply(variables, case.inputs, train=False)['logits']
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        learning, state = partition.update(0, jax.grad(loss)(learning), state, learning)
        return trees.merge(frozen, learning), state

    params = case.start['params']
    for _ in range(3):
        params, state = step(params, state)
    before, after = trees.flatten(case.start['params']), trees.flatten(params)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        learns = path.startswith(('adapters/', 'head/'))
        assert np.array_equal(leaf, after[path]) is not learns, path
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    learned = sum(leaf.size for path, leaf in before.items() if path.startswith(('adapters/', 'head/')))
    assert sum(sizes) == 2 * learned, 'adam has two moments of what learns, and of nothing else'
