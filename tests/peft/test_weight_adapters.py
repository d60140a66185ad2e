"""Each weight method against its paper's formula in float64, on every kind of layer; its gradients; what is refused."""

import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.models import create_model, list_models
from tl_jax.models.layers import Conv, SqueezeExcite
from tl_jax.models.transformer import Dense
from tl_jax.objectives.base import Model
from tl_jax.peft import adapted, adapters_from, merged, unmerged
from tl_jax.peft.base import modules_of
from tl_jax.peft.targets import QUERY_VALUE, TARGETS

sys.path.append(str(Path(__file__).parent.parent / 'models'))
from test_layer_order import fewer, inputs_for

DRAW = np.random.default_rng(0)  # of inputs; a test draws from its own, and so the same whichever others run
IMAGE = DRAW.normal(size=(2, 7, 6, 4)).astype(np.float32)
ROWS = DRAW.normal(size=(2, 3, 12)).astype(np.float32)
LAYERS = {
    'dense': (lambda: Dense(8, name='layer'), ROWS),
    'split': (lambda: nn.DenseGeneral((2, 4), name='layer'), ROWS),
    'joined': (lambda: nn.DenseGeneral(8, axis=(-2, -1), name='layer'), ROWS.reshape(2, 3, 3, 4)),
    'conv': (lambda: Conv(6, 3, 2, 1, use_bias=True, name='layer'), IMAGE),
    'groups': (lambda: Conv(6, 3, 1, 1, groups=2, use_bias=True, name='layer'), IMAGE),
    'linen': (lambda: nn.Conv(6, (2, 3), (1, 2), kernel_dilation=(2, 1), name='layer'), IMAGE),
    'sequence': (lambda: nn.Conv(6, (3,), padding='VALID', name='layer'), ROWS),
    'embed': (lambda: nn.Embed(12, 8, name='layer'), DRAW.integers(0, 12, (2, 5))),
}


class Lone(nn.Module):
    """One layer."""

    make: Any

    @nn.compact
    def __call__(self, x, train=False):
        return {'logits': self.make()(x)}


def lone(layer: str) -> tuple[Model, Any, np.ndarray]:
    make, inputs = LAYERS[layer]
    module = Lone(make)
    variables = module.init(jax.random.key(0), inputs)
    draw = np.random.default_rng(1)
    params = {k: jnp.asarray(draw.normal(size=v.shape), jnp.float32) for k, v in variables['params']['layer'].items()}
    return Model(lambda key, inputs: {'params': {'layer': params}}, module.apply), params, inputs


def matrix(leaf: np.ndarray, layer: str) -> np.ndarray:
    rows = leaf.shape[0] if layer in ('dense', 'split', 'embed') else leaf.size // leaf.shape[-1]
    return np.asarray(leaf, np.float64).reshape(rows, -1)


def low_rank(scale):
    return lambda w, p, c, taps: w + scale * p['lora_a'] @ p['lora_b']


def dora(w, p, c, taps):
    v = w + 8.0 * p['lora_a'] @ p['lora_b']
    return p['magnitude'] * v / np.sqrt((v * v).sum(0))


def adalora(w, p, c, taps):
    return w + 6.0 * p['lora_a'] @ np.diag(p['lora_e']) @ p['lora_b']


def vera(w, p, c, taps):
    a, b = c['vera_a'][: w.shape[0]], c['vera_b'][:, : w.shape[1]]
    return w + a @ np.diag(p['lambda_d']) @ b @ np.diag(p['lambda_b'])


def loha(w, p, c, taps):
    return w + 4.0 * (p['hada_a1'] @ p['hada_b1']) * (p['hada_a2'] @ p['hada_b2'])


def lokr(w, p, c, taps):
    block = p['lokr_w'] if 'lokr_w' in p else p['lokr_a'] @ p['lokr_b']
    parts = block.reshape(taps, -1, block.shape[1])
    return w + 4.0 * np.concatenate([np.kron(p['lokr_c'], part) for part in parts])


def oft(w, p, c, taps):
    blocks, size = p['oft_skew'].shape[0], 4
    rotation = np.zeros((blocks * size, blocks * size))
    for n, entries in enumerate(p['oft_skew']):
        q = np.zeros((size, size))
        q[np.triu_indices(size, 1)] = entries
        q -= q.T
        at = slice(n * size, (n + 1) * size)
        rotation[at, at] = (np.eye(size) + q) @ np.linalg.inv(np.eye(size) - q)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(len(rotation)), atol=1e-12)
    return np.kron(np.eye(taps), rotation) @ w


def fourierft(w, p, c, taps):
    rows, columns = w.shape
    j, k, delta = np.arange(rows)[:, None], np.arange(columns)[None, :], 0.0
    for coefficient, place in zip(p['spectrum'], c['places'], strict=True):
        u, v = divmod(int(place), columns)
        delta = delta + coefficient * np.cos(2 * np.pi * (j * u / rows + k * v / columns))
    return w + 300.0 / (rows * columns) * delta


