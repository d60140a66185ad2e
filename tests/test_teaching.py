"""A teacher that runs once teaches what it would have taught in every step, and no other's word is taken for its."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import mesh as mesh_lib
from tl_jax import run_once, trees
from tl_jax.config import resolve
from tl_jax.data import cached
from tl_jax.errors import UserError
from tl_jax.experiment import build
from tl_jax.run import Run
from tl_jax.state import variables_of
from tl_jax.step import progress
from tl_jax.teaching import all_logits, highest, with_fields, with_fixed_networks
from tl_jax.train import initial_state, train_and_evaluate

SGD = {'name': 'sgd', 'lr': 0.1}
STAGE = {'name': 'distil', 'epochs': 2, 'train': [['.*', SGD]]}
TEACHER = {'name': 'convnet', 'widths': [4, 4], 'norm': 'batch'}
SOFT = {'name': 'soft_targets', 'temperature': 4.0, 'weight': 0.9}
DATA = {
    'train': 'sklearn:digits/train[:40]',
    'eval': 'sklearn:digits/val[:20]',
    'train_transform': ['to_float'],
    'eval_transform': ['to_float'],
}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def config(digits_config):
    def make(teacher=TEACHER, terms=(SOFT,), objective=(), **changes):
        taught = {'teacher': teacher, 'terms': list(terms), 'label_weight': 0.1}
        fields = {'name': 'supervised', 'distilled': taught, **dict(objective)}
        small = {'model': {'name': 'mlp', 'dense': [8]}, 'data': DATA, 'eval_batch_size': 16, 'stages': [STAGE]}
        return digits_config(**{**small, 'objective': fields, **changes})

    return make


def begun(config):
    """A run that is about to enter its first stage, and its state."""
    experiment, mesh = build(resolve(config)), mesh_lib.create_mesh(data=1)
    run = Run(None, experiment, mesh, None, None, None, None, None, None)
    return run, initial_state(experiment, mesh)


def as_told(config):
    """A run, its state, and the run as its first stage sees it."""
    run, state = begun(config)
    return run, state, with_fixed_networks(run, state, 0)


def asked(teacher, state, batch):
    return jax.jit(teacher.endpoints)(variables_of(state), batch)


def without_teaching(batch):
    return {field: values for field, values in batch.items() if '/' not in field}


@pytest.mark.parametrize('kind', ['one', 'two', 'inner', 'half'])
def test_a_batch_holds_what_its_teachers_would_say_of_it(config, capsys, kind):
    changes = {
        'one': {},
        'two': {'teacher': [TEACHER, {'name': 'mlp', 'dense': [5]}]},
        'inner': {'teacher': {'name': 'mlp', 'dense': [10]}, 'terms': [SOFT, {**SOFT, 'teacher': 'features'}]},
        'half': {'cache_dtype': 'float16'},
    }[kind]
    run, state, seen = as_told(config(**changes))
    objective = run.experiment.stages[0].objective
    assert 'of the teacher of 40 examples of ' in capsys.readouterr().out
    batch = seen.experiment.data.streams['train'].batch_at(3)
    plain = run.experiment.data.streams['train'].batch_at(3)
    tolerance = {'rtol': 1e-3, 'atol': 1e-3} if kind == 'half' else {'rtol': 1e-5, 'atol': 1e-5}
    for teacher in objective.fixed:
        said = asked(teacher, state, plain)
        for name in teacher.reads:
            assert np.std(said[name]) > 1e-2
            np.testing.assert_allclose(batch.pop(f'{teacher.role}/{name}'), said[name], **tolerance)
    assert batch.keys() == plain.keys()
    for field, values in plain.items():
        np.testing.assert_array_equal(batch[field], values)


def test_the_loss_takes_the_fields_and_does_not_run_the_teacher(config):
    run, state, seen = as_told(config(teacher=[TEACHER, {'name': 'mlp', 'dense': [5]}]))
    objective = run.experiment.stages[0].objective
    variables = {**variables_of(state), **progress(0, 1)}
    batch = seen.experiment.data.streams['train'].batch_at(1)
    loss = jax.jit(lambda v, b: objective.loss(v, {'train': b}, jax.random.key(0))[0])
    grad = jax.jit(jax.value_and_grad(lambda p, b: loss({**variables, 'params': {**variables['params'], **p}}, b)))
    student = {role: variables['params'][role] for role in ('backbone', 'head')}
    (told, gradient), (online, other) = grad(student, batch), grad(student, without_teaching(batch))
    np.testing.assert_allclose(told, online, rtol=1e-5)
    for path, leaf in trees.flatten(gradient).items():
        np.testing.assert_allclose(leaf, trees.flatten(other)[path], atol=1e-6, err_msg=path)
    lies = {**batch, 'teacher/logits': -batch['teacher/logits']}
    assert abs(loss(variables, lies) - told) > 1e-3
    mute = {role: {} if role.startswith('teacher') else tree for role, tree in variables['params'].items()}
    np.testing.assert_allclose(loss({**variables, 'params': mute}, batch), told, rtol=1e-6)


def test_a_whole_run_is_that_of_a_teacher_in_every_step(config, tmp_path, capsys):
    """The head alone learns: the backbone's features and the teacher's logits are both cached, the images not read."""
    stages = [{**STAGE, 'train': [['head/.*', SGD]]}]
    with_cache = train_and_evaluate(config(stages=stages), tmp_path / 'cached')
    said = capsys.readouterr().out
    assert 'distil: logits of the teacher of 40 examples' in said and 'distil: features of 40 examples' in said
    without = train_and_evaluate(config(stages=stages, cache_teacher=False), tmp_path / 'online')
    assert 'of the teacher' not in capsys.readouterr().out
    start = trees.flatten(without.params)
    for path, leaf in trees.flatten(with_cache.params).items():
        np.testing.assert_allclose(leaf, start[path], atol=1e-5, err_msg=path)


def test_the_same_teacher_is_believed_again_and_another_asked_itself(config, capsys):
    taught = lambda **changes: as_told(config(**changes))[2].experiment.data.streams['train'].batch_at(0)
    first = taught()
    assert 'computed in' in capsys.readouterr().out
    np.testing.assert_array_equal(taught()['teacher/logits'], first['teacher/logits'])
    assert 'reused' in capsys.readouterr().out
    files = set(cached.folder().rglob('*.npy'))
    assert len(files) == 3  # 40 examples, 16 a batch
    other = taught(seed=1, data={**DATA, 'seed': 0})
    assert 'computed in' in capsys.readouterr().out and files < set(cached.folder().rglob('*.npy'))
    np.testing.assert_array_equal(other['image'], first['image'])
    assert np.abs(other['teacher/logits'] - first['teacher/logits']).max() > 1e-2


def test_few_logits_keep_their_values_and_the_mass_of_the_rest():
    rng, count = np.random.default_rng(0), 7
    logits = 3 * rng.standard_normal((5, count)).astype(np.float32)
    softmax = lambda z: np.exp(z.astype(np.float64)) / np.exp(z.astype(np.float64)).sum(-1, keepdims=True)
    for k in (1, 3, count - 1):
        parts = [np.asarray(x) for x in highest('logits', jnp.asarray(logits), k).values()]
        assert [x.shape for x in parts] == [(5, k), (5, k), (5, 1)]
        back, kept = all_logits(*parts, count), np.argsort(-logits, -1)[:, :k]
        np.testing.assert_array_equal(*(np.take_along_axis(x, kept, -1) for x in (back, logits)))
        np.testing.assert_allclose(*(np.take_along_axis(softmax(x), kept, -1) for x in (back, logits)), rtol=1e-5)
        others = np.sort(softmax(back), -1)[:, : count - k]
        np.testing.assert_allclose(others.max(-1), others.min(-1), rtol=1e-5)
    np.testing.assert_allclose(back, logits, rtol=1e-5, atol=1e-5)


def test_a_run_on_few_logits_sees_all_classes(config):
    run, state, seen = as_told(config(cache_top_k=2))
    plain = run.experiment.data.streams['train'].batch_at(0)
    said = np.asarray(asked(run.experiment.stages[0].objective.fixed[0], state, plain)['logits'])
    told = seen.experiment.data.streams['train'].batch_at(0)['teacher/logits']
    best = np.argsort(-said, -1)[:, :2]
    np.testing.assert_allclose(*(np.take_along_axis(x, best, -1) for x in (told, said)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(*(np.log(np.exp(x).sum(-1)) for x in (told, said)), rtol=1e-5)
    assert {array.dtype for array in map(cached.read, cached.folder().rglob('*.npy'))} == {np.dtype(t) for t in 'fi'}


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'data': {**DATA, 'train_transform': ['flip', 'to_float']}}, "the transform flip of 'train' is random"),
        ({'objective': {'mixed': {'mixup': 0.2}}}, 'the objective shows other inputs than the stream’s'),
        ({'stages': [{**STAGE, 'steps': 2}]}, "2 steps do not see the 40 examples of 'train' once"),
        ({'free': 2000}, "of memory, of which 0.00 are free; config.cache_dtype='float16' or config.cache_top_k make"),
    ],
    ids=['random', 'altered', 'short', 'large'],
)
def test_who_cannot_run_once_runs_in_every_step_and_says_why(config, capsys, monkeypatch, changes, reason):
    changes = dict(changes)
    if 'free' in changes:
        free = changes.pop('free')
        monkeypatch.setattr(run_once, 'free_memory', lambda: free)
    if 'stages' in changes:
        del changes['stages'][0]['epochs']
    run, _, seen = as_told(config(**changes))
    said = capsys.readouterr().out
    assert 'distil: teacher runs in every step: ' in said and reason in said
    assert seen is run and not cached.folder().exists()


def test_texts_in_buckets_are_told_their_classes_and_refused_their_tokens(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [f'{"".join(rng.choice(list("abcdefgh "), rng.integers(2, 20)))},{i % 2}' for i in range(24)]
    (tmp_path / 'texts.csv').write_text('\n'.join(['text,label', *rows]))
    source = {
        'spec': f'csv:{tmp_path}/texts.csv',
        'text': 'text',
        'tokenizer': 'bytes',
        'length': 24,
        'buckets': [12, 24],
    }
    bert = {'name': 'bert_tiny', 'width': 8, 'heads': 2, 'depth': 1, 'mlp_width': 8, 'vocabulary': 300, 'length': 24}

    def of(**ends):
        term = {**SOFT, **ends}
        taught = {'name': 'supervised', 'distilled': {'teacher': bert, 'terms': [term]}}
        config = {'model': bert, 'data': {'train': source}, 'objective': taught, 'stages': [STAGE]}
        return as_told({**config, 'batch_size': 8, 'eval_batch_size': 8, 'mesh': {'data': 1}})

    run, state, seen = of()
    for step in range(3):
        batch = seen.experiment.data.streams['train'].batch_at(step)
        said = asked(run.experiment.stages[0].objective.fixed[0], state, batch)
        np.testing.assert_allclose(batch['teacher/logits'], said['logits'], atol=1e-5)
    run, _, seen = of(student='block1', teacher='block1')
    assert seen is run and "'block1' is as long as the texts of a batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'cache_top_k': 10}, "config.cache_top_k: must be less than the 10 classes of 'logits', or 0 for all, not 10"),
        ({'cache_top_k': -1}, 'config.cache_top_k: must be less than the 10 classes'),
        ({'cache_dtype': 'int8'}, 'config.cache_dtype: must be float32 or float16'),
    ],
)
def test_bad_fields_of_the_cache_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        as_told(config(**changes))


def test_a_source_keeps_its_own_fields():
    from tl_jax.data.base import Source

    source = Source('rows', 3, lambda i: {'inputs': np.full(2, i), 'label': i})
    column = np.arange(12.0).reshape(3, 4).astype(np.float16)
    example = with_fields(source, {'teacher/features': column}, {}).get(2)
    np.testing.assert_array_equal(example.pop('teacher/features'), [8, 9, 10, 11])
    assert example.keys() == source.get(2).keys() and example['label'] == 2
