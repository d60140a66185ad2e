"""The wrapper of distillation: its equation in float64, what its teachers are and do not do, and bad input in one line."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import experiment as experiment_lib
from tl_jax import mesh as mesh_lib
from tl_jax import trees
from tl_jax.errors import UserError
from tl_jax.objectives import Model, started
from tl_jax.objectives.distillation.asked import teachers_from
from tl_jax.objectives.distillation.base import Pair
from tl_jax.objectives.distillation.levels import teacher_shares
from tl_jax.objectives.distillation.logits import soft_targets
from tl_jax.pretrained import class_names, save_variables
from tl_jax.state import create_state, variables_of
from tl_jax.step import create_train_step, layouts
from tl_jax.train import Preempted, train_and_evaluate

SOFT = dict(name='soft_targets', temperature=3.0, weight=0.7)
HARD = dict(name='hard_targets', weight=0.2)
LINEAR = dict(name='mlp', dense=[])
SMALL = dict(name='mlp', dense=[5])
CONVNET = dict(name='convnet', widths=[4], norm='batch')


@pytest.fixture
def config(digits_config):
    def make(name='supervised', changes=None, **section):
        objective = {'name': name, 'distilled': {'terms': [SOFT], **section}}
        return digits_config(**{'model': SMALL, 'objective': objective, 'log_every': 1, **(changes or {})})

    return make


def parts(config, moved=0.5):
    """The experiment, and its variables as they are when it begins and away from there."""
    built = experiment_lib.build(config_lib.resolve(config))
    objective = built.stages[0].objective
    start = started(objective, built.stages[0].init(jax.random.key(0), built.batch))
    start['progress'] = {'step': jnp.zeros((), jnp.int32), 'fraction': jnp.zeros(())}
    draw = np.random.RandomState(1)
    params = jax.tree.map(lambda w: w + moved * draw.normal(size=w.shape).astype(np.float32), start['params'])
    return built, start, {**start, 'params': params}


def loss(built, variables, **fields):
    batch = {'train': {**built.batch['train'], **fields}}
    value, aux = built.stages[0].objective.loss(variables, batch, jax.random.key(0))
    return float(value), aux


def logits(params, image):
    """In float64, of an `mlp`: flatten, dense, ReLU, head."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    x = np.asarray(image, np.float64).reshape(len(image), -1)
    for layer in p.get('backbone', {}).values():
        x = np.maximum(x @ layer['kernel'] + layer['bias'], 0)
    return x @ p['head']['kernel'] + p['head']['bias']


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(target, x):
    return np.sum(np.exp(log_softmax(target)) * (log_softmax(target) - log_softmax(x)), -1)


def cross_entropy(x, label):
    return -log_softmax(x)[np.arange(len(x)), label]


def soft(s, t, temperature=3.0):
    return temperature**2 * divergence(t / temperature, s / temperature)


@pytest.mark.parametrize('how', ['mean', 'labels', 'entropy', [3, 1]], ids=str)
def test_two_teachers_two_terms_and_labels_in_float64(config, how):
    teachers = [dict(name='mlp', dense=[7]), SMALL]
    built, _, now = parts(
        config(
            teacher=teachers, terms=[SOFT, HARD, {**SOFT, 'temperature': 1.5}], label_weight=0.4, teacher_weights=how
        )
    )
    image, label = (built.batch['train'][name] for name in ('image', 'label'))
    s, *t = (logits(part, image) for part in (now['params'], now['params']['teacher'], now['params']['teacher2']))
    if how == 'labels':
        wrong = np.exp([cross_entropy(x, label) for x in t])
        shares = 1 - wrong / wrong.sum(0)
    elif how == 'entropy':
        sure = np.exp([np.sum(np.exp(log_softmax(x)) * log_softmax(x), -1) for x in t])
        shares = sure / sure.sum(0)
    else:
        shares = np.array([[0.5], [0.5]] if how == 'mean' else [[0.75], [0.25]])
    mean = lambda compare: np.mean(sum(w * compare(x) for w, x in zip(shares, t, strict=True)))
    wanted = {
        'soft_targets': mean(lambda x: soft(s, x)),
        'hard_targets': mean(lambda x: cross_entropy(s, x.argmax(-1))),
        'soft_targets2': mean(lambda x: soft(s, x, 1.5)),
    }
    value, aux = loss(built, now)
    for name, term in wanted.items():
        assert float(aux.metrics[name]) == pytest.approx(term, rel=1e-5), name
    total = 0.7 * wanted['soft_targets'] + 0.2 * wanted['hard_targets'] + 0.7 * wanted['soft_targets2']
    assert value == pytest.approx(0.4 * np.mean(cross_entropy(s, label)) + total, rel=1e-5)
    assert float(aux.metrics['teacher_agreement']) == np.mean(s.argmax(-1) == t[0].argmax(-1))
    assert not aux.endpoints