# method -> (fields, the matrix that the layer then has, by the paper; scales are α / r of the defaults over rank 2)
FORMULAS = {
    'lora': (dict(rank=2), low_rank(8.0)),
    'rslora': (dict(rank=2), low_rank(16 / np.sqrt(2))),
    'pissa': (dict(rank=2), low_rank(4.0)),
    'olora': (dict(rank=2), low_rank(4.0)),
    'dora': (dict(rank=2), dora),
    'adalora': (dict(rank=2), adalora),
    'vera': (dict(rank=3), vera),
    'loha': (dict(rank=2), loha),
    'lokr': (dict(rank=2), lokr),
    'oft': (dict(block=4), oft),
    'fourierft': (dict(frequencies=9), fourierft),
}
# The products of lora are those of its kin, which differ in the factors alone.
SOME = ('dense', 'conv', 'embed')
WHERE = {
    'lora': tuple(LAYERS),
    'dora': tuple(LAYERS),
    'oft': ('dense', 'split', 'joined', 'conv', 'linen', 'sequence'),
    'lokr': ('dense', 'split', 'joined', 'conv', 'linen', 'sequence', 'embed'),
}
CASES = [(method, layer) for method in FORMULAS for layer in WHERE.get(method, SOME)]


@pytest.mark.parametrize(('method', 'layer'), CASES)
def test_formula(method, layer):
    fields, formula = FORMULAS[method]
    model, _, inputs = lone(layer)
    adapters = adapters_from(dict(name=method, targets='layer', **fields), '')
    network = adapted(model, adapters)
    variables = network.init(jax.random.key(1), inputs)
    # Leaves of size about 1, at which a missing factor or a transpose shows.
    draw = np.random.default_rng(2)
    mine = {k: 0.5 * draw.normal(size=v.shape) for k, v in variables['params']['adapters']['default']['layer'].items()}
    variables['params']['adapters']['default']['layer'] = {k: jnp.asarray(v, jnp.float32) for k, v in mine.items()}
    held = trees.flatten(variables.get('adapter_constants', {}))
    constants = {path.rpartition('/')[2]: np.asarray(leaf, np.float64) for path, leaf in held.items()}
    base = variables['params']['layer']  # with what pissa and olora leave there
    name = 'embedding' if layer == 'embed' else 'kernel'
    taps = int(np.prod(base[name].shape[:-2])) if layer in ('conv', 'groups', 'linen', 'sequence') else 1
    whole = formula(matrix(base[name], layer), mine, constants, taps).reshape(base[name].shape)
    expected = model.apply({'params': {'layer': {**base, name: jnp.asarray(whole, jnp.float32)}}}, inputs)['logits']
    ours = network.apply(variables, inputs)['logits']
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    in_one = merged(model, adapters, variables, inputs)['params']['layer'][name]
    np.testing.assert_allclose(in_one, whole, rtol=0, atol=3e-6 * np.abs(whole).max())


@pytest.mark.parametrize('layer', ['dense', 'conv', 'embed'])
def test_starts_out_of_the_weights(layer):
    model, params, inputs = lone(layer)
    name = 'embedding' if layer == 'embed' else 'kernel'
    w = matrix(params[name], layer)
    for method in ('pissa', 'olora'):
        network = adapted(model, adapters_from(dict(name=method, rank=2, targets='layer'), ''))
        variables = network.init(jax.random.key(1), inputs)['params']
        a, b = (
            np.asarray(variables['adapters']['default']['layer'][leaf], np.float64) for leaf in ('lora_a', 'lora_b')
        )
        np.testing.assert_allclose(matrix(variables['layer'][name], layer) + 4 * a @ b, w, atol=1e-5)
        if method == 'pissa':  # the best approximation of that rank (Eckart & Young)
            u, s, vt = np.linalg.svd(w, full_matrices=False)
            np.testing.assert_allclose(4 * a @ b, u[:, :2] * s[:2] @ vt[:2], atol=1e-5)
            np.testing.assert_allclose((a * a).sum(0), (b * b).sum(1), rtol=1e-5)
        else:  # Gram-Schmidt of W's rows
            np.testing.assert_allclose(b @ b.T, np.eye(2), atol=1e-6)
            first = w[0] / np.linalg.norm(w[0])
            np.testing.assert_allclose(np.abs(b[0]), np.abs(first), atol=1e-6)


