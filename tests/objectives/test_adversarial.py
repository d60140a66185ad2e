"""Domain adversarial methods against their equations, written again in float64 numpy and differentiated by differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from tl_jax.config import plain
from tl_jax.errors import UserError
from tl_jax.networks import model_from
from tl_jax.objectives.adversarial import adda, cdan, dann, domain_logit, ramp, reverse_gradient
from tl_jax.optimizers import create_partition
from tl_jax.train import train_and_evaluate
from tl_jax.trees import flatten, merge

CLASSES, FEATURES, BATCH = 3, 4, 6
FRACTION = 0.13


def network(**fields):
    return model_from(**{'dense': [], 'classes': CLASSES, 'dtype': jnp.float32, 'load': False, 'name': 'mlp', **fields})


def two_streams(seed=0, shape=(2, 2, 1), batch=BATCH):
    draw = np.random.default_rng(seed)
    image = lambda shift: jnp.asarray(draw.normal(size=(batch, *shape)) + shift, jnp.float32)
    label = jnp.asarray(draw.integers(0, CLASSES, batch), jnp.int32)
    return {'source': {'image': image(0), 'label': label}, 'target': {'image': image(0.7)}}


def at(variables, fraction=FRACTION):
    return {**variables, 'progress': {'step': jnp.int32(7), 'fraction': jnp.float32(fraction)}}


@jax.jit
def nudged(variables):
    """Off the zeros of fresh biases, where a ReLU has no derivative; the same roles differ afterwards."""
    leaves, treedef = jax.tree.flatten(variables)
    noise = [0.3 * jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, [leaf + n for leaf, n in zip(leaves, noise, strict=True)])


def gradient_of(loss, variables, batch, **options):
    def of_params(params):
        return loss({**at(variables, **options), 'params': params}, batch, jax.random.key(3))

    (value, aux), grads = jax.jit(jax.value_and_grad(of_params, has_aux=True))(variables['params'])
    return value, aux, flatten(grads)


def as_float64(tree):
    return {path: np.asarray(leaf, np.float64) for path, leaf in flatten(tree).items()}


def differences(function, params, prefix, step=1e-6):
    """Central differences of a function of `{path: array}` with respect to the leaves under a prefix."""
    grads = {}
    for path in (p for p in params if p.startswith(prefix)):
        grads[path] = np.zeros_like(params[path])
        for i in np.ndindex(params[path].shape):
            nudged = [{**params, path: params[path].copy()} for _ in range(2)]
            nudged[0][path][i] += step
            nudged[1][path][i] -= step
            grads[path][i] = (function(nudged[0]) - function(nudged[1])) / (2 * step)
    return grads


def encode(params, image, role='backbone'):
    x = np.asarray(image, np.float64).reshape(len(image), -1)
    return np.maximum(x @ params[f'{role}/dense1/kernel'] + params[f'{role}/dense1/bias'], 0)


def classify(params, features):
    return features @ params['head/kernel'] + params['head/bias']


def judge(params, seen):
    hidden = np.maximum(
        seen @ params['discriminator/backbone/dense1/kernel'] + params['discriminator/backbone/dense1/bias'], 0
    )
    logits = hidden @ params['discriminator/head/kernel'] + params['discriminator/head/bias']
    return 1 / (1 + np.exp(-logits[:, 0]))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def source_loss(params, batch):
    logs = log_softmax(classify(params, encode(params, batch['source']['image'])))
    return -np.mean(logs[np.arange(BATCH), np.asarray(batch['source']['label'])])


def dann_domain_loss(params, batch):
    d_s, d_t = (judge(params, encode(params, batch[s]['image'])) for s in ('source', 'target'))
    return -np.mean(np.log(1 - d_s)) - np.mean(np.log(d_t))


def cdan_domain_loss(params, batch, entropy, maps=None):
    """pytorch/loss.py of thuml/CDAN, but for its epsilon and its ½; g is a constant in the product, given as `frozen`."""
    total = 0.0
    for stream in ('source', 'target'):
        features = encode(params, batch[stream]['image'])
        logs = log_softmax(classify(params, features))
        constant = np.exp(log_softmax(classify(params['frozen'], encode(params['frozen'], batch[stream]['image']))))
        if maps is None:
            seen = np.einsum('bc,bf->bcf', constant, features).reshape(BATCH, -1)
        else:
            seen = (features @ maps['features']) * (constant @ maps['logits']) / np.sqrt(maps['logits'].shape[1])
        d = judge(params, seen)
        losses = -np.log(d if stream == 'target' else 1 - d)
        w = 1 + np.exp(np.sum(np.exp(logs) * logs, -1)) if entropy else np.ones(BATCH)
        w0 = 1 + np.exp(np.sum(np.exp(constant_logs := np.log(constant)) * constant_logs, -1)) if entropy else w
        total += np.sum(w * losses) / np.sum(w0)
    return total


def check_adversarial(objective, batch, domain, *, weight, coefficient):
    """Encoder and head descend the classification and ascend the domain loss; the discriminator descends the latter."""
    variables = nudged(jax.jit(objective.init)(jax.random.key(0), batch))
    value, aux, grads = gradient_of(objective.loss, variables, batch)
    params = as_float64(variables['params'])
    frozen = {**params}
    domain_of = lambda p: domain({**p, 'frozen': frozen}, batch, variables)
    np.testing.assert_allclose(value, source_loss(params, batch) + weight * domain_of(params), rtol=2e-6)
    np.testing.assert_allclose(aux.metrics['domain_loss'], domain_of(params), rtol=2e-6)
    np.testing.assert_allclose(aux.metrics['reversal'], coefficient, rtol=1e-5)
    for role, sign in (('backbone', -coefficient), ('head', -coefficient), ('discriminator', 1.0)):
        of_domain = differences(domain_of, params, role)
        of_source = differences(lambda p: source_loss(p, batch), params, role)
        assert role != 'backbone' or max(np.abs(g).max() for g in of_domain.values()) > 1e-2
        for path, grad in of_domain.items():
            expected = of_source[path] + sign * weight * grad
            np.testing.assert_allclose(grads[path], expected, atol=2e-6, rtol=1e-4, err_msg=path)


def test_reversal_is_the_identity_with_the_gradient_turned_round():
    x, upstream = jax.random.normal(jax.random.key(0), (2, 5, 3))
    y, back = jax.vjp(reverse_gradient, x, jnp.float32(0.3))
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(back(upstream)[0], -0.3 * upstream, rtol=1e-6)
    assert back(upstream)[1] == 0
    half = jax.vjp(reverse_gradient, x.astype(jnp.bfloat16), jnp.float32(0.3))[1](upstream.astype(jnp.bfloat16))[0]
    assert half.dtype == jnp.bfloat16


def test_ramp_at_known_fractions():
    values = [float(ramp(at({}, fraction), 10.0)) for fraction in (0, 0.1, 0.25, 0.5, 0.999)]
    expected = [2 / (1 + np.exp(-10 * p)) - 1 for p in (0, 0.1, 0.25, 0.5, 0.999)]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose(values[1], 0.46211716, rtol=1e-6)
    assert values[0] == 0 and ramp(at({}, 0.0), 0.0) == 1


@pytest.mark.parametrize(('gamma', 'joint'), [(10.0, True), (0.0, True), (10.0, False)])
def test_dann_is_its_equation(gamma, joint):
    objective = dann(
        network(dense=[FEATURES]), discriminator=network(dense=[5], num_classes=1), weight=0.7, gamma=gamma, joint=joint
    )
    coefficient = 2 / (1 + np.exp(-gamma * FRACTION)) - 1 if gamma else 1.0
    domain = lambda params, batch, variables: dann_domain_loss(params, batch)
    check_adversarial(objective, two_streams(), domain, weight=0.7, coefficient=coefficient)


@pytest.mark.parametrize(('product', 'entropy'), [('multilinear', False), ('multilinear', True), ('randomized', True)])
def test_cdan_is_the_authors_code(product, entropy):
    objective = cdan(
        network(dense=[FEATURES]),
        discriminator=network(dense=[5], num_classes=1),
        weight=1.3,
        product=product,
        entropy=entropy,
        random_dim=7,
    )

    def domain(params, batch, variables):
        maps = variables.get('random_map')
        maps = maps and {name: np.asarray(m, np.float64) for name, m in maps.items()}
        assert (maps is None) == (product == 'multilinear')
        return cdan_domain_loss(params, batch, entropy, maps)

    coefficient = 2 / (1 + np.exp(-10 * FRACTION)) - 1
    check_adversarial(objective, two_streams(1), domain, weight=1.3, coefficient=coefficient)


@pytest.mark.parametrize(('width', 'seen'), [(1365, 4095), (1366, 64)])
def test_cdan_sketches_above_4096(width, seen):
    objective = cdan(network(dense=[width]), discriminator=network(dense=[2], num_classes=1), random_dim=64)
    variables = jax.eval_shape(objective.init, jax.random.key(0), two_streams())
    assert variables['params']['discriminator']['backbone']['dense1']['kernel'].shape == (seen, 2)


def test_random_sketch_keeps_inner_products():
    objective = cdan(
        network(dense=[16]), discriminator=network(dense=[1], num_classes=1), product='randomized', random_dim=20000
    )
    maps = objective.init(jax.random.key(0), two_streams())['random_map']
    f, g = jax.random.normal(jax.random.key(1), (2, 16)), jax.random.normal(jax.random.key(2), (2, CLASSES))
    sketch = (f @ maps['features']) * (g @ maps['logits']) / np.sqrt(20000)
    np.testing.assert_allclose(sketch @ sketch.T, (f @ f.T) * (g @ g.T), atol=2.0)


def test_joint_batch_norm_sees_the_mixture_and_separate_passes_each_domain():
    model = network(name='convnet', widths=[3], norm='batch', pool=1, dense=[FEATURES])
    batch = two_streams(2)
    moved = {}
    for joint in (True, False):
        objective = dann(model, discriminator=network(dense=[5], num_classes=1), joint=joint)
        variables = jax.jit(objective.init)(jax.random.key(0), batch)
        _, aux, _ = gradient_of(objective.loss, variables, batch)
        moved[joint] = np.asarray(aux.collections['batch_stats']['backbone']['norm1']['mean'])
    kernel = np.asarray(variables['params']['backbone']['conv1']['kernel'], np.float64)

    def mean(images):
        maps = [[correlate2d(x[..., 0], kernel[..., 0, k], mode='same') for k in range(3)] for x in images]
        return np.mean(maps, (0, 2, 3))

    source, target = (np.asarray(batch[s]['image'], np.float64) for s in ('source', 'target'))
    np.testing.assert_allclose(moved[True], 0.1 * mean(np.concatenate([source, target])), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved[False], 0.9 * 0.1 * mean(source) + 0.1 * mean(target), rtol=1e-4, atol=1e-6)


def test_a_sigmoid_and_a_softmax_of_two_are_one_discriminator():
    logits = jax.random.normal(jax.random.key(0), (5, 2))
    np.testing.assert_allclose(jax.nn.sigmoid(domain_logit(logits)), jax.nn.softmax(logits)[:, 1], rtol=1e-6)
    np.testing.assert_array_equal(domain_logit(logits[:, :1]), logits[:, 0])
    with pytest.raises(UserError, match=r'discriminator.num_classes: must be 1 \(a sigmoid\) or 2 .*, not 3'):
        domain_logit(jnp.zeros((2, 3)))


def test_domains_of_two_shapes_are_refused():
    batch = {**two_streams(), 'target': {'image': jnp.zeros((BATCH, 3, 2, 1))}}
    objective = dann(network(), discriminator=network(num_classes=1))
    variables = objective.init(jax.random.key(0), batch)
    with pytest.raises(UserError, match=r'shape \[2, 2, 1\] \(source\) and \[3, 2, 1\] \(target\); resize'):
        objective.loss(at(variables), batch, jax.random.key(0))


def adda_at_random():
    """ADDA whose two encoders differ."""
    objective, batch = adda(network(dense=[FEATURES]), discriminator=network(dense=[5], num_classes=2)), two_streams(4)
    return objective, nudged(jax.jit(objective.init)(jax.random.key(0), batch)), batch


def test_adda_is_its_equation():
    objective, variables, batch = adda_at_random()
    params = as_float64(variables['params'])

    def judged(p, seen):
        hidden = np.maximum(
            seen @ p['discriminator/backbone/dense1/kernel'] + p['discriminator/backbone/dense1/bias'], 0
        )
        return log_softmax(hidden @ p['discriminator/head/kernel'] + p['discriminator/head/bias'])

    # tools/train_adda.py: the source's label is 0, the target's 1, and inverted for the encoder.
    def discriminator(p):
        of_source, of_target = encode(p, batch['source']['image']), encode(p, batch['target']['image'], 'target')
        return -np.mean(judged(p, of_source)[:, 0]) - np.mean(judged(p, of_target)[:, 1])

    def target(p):
        return -np.mean(judged(p, encode(p, batch['target']['image'], 'target'))[:, 0])

    for phase, function in zip(objective.phases, (discriminator, target), strict=True):
        value, _, grads = gradient_of(phase.loss, variables, batch)
        np.testing.assert_allclose(value, function(params), rtol=2e-6)
        for path, grad in differences(function, params, phase.name).items():
            np.testing.assert_allclose(grads[path], grad, atol=2e-6, rtol=1e-4, err_msg=path)


def test_adda_starts_from_a_copy_and_predicts_with_the_target_encoder():
    objective, variables, batch = adda_at_random()
    params = as_float64(variables['params'])
    logits = objective.predict(variables, batch['target'])['logits']
    np.testing.assert_allclose(logits, classify(params, encode(params, batch['target']['image'], 'target')), rtol=1e-4)
    started = objective.start(variables)
    assert not np.allclose(params['target/dense1/kernel'], params['backbone/dense1/kernel'])
    for path in ('dense1/kernel', 'dense1/bias'):
        copy, original = (flatten(started['params'][role])[path] for role in ('target', 'backbone'))
        np.testing.assert_array_equal(copy, original)
        assert copy.unsafe_buffer_pointer() != original.unsafe_buffer_pointer()


def test_adda_copies_statistics_and_moves_only_the_targets():
    model = network(name='convnet', widths=[3], norm='batch', dense=[FEATURES])
    objective, batch = adda(model, discriminator=network(dense=[5], num_classes=1)), two_streams(5)
    variables = jax.jit(objective.init)(jax.random.key(0), batch)
    before = {'mean': jnp.array([0.1, -0.2, 0.3]), 'var': jnp.array([1.0, 2.0, 3.0])}
    variables = objective.start(merge(variables, {'batch_stats': {'backbone': {'norm1': before}}}))
    np.testing.assert_array_equal(variables['batch_stats']['target']['norm1']['var'], before['var'])
    first, second = (gradient_of(phase.loss, variables, batch)[1].collections for phase in objective.phases)
    unmoved = merge(variables, first)['batch_stats']['target']['norm1']['mean']
    np.testing.assert_array_equal(unmoved, before['mean'])
    after = merge(variables, second)['batch_stats']
    assert not np.allclose(after['target']['norm1']['mean'], before['mean'])
    np.testing.assert_array_equal(after['backbone']['norm1']['mean'], before['mean'])


def test_a_phase_with_nothing_to_train_is_one_line():
    objective, variables, _ = adda_at_random()
    phases = [(phase.name, phase.rule) for phase in objective.phases]
    rules = [('discriminator/.*', {'name': 'adam', 'lr': 1e-3})]
    with pytest.raises(UserError, match="leaves the phase 'target' .*nothing to train; add a rule for it") as error:
        create_partition(rules, variables['params'], steps=1, phases=phases)
    assert '\n' not in str(error.value)


ADAM = {'name': 'adam', 'lr': 1e-3}
DIGITS = {
    'source': 'sklearn:digits/train[:64]',
    'target': {'spec': 'sklearn:digits/train[64:128]', 'unlabelled': True},
}
JUDGE = {'name': 'mlp', 'dense': [8], 'num_classes': 1}


def small_run(digits_config, workdir, *stages):
    config = digits_config(
        data={'train': DIGITS, 'eval': 'sklearn:digits/val[:50]', 'train_transform': ['to_float']}
        | {'eval_transform': ['to_float']},
        stages=list(stages),
        model={'name': 'convnet', 'widths': [4], 'norm': 'batch', 'dense': [8]},
    )
    return train_and_evaluate(plain(config), workdir)


def test_cdan_runs_end_to_end_and_keeps_its_sketch(digits_config, tmp_path):
    objective = {'name': 'cdan', 'product': 'randomized', 'random_dim': 6, 'discriminator': JUDGE}
    state = small_run(digits_config, tmp_path, {'steps': 4, 'train': [('.*', ADAM)], 'objective': objective})
    assert state.collections['random_map']['logits'].shape == (10, 6)


def test_adda_runs_after_its_source_stage(digits_config, tmp_path):
    state = small_run(
        digits_config,
        tmp_path,
        {'steps': 3, 'train': [('.*', ADAM)], 'objective': {'name': 'supervised', 'stream': 'source'}},
        {
            'steps': 3,
            'train': [('(target|discriminator)/.*', ADAM)],
            'objective': {'name': 'adda', 'discriminator': JUDGE},
        },
    )
    params = flatten(state.params)
    assert not np.array_equal(params['target/conv1/kernel'], params['backbone/conv1/kernel'])
    np.testing.assert_allclose(params['target/conv1/kernel'], params['backbone/conv1/kernel'], atol=0.02)
    statistics = flatten(state.collections['batch_stats'])
    assert not np.array_equal(statistics['target/norm1/mean'], statistics['backbone/norm1/mean'])