def test_teachers_are_weighed_by_the_labels_of_mixed_images():
    draw = np.random.RandomState(0)
    target, t = draw.dirichlet(np.ones(4), 6), draw.normal(size=(3, 6, 4))
    wrong = np.exp([-np.sum(target * log_softmax(x), -1) for x in t])
    teachers = {str(k): {'logits': jnp.asarray(x)} for k, x in enumerate(t)}
    shares = teacher_shares('labels', teachers, {'target': jnp.asarray(target), 'label': np.zeros(6, int)})
    np.testing.assert_allclose(shares, (1 - wrong / wrong.sum(0)) / 2, rtol=1e-5)


def test_the_gradient_of_soft_targets_keeps_its_scale_at_any_temperature():
    """Hinton et al. 2015, eq. 2 (times τ²), and its limit in eq. 4: differences of centred logits over C."""
    draw = np.random.RandomState(0)
    s, t = draw.normal(size=(2, 6, 10))
    gradients = {}
    for temperature in (1.0, 4.0, 20.0, 200.0):
        term = soft_targets(temperature=temperature)

        def compare(s, term=term):
            return jnp.sum(term.loss({}, {}, Pair({'logits': s}, {'logits': jnp.asarray(t)}, {}), None)[0])

        gradients[temperature] = np.asarray(jax.grad(compare)(jnp.asarray(s)), np.float64)
        softened = np.exp(log_softmax(s / temperature)) - np.exp(log_softmax(t / temperature))
        np.testing.assert_allclose(gradients[temperature], temperature * softened, atol=2e-5)
    centred = lambda x: x - x.mean(-1, keepdims=True)
    np.testing.assert_allclose(gradients[200.0], (centred(s) - centred(t)) / 10, atol=2e-3)
    sizes = [np.linalg.norm(g) for g in gradients.values()]
    assert max(sizes) / min(sizes) < 1.3


def test_weights_are_annealed_over_the_stage(config):
    ramp = dict(start=1.0, end=0.2, until=0.5)
    built, _, now = parts(
        config(teacher=LINEAR, label_weight=ramp, terms=[{**SOFT, 'weight': dict(start=0.0, end=2.0)}])
    )
    plain = lambda fraction: loss(built, {**now, 'progress': {'step': jnp.zeros((), int), 'fraction': fraction}})
    term = float(plain(0.0)[1].metrics['soft_targets'])
    labels = plain(0.0)[0]
    for fraction, label_weight, weight in ((0.25, 0.6, 0.5), (0.5, 0.2, 1.0), (0.75, 0.2, 1.5)):
        assert plain(fraction)[0] == pytest.approx(label_weight * labels + weight * term, rel=1e-5)


def test_classes_pick_the_teachers_logits(config):
    order = [9, 3, 11, 0, 5, 7, 10, 1, 8, 2]
    built, _, now = parts(config(teacher={**SMALL, 'num_classes': 12}, classes=order, label_weight=0.0))
    image = built.batch['train']['image']
    s, t = logits(now['params'], image), logits(now['params']['teacher'], image)
    assert t.shape == (16, 12)
    assert loss(built, now)[0] == pytest.approx(0.7 * np.mean(soft(s, t[:, order])), rel=1e-5)