def test_dora_learns_as_if_its_norm_were_given():
    """Sec. 4.3: the gradient of A and B is that of m / C (W + s A B), C a constant."""
    model, params, inputs = lone('dense')
    network = adapted(model, adapters_from(dict(name='dora', rank=2, targets='layer'), ''))
    variables = network.init(jax.random.key(1), inputs)
    mine = {k: v + 0.3 for k, v in variables['params']['adapters']['default']['layer'].items()}
    weigh = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 8)), jnp.float32)

    def ours(p):
        whole = {'params': {**variables['params'], 'adapters': {'default': {'layer': p}}}}
        return jnp.sum(weigh * network.apply(whole, inputs)['logits'])

    frozen = jnp.linalg.norm(params['kernel'] + 8 * mine['lora_a'] @ mine['lora_b'], axis=0)

    def theirs(p):
        w = p['magnitude'] / frozen * (params['kernel'] + 8 * p['lora_a'] @ p['lora_b'])
        return jnp.sum(weigh * (inputs @ w))

    for leaf, other in zip(jax.tree.leaves(jax.grad(ours)(mine)), jax.tree.leaves(jax.grad(theirs)(mine)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-5 * np.abs(other).max())


def _sizes_in(jaxpr) -> set:
    """Shapes of all that a computation makes, whatever it is nested in."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(v.aval.shape) for v in equation.outvars}
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= _sizes_in(inner)
    return found


@pytest.mark.parametrize('method', [m for m in FORMULAS if m not in ('dora', 'fourierft')])  # their docstrings say why
def test_no_gradient_of_the_kernels_size(method):
    """Nothing of the kernel's shape, 20 × 36 here and no other thing's, is made in the gradient of the adapter."""
    module = Lone(lambda: Dense(36, name='layer'))
    params = {'layer': {'kernel': jnp.ones((20, 36)), 'bias': jnp.ones(36)}}
    model = Model(lambda key, inputs: {'params': params}, module.apply)
    network = adapted(model, adapters_from(dict(name=method, targets='layer', **FORMULAS[method][0]), ''))
    inputs = jnp.ones((5, 20))
    variables = network.init(jax.random.key(0), inputs)

    def loss(learning, frozen):
        whole = {**variables, 'params': {**frozen, 'adapters': learning}}
        return jnp.sum(network.apply(whole, inputs)['logits'] ** 2)

    frozen = {'layer': variables['params']['layer']}
    shapes = _sizes_in(jax.make_jaxpr(jax.grad(loss))(variables['params']['adapters'], frozen).jaxpr)
    assert not {(20, 36), (36, 20)} & shapes
    both = jax.make_jaxpr(jax.grad(loss, (0, 1)))(variables['params']['adapters'], frozen)
    assert {(20, 36), (36, 20)} & _sizes_in(both.jaxpr), 'what a gradient of the kernel itself would show'


def moved(model: Model, adapters: dict[str, Any], inputs: np.ndarray) -> dict[str, Any]:
    variables = adapted(model, adapters).init(jax.random.key(0), inputs)
    draw = np.random.default_rng(4)
    mine = trees.flatten(variables['params']['adapters'])
    mine = {path: jnp.asarray(leaf + 0.3 * draw.normal(size=leaf.shape), jnp.float32) for path, leaf in mine.items()}
    variables['params']['adapters'] = trees.unflatten(mine)
    return variables


def test_several_at_once_and_switching():
    model, _, inputs = lone('dense')
    section = {
        'one': dict(name='lora', rank=2, targets='layer'),
        'two': dict(name='dora', rank=2, targets='layer'),
        'three': dict(name='lokr', rank=2, targets='layer'),
    }
    adapters = adapters_from(section, '')
    variables = moved(model, adapters, inputs)
    for active in (['one'], ['three'], ['one', 'two'], ['one', 'two', 'three']):
        some = {name: adapters[name] for name in active}
        ours = adapted(model, adapters, active=active).apply(variables, inputs)['logits']
        whole = merged(model, some, variables, inputs)
        theirs = model.apply(whole, inputs)['logits']
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    with pytest.raises(UserError, match="no adapter 'four'"):
        adapted(model, adapters, active=['four'])


FOURIER = dict(name='fourierft', frequencies=9, alpha=20.0, targets='layer')


@pytest.mark.parametrize('other', [dict(name='oft'), dict(name='dora', rank=2), dict(name='ia3')], ids=str)
@pytest.mark.parametrize('place', [0, 1])
def test_merged_weights_are_within_every_other_adapter(other, place):
    model, _, inputs = lone('dense')
    sections = [{**other, 'targets': 'layer'}]
    sections.insert(place, FOURIER)
    adapters = adapters_from(dict(zip('ab', sections, strict=True)), '')
    variables = moved(model, adapters, inputs)
    ours = adapted(model, adapters).apply(variables, inputs)['logits']
    whole = merged(model, adapters, variables, inputs)
    np.testing.assert_allclose(model.apply(whole, inputs)['logits'], ours, rtol=0, atol=1e-5 * np.abs(ours).max())
    if other['name'] != 'dora':  # of which nothing is taken out again
        again = unmerged(model, adapters, whole, variables, inputs)['params']['layer']['kernel']
        np.testing.assert_allclose(again, variables['params']['layer']['kernel'], rtol=0, atol=1e-5)


def test_examples_one_by_one():
    """The gradients of single examples by vmap, as private training takes them, add up to that of the batch."""
    model, _, inputs = lone('conv')
    network = adapted(model, adapters_from(dict(name='lora', rank=2, targets='layer'), ''))
    variables = network.init(jax.random.key(0), inputs)
    mine = jax.tree.map(lambda leaf: leaf + 0.1, variables['params']['adapters'])

    def loss(mine, x):
        whole = {'params': {**variables['params'], 'adapters': mine}}
        return jnp.sum(network.apply(whole, x)['logits'] ** 2)

    each = jax.vmap(jax.grad(lambda mine, x: loss(mine, x[None])), (None, 0))(mine, inputs)
    for one_by_one, whole in zip(jax.tree.leaves(each), jax.tree.leaves(jax.grad(loss)(mine, inputs)), strict=True):
        np.testing.assert_allclose(one_by_one.sum(0), whole, rtol=0, atol=1e-5 * np.abs(whole).max())


DIVIDING = ('lora', 'rslora', 'pissa', 'olora', 'dora', 'vera')
DROPPING = (*DIVIDING, 'adalora', 'loha', 'lokr', 'oft')


@pytest.mark.parametrize(
    ('section', 'layer', 'message'),
    [
        (dict(name='lora', targets='head'), 'dense', 'names no module'),
        (dict(name='lora', targets='(layer'), 'dense', r"peft.default: '\(layer' is not a regular expression"),
        (dict(name='lora', rank=9, targets='layer'), 'dense', r"rank: 9 is not within 1 … 8.*'layer', 12 × 8"),
        (dict(name='lora', rank=2.5, targets='layer'), 'dense', 'rank: must be int'),
        *((dict(name=name, rank=0), 'dense', 'rank: must be at least 1, not 0') for name in DIVIDING),
        *((dict(name=name, dropout=1.0), 'dense', 'dropout: must be at least 0 and less than 1') for name in DROPPING),
        (dict(name='lokr', factor=0, targets='layer'), 'dense', 'factor: must be at least 1'),
        (dict(name='lora', ranks=2), 'dense', "ranks: unknown field; did you mean 'rank'"),
        (dict(name='lore'), 'dense', "no method 'lore'; did you mean 'lora'"),
        (dict(name='lora'), 'dense', 'targets: is required'),
        (dict(a='lora'), 'dense', 'a: must be a method with its fields'),
        ({'x/y': dict(name='lora', targets='layer')}, 'dense', "peft: no adapter can be called 'x/y'; use letters"),
        (dict(name='oft', targets='layer'), 'embed', 'is a embed, and this adapter changes dense and conv'),
        (dict(name='oft', block=5, targets='layer'), 'dense', '5 does not divide the 12 inputs'),
        (dict(name='lokr', rank=2, targets='layer'), 'groups', 'in groups'),
        (dict(name='fourierft', targets='layer'), 'dense', '1000 is not within 1 … 96'),
    ],
)
def test_refused(section, layer, message):
    model, _, inputs = lone(layer)
    with pytest.raises(UserError, match=message):
        adapted(model, adapters_from(section, 'Lone')).init(jax.random.key(0), inputs)


def convolutional():
    """One model of each family with targets of its own, and of those that differ within one."""
    families = {type(create_model(name).backbone).__name__: name for name in list_models() if name != 'mlp'}
    own = [name for family, name in families.items() if TARGETS.get(family, QUERY_VALUE) != QUERY_VALUE]
    return [*own, 'resnet50d', 'seresnet18', 'resnext50_32x4d']


@pytest.mark.parametrize('name', convolutional())
def test_default_targets_leave_the_first_convolution_depthwise_ones_and_gates(name):
    backbone = create_model(name).backbone
    family = type(backbone).__name__
    module = create_model(name, num_classes=3, **fewer(backbone))
    inputs = inputs_for(name, module.backbone)
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs)
    modules = modules_of(Model(None, module.apply), variables, inputs)
    targets = [site for site in modules if re.fullmatch(TARGETS[family], site.path)]
    first = next(site for site in modules if 'kernel' in site.weights)
    assert targets and (first.kind != 'conv' or first not in targets)
    gates = tuple(f'{site.path}/' for site in modules if isinstance(site.module, SqueezeExcite))
    assert not any(site.path.startswith(gates) for site in targets)
    assert not any(site.kind == 'conv' and site.weights['kernel'].shape[-2] == 1 for site in targets)
