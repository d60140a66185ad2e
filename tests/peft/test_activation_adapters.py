"""(IA)³, SSF, bottlenecks, prompts and prefixes: against blocks written out in float64 numpy, and against the network itself.

A prompt that is the embeddings of a text's beginning, and a prefix that is its keys and values, must give what the whole
text gives: positions, masks and rotations are then all right.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.models import create_model
from tl_jax.models.generate import generate
from tl_jax.models.llama import rotation
from tl_jax.objectives.base import Model
from tl_jax.peft import ADAPTERS
from tl_jax.peft.base import adapted, merged

TEXT = dict(vocabulary=40, width=16, heads=2, mlp_width=24, depth=2)
IMAGE = dict(width=16, heads=2, mlp_width=24, depth=2, patch_size=4, image_size=8)
NETWORKS = {
    'bert': ('bert_mini', {**TEXT, 'length': 12}),
    'roberta': ('roberta_base', {**TEXT, 'length': 12}),
    'deberta': ('deberta_v3_small', {**TEXT, 'buckets': 8, 'max_distance': 16}),
    'text': ('text_transformer', {**TEXT, 'length': 12}),
    'gpt2': ('gpt2', {**TEXT, 'length': 12, 'pad_id': 0}),
    'llama': ('llama', {**TEXT, 'kv_heads': 1, 'pad_id': 0}),
    'qwen': ('qwen3_0_6b', {**TEXT, 'head_dim': 8, 'kv_heads': 1, 'pad_id': 0}),
    'gemma': ('gemma_2b', {**TEXT, 'head_dim': 8, 'pad_id': 0}),
    't5': ('t5_small', {**TEXT, 'head_dim': 8, 'buckets': 8, 'max_distance': 16, 'pad_id': 0}),
    'vit': ('vit_tiny_patch16', IMAGE),
    'deit': ('deit_tiny_distilled_patch16', IMAGE),
    'resnet': ('resnet18', dict(widths=[8, 8], stage_sizes=[1, 1])),
}
SEEING = ('vit', 'deit', 'resnet')
TOKENS = jnp.asarray(np.random.RandomState(1).randint(2, 40, (1, 9)), jnp.int32)
IMAGES = jnp.asarray(np.random.RandomState(1).randn(2, 8, 8, 3), jnp.float32)


def shaken(tree, seed, size=0.3):
    """Every leaf moved at random, so that nothing passes because it is zero or one."""
    draw = np.random.RandomState(seed)
    return jax.tree.map(lambda x: x + size * draw.randn(*x.shape).astype(np.float32), tree)


@functools.cache
def network(family):
    """A tiny network of random weights, and inputs."""
    name, fields = NETWORKS[family]
    module = create_model(name, num_classes=3, **fields)
    inputs = IMAGES if family in SEEING else TOKENS
    start = compiled(lambda key: module.init(key, inputs, train=False))(jax.random.key(0))
    start = {**start, 'params': shaken(start['params'], 2)}
    return Model(lambda key, inputs: start, module.apply), inputs


def variables_of(family):
    return network(family)[0].init(None, None)


def compiled(function):
    """Jitted, and compiled in a hurry: each network runs once or twice."""
    return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})


def run(model, variables, inputs):
    return compiled(functools.partial(model.apply, train=False))(variables, inputs)


def with_adapter(family, name, inputs=None, **fields):
    """The network with an adapter that has moved: model, variables and what the adapter has below `backbone`."""
    model, own_inputs = network(family)
    adapter = ADAPTERS[name](**fields)
    model = adapted(model, {'a': (adapter, adapter.targets)})
    variables = model.init(jax.random.key(3), own_inputs if inputs is None else inputs)
    params = variables['params']
    params = {**params, 'adapters': shaken(params['adapters'], 4)}
    return model, {**variables, 'params': params}, params['adapters']['a']['backbone']


def replaced(variables, own):
    return {**variables, 'params': {**variables['params'], 'adapters': {'a': {'backbone': own}}}}


# --- a transformer's blocks in float64 --------------------------------------------------------------------------------


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def dense(p, x, a=None):
    """A layer, and SSF behind it."""
    return shifted(x @ p['kernel'] + p['bias'], a)


def norm(p, x, epsilon, a=None):
    x = x - x.mean(-1, keepdims=True)
    return shifted(x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * p['scale'] + p['bias'], a)


def shifted(y, a):
    return y if not a else a['scale'] * y + a['shift']


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def relu(x):
    return np.maximum(x, 0)


def narrow(a, x, activation):
    return activation(x @ a['down'] + a['down_bias']) @ a['up'] + a['up_bias']


def block(p, x, mask, method, a, pre, heads=2):
    """One block, post-norm as BERT's or pre-norm as ViT's, with what the method has in it."""
    a = a or {}
    own = a if method == 'ssf' else {}
    at = lambda *path: functools.reduce(lambda tree, name: tree.get(name, {}), path, own)
    epsilon = 1e-6 if pre else 1e-12

    def attention(x):
        p_, (b, n, d) = p['attention'], x.shape
        q, k, v = (dense(p_[m], x, at('attention', m)) for m in ('query', 'key', 'value'))
        if method == 'ia3':
            k, v = a['attention']['key']['ia3'] * k, a['attention']['value']['ia3'] * v
        q, k, v = (y.reshape(b, n, heads, d // heads) for y in (q, k, v))
        scores = np.einsum('bqhd,bkhd->bhqk', q, k) / math.sqrt(d // heads)
        scores = np.exp(np.where(mask[:, None, None], scores, -1e30))
        y = np.einsum('bhqk,bkhd->bqhd', scores / scores.sum(-1, keepdims=True), v).reshape(b, n, d)
        y = dense(p_['out'], y, at('attention', 'out'))
        return y + narrow(a['attention'], y, gelu) if method == 'houlsby' else y

    def mlp(x):
        hidden = gelu(dense(p['mlp']['dense1'], x, at('mlp', 'dense1')))
        hidden = a['mlp']['dense2']['ia3'] * hidden if method == 'ia3' else hidden
        y = dense(p['mlp']['dense2'], hidden, at('mlp', 'dense2'))
        if method in ('houlsby', 'pfeiffer'):
            return y + narrow(a['mlp'], y, gelu if method == 'houlsby' else relu)
        return y + 4 * narrow(a['mlp'], x, relu) if method == 'parallel' else y

    norms = [lambda x, n=n: norm(p[n], x, epsilon, at(n)) for n in ('norm1', 'norm2')]
    if pre:
        x = x + attention(norms[0](x))
        return x + mlp(norms[1](x))
    x = norms[0](x + attention(x))
    return norms[1](x + mlp(x))


METHODS = {
    name: {} if name in ('ia3', 'ssf') else dict(width=5) for name in ('houlsby', 'ia3', 'parallel', 'pfeiffer', 'ssf')
}


@pytest.mark.parametrize(
    ('family', 'name'), [*(('bert', name) for name in METHODS), ('deit', 'houlsby'), ('deit', 'ssf')]
)
def test_blocks_follow_the_papers_equations(name, family):
    inputs = IMAGES if family == 'deit' else jnp.concatenate([TOKENS, TOKENS.at[0, 6:].set(0)])
    model, variables, own = with_adapter(family, name, **METHODS[name])
    endpoints = run(model, variables, inputs)
    params, own = double(variables['params']['backbone']), double(own)
    x = np.asarray(endpoints['embedding' if family == 'deit' else 'embeddings'], np.float64)
    mask = np.ones(x.shape[:2], bool) if family == 'deit' else np.asarray(inputs) != 0
    plain = block(params['block1'], x, mask, 'none', None, family == 'deit')
    assert not np.allclose(endpoints['block1'], plain, 1e-2)
    for i in ('block1', 'block2'):
        x = block(params[i], x, mask, name, own.get(i), family == 'deit')
        np.testing.assert_allclose(endpoints[i][mask], x[mask], 2e-4, 2e-4)


@pytest.mark.parametrize('deep', [True, False])
def test_visual_prompts_follow_the_papers_equations(deep):
    model, variables, own = with_adapter('deit', 'vpt', tokens=3, deep=deep)
    assert list(own) == (['block1', 'block2'] if deep else ['block1'])
    endpoints = run(model, variables, IMAGES)
    params, own = double(variables['params']['backbone']), double(own)
    x = np.asarray(endpoints['embedding'], np.float64)
    # As in the paper: behind the class token.
    prompts = np.broadcast_to(own['block1']['prompt'], (2, 3, 16))
    x = np.concatenate([x[:, :1], prompts, x[:, 1:]], 1)
    for i in ('block1', 'block2'):
        if deep:
            x[:, 1:4] = own[i]['prompt']
        x = block(params[i], x, np.ones(x.shape[:2], bool), 'vpt', None, True)
        np.testing.assert_allclose(endpoints[i], np.delete(x, [1, 2, 3], 1), 2e-4, 2e-4)


# --- scaling: merged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('name', 'family'), [('ia3', 'text'), ('ssf', 'gemma'), ('ssf', 'resnet'), ('ssf', 'text')])
def test_merged_computes_the_same(name, family):
    model, variables, _ = with_adapter(family, name)
    base, inputs = network(family)
    adapter = ADAPTERS[name]()
    weights = merged(base, {'a': (adapter, adapter.targets)}, variables, inputs)
    logits, expected = (run(m, v, inputs)['logits'] for m, v in ((base, weights), (model, variables)))
    np.testing.assert_allclose(logits, expected, 1e-3, 1e-4)
    before = trees.flatten(variables_of(family)['params'])
    moved = [path for path, leaf in trees.flatten(weights['params']).items() if (leaf != before[path]).any()]
    assert any(path.endswith('/kernel') for path in moved)
    assert name == 'ia3' or any('/norm' in path for path in moved)


def test_a_shift_without_a_bias_is_not_merged():
    _, variables, _ = with_adapter('llama', 'ssf', shift='all')
    adapter = ADAPTERS['ssf'](shift='all')
    with pytest.raises(UserError, match="no bias that could hold its shift; to merge, train with 'biased'"):
        merged(network('llama')[0], {'a': (adapter, adapter.targets)}, variables, TOKENS)


# --- prompts ----------------------------------------------------------------------------------------------------------

POSITIONS = {'t5': ('encoder_block2', 'encoder'), 'text': ('block2',), 'llama': ('hidden', 'lm_logits')}


@pytest.mark.parametrize('family', ['bert', 'roberta', 'deberta', 'gpt2', 'llama', 't5', 'text'])
def test_a_prompt_of_a_texts_beginning_gives_what_the_text_gives(family):
    """Of two texts, one padded; `{'tokens'}` and bare tokens alike."""
    pad = 1 if family == 'roberta' else 0
    ends = jnp.concatenate([TOKENS[:, 3:], TOKENS[:, 3:].at[0, 4:].set(pad)])
    begin = [int(i) for i in TOKENS[0, :3]]
    whole = jnp.concatenate([jnp.broadcast_to(TOKENS[:, :3], (2, 3)), ends], 1)
    model = adapted(network(family)[0], {'a': (a := ADAPTERS['prompt'](tokens=3, token_ids=begin), a.targets)})
    variables = model.init(jax.random.key(0), ends)
    expected = run(network(family)[0], variables_of(family), whole)
    endpoints = run(model, variables, {'tokens': ends} if family != 'text' else ends)
    for name in POSITIONS.get(family, ('block1', 'block2')):
        got, wanted = endpoints[name], expected[name][:, 3:]
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got[ends != pad], wanted[ends != pad], 1e-4, 1e-5)
    np.testing.assert_allclose(endpoints['logits'], expected['logits'], 1e-4, 1e-5)


def test_segments_and_masked_places_move_with_the_text():
    inputs = {
        'tokens': TOKENS[:, 3:],
        'mask': jnp.ones((1, 6), bool),
        'segments': jnp.asarray([[0, 0, 0, 1, 1, 1]]),
        'positions': jnp.asarray([[0, 1, 2, 3, 4, 5]]),
        'masked': jnp.asarray([[0, 2]]),
    }
    from tl_jax.peft.prompts import _lengthened

    longer = _lengthened(inputs, 2)
    assert longer['segments'].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]] and longer['masked'].tolist() == [[2, 4]]
    assert longer['positions'].tolist() == [list(range(8))] and bool(longer['mask'].all())


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize('encoder', ['lstm', 'mlp'])
def test_p_tuning_runs_its_vectors_through_the_encoder(encoder):
    fields = dict(tokens=4, encoder=encoder, width=5)
    model, variables, own = with_adapter('gpt2', 'p_tuning', **fields)
    own = double(own['token'])
    x = own['prompt']
    for layer in (1, 2) if encoder == 'lstm' else ():
        ways = []
        for way, order in (('forward', range(4)), ('backward', range(3, -1, -1))):
            kernel, recurrent, bias = (own[f'lstm{layer}_{way}_{n}'] for n in ('kernel', 'recurrent', 'bias'))
            h, c, rows = np.zeros(5), np.zeros(5), np.zeros((4, 5))
            for t in order:
                i, f, g, o = np.split(x[t] @ kernel + h @ recurrent + bias, 4)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = rows[t] = sigmoid(o) * np.tanh(c)
            ways.append(rows)
        x = np.concatenate(ways, 1)
    layers = 2 if encoder == 'lstm' else 3
    for number in range(1, layers + 1):
        x = x @ own[f'dense{number}_kernel'] + own[f'dense{number}_bias']
        x = relu(x) if number < layers else x
    plain = adapted(network('gpt2')[0], {'a': (a := ADAPTERS['prompt'](tokens=4), a.targets)})
    same = replaced(variables, {'token': {'prompt': jnp.asarray(x, jnp.float32)}})
    got, wanted = (run(m, v, TOKENS[:, :8]) for m, v in ((model, variables), (plain, same)))
    np.testing.assert_allclose(got['logits'], wanted['logits'], 1e-4, 1e-5)


# --- prefixes ---------------------------------------------------------------------------------------------------------


def with_keys_and_values(family, tokens):
    """The network's endpoints on a text, and each block's keys and values as attention sees them, [1, length, width]."""
    seen = {}

    def watch(step, args, kwargs, context):
        y = step(*args, **kwargs)
        name = '/'.join(context.module.path[1:])
        if context.method_name == '__call__' and name.endswith(('/key', '/value', '/key_norm')):
            seen[name] = y
        return y

    def apply(variables):
        with nn.intercept_methods(watch):
            return network(family)[0].apply(variables, tokens, train=False), seen

    endpoints, seen = compiled(apply)(variables_of(family))
    if family in ('llama', 'qwen'):
        for name in [name for name in seen if name.endswith('/key')]:
            heads = seen.pop(f'{name}_norm', seen[name].reshape(1, -1, 1, 8))
            rotate = rotation(
                jnp.arange(tokens.shape[1])[None], (10000.0 if family == 'llama' else 1e6) ** -(np.arange(4) / 4)
            )
            seen[name] = rotate(heads).reshape(1, -1, 8)
    return endpoints, seen


@pytest.mark.parametrize('family', ['bert', 'roberta', 'gpt2', 'llama', 'qwen'])
def test_a_prefix_of_a_texts_keys_and_values_gives_what_the_text_gives(family):
    model, variables, own = with_adapter(family, 'prefix', inputs=TOKENS[:, :4], tokens=3)
    pad = 1 if family == 'roberta' else 0
    whole = TOKENS.at[0, 7:].set(pad)
    expected, states = with_keys_and_values(family, whole)
    assert sorted(states) == sorted(path.removesuffix('/prefix') for path in trees.flatten(own))
    own = trees.unflatten({f'{path}/prefix': y[0, :3] for path, y in states.items()})
    endpoints = run(model, replaced(variables, own), whole[:, 3:])
    for name in ('block1', 'block2'):
        np.testing.assert_allclose(endpoints[name][0, :4], expected[name][0, 3:7], 1e-4, 1e-5)


def test_padding_behind_a_prefix_changes_nothing():
    model, variables, _ = with_adapter('bert', 'prefix', tokens=3)
    longer = jnp.pad(TOKENS[:, :5], ((0, 0), (0, 2)))
    short, long = (run(model, variables, tokens)['logits'] for tokens in (TOKENS[:, :5], longer))
    np.testing.assert_allclose(short, long, 1e-4, 1e-5)


def test_a_reparametrised_prefix_is_made_by_its_mlp():
    model, variables, own = with_adapter('gpt2', 'prefix', tokens=3, reparametrise=5)
    shared = double({name: own[name] for name in ('prefix', 'hidden_kernel', 'hidden_bias')})
    hidden = np.tanh(shared['prefix'] @ shared['hidden_kernel'] + shared['hidden_bias'])
    made = {}
    for path, kernel in trees.flatten(double(own)).items():
        if path.endswith('/prefix_kernel'):
            bias = np.asarray(trees.flatten(own)[path.replace('_kernel', '_bias')], np.float64)
            made[path.removesuffix('_kernel')] = jnp.asarray(hidden @ kernel + bias, jnp.float32)
    assert len(made) == 4
    plain = with_adapter('gpt2', 'prefix', tokens=3)[0]
    got, wanted = run(model, variables, TOKENS), run(plain, replaced(variables, trees.unflatten(made)), TOKENS)
    np.testing.assert_allclose(got['logits'], wanted['logits'], 1e-4, 1e-5)


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'family', 'fields'),
    [
        ('prefix', 'llama', dict(tokens=3, reparametrise=4)),
        ('p_tuning', 'bert', dict(tokens=3, encoder='lstm', width=4)),
        ('vpt', 'deit', dict(tokens=3)),
    ],
)
def test_a_gradient_reaches_every_leaf(name, family, fields):
    model, variables, _ = with_adapter(family, name, **fields)
    inputs = network(family)[1]

    def loss(adapters):
        params = {**variables['params'], 'adapters': adapters}
        return jnp.sum(model.apply({**variables, 'params': params}, inputs, train=False)['logits'] ** 2)

    gradient = trees.flatten(compiled(jax.grad(loss))(variables['params']['adapters']))
    still = [path for path, leaf in gradient.items() if not np.abs(leaf).max() > 0]
    assert gradient and not still


# Sites of each method in two blocks; None where it does not fit.
SITES = {
    'houlsby': dict(bert=4, deberta=4, text=4, gpt2=4, llama=4, t5=10, vit=4, resnet=None),
    'pfeiffer': dict(bert=2, deberta=2, text=2, gpt2=2, llama=2, t5=4, vit=2, resnet=None),
    'parallel': dict(bert=2, deberta=2, text=None, gpt2=2, llama=2, t5=4, vit=2, resnet=None),
    'ia3': dict(bert=6, deberta=6, text=6, gpt2=6, llama=6, t5=16, vit=6, resnet=None),
    'prompt': dict(vit=None, resnet=None),
    'prefix': dict(deberta=None, text=None, t5=None, vit=None, resnet=None),
    'vpt': dict(bert=None, deberta=None, text=None, gpt2=None, llama=None, t5=None, vit=2, deit=2, resnet=None),
}


@pytest.mark.parametrize(('name', 'family'), [(name, family) for name in SITES for family in SITES[name]])
def test_each_method_finds_its_sites_or_says_which_families_it_suits(name, family):
    architecture, fields = NETWORKS[family]
    module = create_model(architecture, num_classes=3, **fields)
    adapter = ADAPTERS[name]()
    base = Model(functools.partial(module.init, train=False), module.apply)
    model, inputs = adapted(base, {'a': (adapter, adapter.targets)}), IMAGES if family in SEEING else TOKENS
    if SITES[name][family] is None:
        with pytest.raises(UserError, match='suits|is for|take prompts'):
            jax.eval_shape(model.init, jax.random.key(0), inputs)
        return
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)['params']['adapters']
    assert len({path.rpartition('/')[0] for path in trees.flatten(shapes)}) == SITES[name][family]


@pytest.mark.parametrize(('name', 'family'), [('prompt', 'bert'), ('prefix', 'gpt2'), ('prompt', 'text')])
def test_refuses_prompt_and_text_beyond_the_positions(name, family):
    adapter = ADAPTERS[name](tokens=4)
    model = adapted(network(family)[0], {'a': (adapter, adapter.targets)})
    variables = model.init(jax.random.key(0), TOKENS)
    with pytest.raises(UserError, match=r'peft.tokens: 4 of a prompt and 9 of a text are more than the 12 positions'):
        model.apply(variables, TOKENS, train=False)


@pytest.mark.parametrize(
    ('name', 'fields', 'message'),
    [
        ('prompt', dict(tokens=0), 'peft.tokens'),
        ('prefix', dict(tokens=0), 'peft.tokens'),
        ('vpt', dict(tokens=0), 'peft.tokens'),
        ('vpt', dict(dropout=1.0), 'peft.dropout'),
        ('houlsby', dict(width=0), 'peft.width'),
        ('ia3', dict(hidden='('), r"peft.hidden: '\(' is not a regular expression"),
        ('parallel', dict(activation='gelo'), "peft.activation: there is no 'gelo'"),
    ],
)
def test_refuses_fields_out_of_range(name, fields, message):
    with pytest.raises(UserError, match=message):
        ADAPTERS[name](**fields)


def test_refuses_token_ids_beyond_the_vocabulary():
    adapter = ADAPTERS['prompt'](token_ids=[3, 40])
    with pytest.raises(UserError, match='peft.token_ids: must be 0 … 39'):
        adapted(network('bert')[0], {'a': (adapter, adapter.targets)}).init(jax.random.key(0), TOKENS)


def test_generation_refuses_adapters_that_would_not_act():
    module = create_model('gpt2', **NETWORKS['gpt2'][1])
    _, variables, _ = with_adapter('gpt2', 'houlsby')
    with pytest.raises(UserError, match='adapters of these variables would not act'):
        generate(module, variables, TOKENS, max_new_tokens=2)


def test_vpt_of_more_than_ten_blocks():
    """The last of them is the tenth by number, not by letter: prompts go in before the first and come off behind it."""
    module = create_model('vit_tiny_patch16', num_classes=3, **{**IMAGE, 'depth': 10})
    base = Model(lambda key, inputs: module.init(key, inputs, train=False), module.apply)
    model = adapted(base, {'default': (ADAPTERS['vpt'](tokens=3, deep=False), r'backbone/block\d+')})
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    plain = jax.eval_shape(lambda v: base.apply(v, IMAGES, train=False), {'params': variables['params']})
    ours = jax.eval_shape(lambda v: model.apply(v, IMAGES, train=False), variables)
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in plain.items()}


@pytest.mark.parametrize('method', ['ia3', 'ssf'])
def test_factors_near_one_act_in_bfloat16(method):
    class Lone(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(256, use_bias=False, dtype=jnp.bfloat16, name='layer')(x)

    base = Model(lambda key, x: Lone().init(key, x), Lone().apply)
    x = jax.random.normal(jax.random.key(1), (64, 8))
    model = adapted(base, {'default': (ADAPTERS[method](), 'layer')})
    variables = model.init(jax.random.key(0), x)
    before = model.apply(variables, x)
    own = variables['params']['adapters']['default']['layer']
    own |= {name: jnp.full_like(leaf, 1.003) for name, leaf in own.items()}
    after = model.apply(variables, x)
    assert after.dtype == jnp.bfloat16
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    assert (after * before).sum() / (before * before).sum() == pytest.approx(
        1.003, abs=1.5e-3
    )  # of the sum; each is rounded