def test_without_labels_there_are_the_terms_alone(config):
    built, _, now = parts(config('unsupervised', teacher=LINEAR))
    image = built.batch['train']['image']
    wanted = 0.7 * np.mean(soft(logits(now['params'], image), logits(now['params']['teacher'], image)))
    del built.batch['train']['label']
    assert loss(built, now)[0] == pytest.approx(wanted, rel=1e-5)


def test_the_teacher_sees_the_mixed_images_that_the_student_sees(config):
    from tl_jax.data.mixing import mixup

    whole = config(teacher=LINEAR, label_weight=0.0)
    whole['objective']['mixed'] = {'mixup': 0.8}
    built, _, now = parts(whole)
    draw = jax.random.split(jax.random.key(0), 3)[0]
    image, _ = mixup(draw, built.batch['train']['image'], jnp.eye(10)[built.batch['train']['label']], 0.8)
    assert np.abs(np.asarray(image) - built.batch['train']['image']).max() > 0.1
    wanted = 0.7 * np.mean(soft(logits(now['params'], image), logits(now['params']['teacher'], image)))
    assert loss(built, now)[0] == pytest.approx(wanted, rel=1e-5)


def test_no_gradient_and_no_rule_reaches_the_teacher(config, tmp_path):
    whole = config(teacher=CONVNET, terms=[{**SOFT, 'weight': 5.0}], changes={'model': CONVNET, 'cache_teacher': False})
    built, start, now = parts(whole)
    value = lambda params: built.stages[0].objective.loss({**now, 'params': params}, built.batch, jax.random.key(0))[0]
    grads = jax.jit(jax.grad(value))(now['params'])
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads['teacher'])) == 0 < np.abs(grads['head']['kernel']).max()
    state = train_and_evaluate(whole, tmp_path / 'run')
    for collection, before in (('params', start['params']), ('batch_stats', start['batch_stats'])):
        after = variables_of(state)[collection]
        jax.tree.map(np.testing.assert_array_equal, after['teacher'], before['teacher'])
        assert (
            np.abs(np.asarray(jax.tree.leaves(after['backbone'])[0]) - jax.tree.leaves(before['backbone'])[0]).max() > 0
        )
    from tl_jax.finished import network

    assert set(network(tmp_path / 'run')[1]['params']) == {'backbone', 'head'}


def steps_of(config, count):
    """The states after 0 … count steps."""
    built = experiment_lib.build(config_lib.resolve(config))
    stage, layout = built.stages[0], layouts(built, mesh_lib.create_mesh(data=1))(0)
    variables = started(stage.objective, stage.init(jax.random.key(0), built.batch))
    state = create_state(variables, 0)._replace(opt_state=layout.partition.optimizer.init(variables['params']))
    step = jax.jit(create_train_step(stage.objective, stage.gradient, layout.partition, 0.0, 0.0, steps=count))
    states = [(state, {})]
    for _ in range(count):
        states.append(step(states[-1][0], built.batch))
    return states


def test_a_student_is_its_own_teacher_as_the_stage_finds_it(config):
    states = steps_of(config(), 3)
    divergences = [float(metrics['train/soft_targets']) for _, metrics in states[1:]]
    assert divergences[0] == pytest.approx(0, abs=1e-7) and 0 < divergences[1] < divergences[2]
    first, last = states[0][0], states[-1][0]
    jax.tree.map(np.testing.assert_array_equal, last.collections['teacher']['params'], first.params)


def test_a_teacher_that_follows_is_the_moving_average_of_the_student(config):
    states = steps_of(config(decay=0.8, changes={'model': CONVNET}), 4)
    seen = lambda state, name: trees.flatten(variables_of(state)[name])
    for name in ('params', 'batch_stats'):
        average = {path: np.asarray(w, np.float64) for path, w in seen(states[0][0], name).items()}
        for (before, _), (after, _) in itertools.pairwise(states):
            average = {p: 0.8 * a + 0.2 * np.asarray(seen(before, name)[p], np.float64) for p, a in average.items()}
            for path, kept in trees.flatten(after.collections['teacher'][name]).items():
                np.testing.assert_allclose(kept, average[path], rtol=1e-5, atol=1e-7)
    assert float(states[-1][1]['train/soft_targets']) > 0


