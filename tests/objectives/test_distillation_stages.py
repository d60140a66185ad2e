"""Terms that learn, look over the data or remember, in whole runs on embedded data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import config as config_lib
from tl_jax import experiment as experiment_lib
from tl_jax.networks import model_from
from tl_jax.objectives.distillation.base import Pair
from tl_jax.objectives.distillation.factors import factor_transfer
from tl_jax.objectives.distillation.overhaul import ofd
from tl_jax.train import train_and_evaluate

TINY = dict(name='resnet20', stage_sizes=[1], stem_width=4, preactivations=True)
STUDENT, TEACHER = dict(TINY, widths=[4]), dict(TINY, widths=[6])
ADAM = {'name': 'adam', 'lr': 1e-3}


def distilled(terms, **fields):
    return {'name': 'supervised', 'distilled': {'teacher': TEACHER, 'terms': terms, **fields}}


def test_one_run_of_maps_margins_and_banks(digits_config, tmp_path):
    terms = [
        {'name': 'hints', 'layers': ['stage1']},
        {'name': 'attention', 'layers': ['stage1']},
        {'name': 'ofd', 'layers': ['stage1_preactivation']},
        {'name': 'crd', 'num_negatives': 20, 'width': 8},
    ]
    config = digits_config(model=STUDENT, objective=distilled(terms), stages=[{'steps': 3, 'train': [['.*', ADAM]]}])
    state = train_and_evaluate(config, tmp_path)
    assert set(state.params['projectors']['teacher']) == {'hints', 'ofd', 'crd'}

    source = experiment_lib.build(config_lib.resolve(config)).data.sources['train']
    image = np.stack([source.get(i)['image'] for i in range(source.length)]).astype(np.float32) / 255
    teacher = {
        name: tree['teacher']
        for name, tree in (('params', state.params), *state.collections.items())
        if 'teacher' in tree
    }
    kept = state.collections['distillation']['teacher']
    network = model_from(**TEACHER, classes=10, dtype=jnp.float32, load=False)
    endpoints = jax.jit(lambda x: network.apply(teacher, x, train=False))(image)
    channels = np.asarray(endpoints['stage1_preactivation'], np.float64).reshape(-1, 6).T
    margins = kept['ofd']['stage1_preactivation']
    np.testing.assert_allclose(margins, [c[c < 0].mean() for c in channels], rtol=1e-4)

    assert np.sum(np.asarray(kept['crd']['kind']) >= 0) == 3 * config['batch_size']
    assert len(kept['crd']['kind']) == source.length
    assert kept['crd']['student_sum'] > 0


def test_both_stages_of_factor_transfer_have_one_set_of_roles():
    shape = lambda channels: {'x': jax.ShapeDtypeStruct((2, 3, 3, channels), jnp.float32)}
    pair, key = Pair(shape(2), shape(4), {}), jax.random.key(0)
    first, second = (factor_transfer(layer='x', stage=stage).init(key, pair) for stage in ('paraphrase', 'transfer'))
    assert set(first) == {'encoder', 'decoder', 'translator'}
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_ofd_ignores_what_both_networks_leave_closed():
    """Where the teacher's number is negative a student below its margin costs nothing; above it costs (s - margin)²."""
    term = ofd(layers=['x'])
    maps = lambda *values: {'x': jnp.asarray(values, jnp.float32).reshape(len(values), 1, 1, 1)}
    # Batch normalisation of ±3 gives ±1, and these scale and bias make it -2 and 4 again.
    params = {
        'layer1': {'linear': {'kernel': jnp.ones((1, 1))}, 'norm': {'scale': jnp.full(1, 3.0), 'bias': jnp.ones(1)}}
    }
    for t, wanted in ((-5.0, [0.0, 25.0]), (2.0, [16.0, 4.0])):
        pair = Pair(maps(-3.0, 3.0), maps(t, t), {})
        values, _ = term.loss(params, {'x': jnp.full(1, -1.0)}, pair, None)
        np.testing.assert_allclose(values, wanted, rtol=1e-4)


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        ({'name': 'hints', 'layers': ['stage9']}, "the student gives no 'stage9'; it gives features, logits, stage1"),
        ({'name': 'hints', 'layers': [['stage1', 'stage9']]}, "the teacher gives no 'stage9'; it gives features"),
        ({'name': 'ofd', 'layers': ['features']}, "ofd compares maps [B, H, W, C], and the student's 'features'"),
        ({'name': 'reviewkd', 'layers': []}, 'layers is a list of endpoints'),
        ({'name': 'srrl', 'student': 'stage1', 'teacher': 'stage1'}, 'srrl puts a map or a vector'),
        (
            {'name': 'srrl', 'student': 'stage1'},
            'srrl asks the teacher’s head what it makes of features, and the teacher has none',
        ),
        ({'name': 'factor_transfer', 'layer': 'features', 'stage': 'transfer'}, 'factor_transfer compares maps'),
        ({'name': 'factor_transfer', 'layer': 'stage1', 'stage': 'transfer', 'rate': 0.0}, 'rate must lie in 0 … 1'),
        ({'name': 'factor_transfer', 'layer': 'stage1', 'stage': 'first'}, "must be 'paraphrase' or 'transfer'"),
    ],
)
def test_bad_sections_get_one_line(digits_config, section, message):
    teacher = dict(TEACHER, num_classes=0) if 'has none' in message else TEACHER
    config = digits_config(model=STUDENT, objective=distilled([section], teacher=teacher))
    with pytest.raises(experiment_lib.UserError) as caught:
        built = experiment_lib.build(config_lib.resolve(config))
        jax.eval_shape(built.stages[0].init, jax.random.key(0), built.batch)
    assert message in str(caught.value) and '\n' not in str(caught.value)
    assert str(caught.value).startswith('config.objective.distilled.terms')