def records(workdir):
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{k: r[k] for k in ('step', 'train/loss', 'train/soft_targets') if k in r} for r in lines]


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(config, tmp_path):
    whole = config(teacher=[], decay=0.7, label_weight=dict(start=1.0, end=0.1), changes={'checkpoint_every': 2})
    state = train_and_evaluate(whole, tmp_path / 'whole')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('tl_jax.mesh.preempted', lambda asked, step: step == 3)
        with pytest.raises(Preempted):
            train_and_evaluate(whole, tmp_path / 'stopped')
    again = train_and_evaluate(whole, tmp_path / 'stopped')
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert records(tmp_path / 'stopped') == records(tmp_path / 'whole')


def test_eight_devices_give_the_losses_of_one(config, tmp_path):
    section = dict(teacher=[CONVNET, LINEAR], teacher_weights='labels', terms=[SOFT, HARD])
    for name, devices in (('one', 1), ('eight', 8)):
        whole = config(**section, changes={'mesh': {'data': devices}, 'cache_teacher': False})
        train_and_evaluate(whole, tmp_path / name)
    one, eight = (records(tmp_path / name) for name in ('one', 'eight'))
    assert [r['step'] for r in one] == [r['step'] for r in eight]
    for a, b in zip(one, eight, strict=True):
        # A divergence of 0.03 is left of terms of 2, whose last bit is 2e-7.
        assert b == pytest.approx(a, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        (dict(terms=[]), r'distilled.terms: is empty'),
        (dict(terms=[dict(name='soft_target')]), r"terms\[0\].name: 'soft_target' is not known; did you mean 'soft_targets'"),
        (dict(terms=[dict(SOFT, temperature=0.0)]), r'terms\S*: temperature must be above 0, not 0'),
        (dict(terms=[dict(SOFT, temperature=-4)]), r'temperature must be above 0, not -4'),
        (dict(terms=[dict(SOFT, temperatur=4.0)]), r'terms\[0\].temperatur: unknown field'),
        (dict(terms=[HARD, dict(SOFT, student='logit')]), r"\[1\]: the student .*'logit'; it gives dense1, features, logits"),
        (dict(terms=[dict(SOFT, teacher='stage1')]), r"the teacher gives no 'stage1'; it gives features, logits"),
        (dict(terms=[dict(SOFT, weight='all')]), r'terms\[0\].weight: must be float or Mapping'),
        (dict(terms=[dict(SOFT, weight=dict(start=1.0))]), r'terms\[0\].weight.end: is required'),
        (dict(label_weight=dict(start=1.0, end=0.0, until=2.0)), 'distilled.label_weight.until: is a share of the stage'),
        (dict(teacher={**LINEAR, 'num_classes': 12}), r"tells 10 classes apart \('logits'\), the teacher 12 .*`classes`"),
        (dict(classes=[0, 10] + [1] * 8), r'classes: names 10, and the teacher has the classes 0 … 9'),
        (dict(teacher=[LINEAR, LINEAR], teacher_weights=[1.0]), r'teacher_weights: 1 numbers for 2 teachers'),
        (dict(teacher=[LINEAR, LINEAR], teacher_weights=[1.0, -1.0]), r'teacher_weights: must be 0 or more, and one above 0'),
        (dict(teacher=[LINEAR, LINEAR], teacher_weights='best'), r'teacher_weights: must be'),
        (dict(teacher=[], decay=1.5), r'decay: must lie in 0 … 1'),
        (dict(decay=0.9), r'decay: is of a student that teaches itself'),
        (dict(teachers=LINEAR), r'distilled.teachers: unknown field'),
    ],
)  # fmt: skip
def test_bad_input_in_one_line(config, section, message):
    with pytest.raises(UserError, match=message) as caught:
        parts(config(**{'teacher': LINEAR, **section}))
    assert '\n' not in str(caught.value)


def test_an_objective_without_endpoints_has_nothing_to_compare(config, adaptation):
    whole = adaptation('target')
    whole['objective'] |= {'distilled': {'teacher': SMALL, 'terms': [SOFT]}}
    with pytest.raises(UserError, match="wants the student's 'logits', and this objective shows no endpoints"):
        parts(whole)


@pytest.mark.parametrize('term', [dict(HARD, weight=0.5), dict(SOFT, weight=0.5)], ids=lambda term: term['name'])
def test_the_distillation_token_learns_from_the_teacher_and_the_class_token_from_labels(config, term):
    """Touvron et al. 2020, eq. 2 and 3: each head has its own loss, and the prediction is the mean of both."""
    model = dict(name='deit_tiny_distilled_patch16', width=6, depth=1, heads=2, image_size=8, patch_size=4)
    whole = config(
        teacher=LINEAR, terms=[dict(term, student='distillation_logits')], label_weight=0.5, changes={'model': model}
    )
    whole['objective']['logits'] = 'class_logits'
    built, _, now = parts(whole)
    fields = built.batch['train']
    outputs = jax.jit(built.stages[0].objective.predict)(now, fields)
    tokens, head = np.asarray(outputs['features'], np.float64), now['params']['head']
    by = lambda x, w: x @ np.asarray(w['kernel'], np.float64) + np.asarray(w['bias'], np.float64)
    s, d = by(tokens[:, :6], head), by(tokens[:, 6:], head['distillation'])
    np.testing.assert_allclose(outputs['logits'], (s + d) / 2, rtol=1e-4, atol=1e-5)
    t = logits(now['params']['teacher'], fields['image'])
    learnt = cross_entropy(d, t.argmax(-1)) if term['name'] == 'hard_targets' else soft(d, t)
    value, aux = loss(built, now)
    assert value == pytest.approx(0.5 * np.mean(cross_entropy(s, fields['label'])) + 0.5 * np.mean(learnt), rel=1e-4)
    assert float(aux.metrics['accuracy']) == np.mean(s.argmax(-1) == fields['label'])


def test_labels_judge_an_endpoint_that_there_is(config):
    whole = config(teacher=LINEAR)
    whole['objective']['logits'] = 'class_logits'
    with pytest.raises(UserError, match="objective.logits: the network gives no 'class_logits'; did you mean 'logits'"):
        parts(whole)


def test_classes_of_other_names_want_a_mapping():
    network = Model(None, None, class_names=lambda: ('ant', 'bee'))

    def ask(names, classes=()):
        found = teachers_from(network, [network], ('logits',), classes=classes, decay=1.0)
        found.require_classes(names)
        return found

    assert ask(['ant', 'bee']).roles == ('teacher',)
    assert ask(['0', '1']) and ask(['cat', 'dog'], classes=[1, 0])  # numbers say nothing; a mapping says all
    with pytest.raises(
        UserError, match='the teacher tells ant, bee apart, the data bee, ant; name the teacher’s class for'
    ):
        ask(['bee', 'ant'])


def test_a_teacher_is_read_when_a_run_begins_and_not_before(config, tmp_path):
    source = str(tmp_path / 'teacher.safetensors')
    built = experiment_lib.build(config_lib.resolve(config(teacher={**LINEAR, 'source': source})))  # a dry run's part
    with pytest.raises(UserError, match=r'teacher\.safetensors.*there is no such file'):
        built.stages[0].init(jax.random.key(0), built.batch)


def test_a_run_says_which_classes_its_network_tells_apart(tmp_path):
    for names, told in ((['ant', 'bee'], ('ant', 'bee')), (['0', '1'], ())):
        card = {'tl_jax': json.dumps({'class_names': names})}
        save_variables(tmp_path / 'model.safetensors', {'params': {'head': {'bias': np.zeros(2)}}}, card)
        assert class_names(tmp_path / 'model.safetensors') == told


def test_a_student_that_teaches_itself_judges_by_the_head_that_it_had(config):
    term = dict(name='srrl', student='features', weight=1.0)
    built, start, _ = parts(config(teacher=[], terms=[term], label_weight=0.0))
    head = {'params': {'head': {'kernel': 9.0 + start['params']['head']['kernel']}}}
    before, after = (loss(built, variables)[0] for variables in (start, trees.merge(start, head)))
    assert before == after > 0
