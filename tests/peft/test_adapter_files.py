"""A run with adapters leaves a file of what differs from its base, which everything reads as the whole network."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from tl_jax import finished, pretrained
from tl_jax.errors import UserError
from tl_jax.jobs import run_eval, run_export
from tl_jax.models import create_model
from tl_jax.networks import model_from
from tl_jax.pretrained import based
from tl_jax.train import train_and_evaluate
from tl_jax.trees import flatten

ADAM = {'name': 'adam', 'lr': 1e-2}
VIT = dict(name='vit_tiny_patch16', width=16, depth=1, heads=2, patch_size=4, image_size=8)
LORA = dict(name='lora', rank=2)
RULES = [['(adapters|head)/.*', ADAM], ['backbone/norm/.*', ADAM], ['.*', None]]


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A file of a backbone alone, random in every leaf."""
    path = tmp_path_factory.mktemp('base') / 'model.safetensors'
    fields = {name: value for name, value in VIT.items() if name != 'name'}
    module = create_model(VIT['name'], **fields)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape).astype(np.float32), shapes)
    pretrained.save_variables(path, values, {})
    return path


@pytest.fixture(scope='module')
def run(tmp_path_factory, base):
    """A finished run with LoRA, and the state it ended with."""
    workdir = tmp_path_factory.mktemp('run') / 'lora'
    adapted = digits(dict(VIT, source=str(base), peft=LORA), RULES)
    return workdir, train_and_evaluate(adapted, workdir)


def digits(model, rules, steps=3):
    to_float = [{'name': 'to_float'}]
    splits = {'train': 'sklearn:digits/train', 'eval': 'sklearn:digits/val[:31]'}
    return {
        'model': model,
        'data': {**splits, 'train_transform': to_float, 'eval_transform': to_float},
        'stages': [{'steps': steps, 'train': rules}],
        'batch_size': 16,
        'mesh': {'data': 1},
    }


def card(workdir):
    with safetensors.safe_open(workdir / 'model.safetensors', 'numpy') as file:
        return json.loads(file.metadata()['tl_jax'])


def stored(workdir):
    return safetensors.numpy.load_file(workdir / 'model.safetensors')


def assert_equal(tree, expected):
    tree, expected = flatten(tree), flatten(expected)
    assert tree.keys() == expected.keys()
    for path, leaf in tree.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_holds_what_learned_and_names_the_base(run, base):
    workdir, _ = run
    names = {
        f'params/adapters/default/backbone/block1/attention/{part}/lora_{factor}'
        for part in ('query', 'value')
        for factor in 'ab'
    }
    names |= {f'params/{leaf}' for leaf in ('head/kernel', 'head/bias', 'backbone/norm/scale', 'backbone/norm/bias')}
    assert stored(workdir).keys() == names
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    assert card(workdir)['base'] == {'source': str(base), 'sha256': digest, 'ignore': []}
    assert card(workdir)['model']['peft'] == {'default': LORA}
    assert (workdir / 'model.safetensors').stat().st_size < base.stat().st_size / 3


def test_is_read_as_the_whole_network(run, capsys):
    workdir, state = run
    model = finished.trained(workdir)
    assert_equal(model.variables, {'params': state.params})
    run_eval({'workdir': str(workdir)}, [])
    accuracy = json.loads((workdir / 'summary.json').read_text())['metrics']['val/accuracy']
    assert f'accuracy {accuracy:.4f}' in capsys.readouterr().out


def test_another_run_goes_on_from_it_over_the_same_base(run, tmp_path):
    workdir, _ = run
    before = stored(workdir)
    still = digits(
        dict(VIT, source=str(workdir / 'model.safetensors'), peft=LORA), [['head/bias', ADAM], ['.*', None]], 1
    )
    train_and_evaluate(still, tmp_path / 'next')
    assert card(tmp_path / 'next')['base'] == card(workdir)['base']
    after = stored(tmp_path / 'next')
    assert after.keys() == before.keys()
    assert [name for name in after if not np.array_equal(after[name], before[name])] == ['params/head/bias']


def test_more_adapters_beside_those_on_file(run, tmp_path):
    workdir, _ = run
    both = dict(default=LORA, second=dict(LORA, rank=3))
    source = dict(VIT, source=str(workdir / 'model.safetensors'), peft=both)
    more = digits(dict(source, fresh=['adapters/second/.*']), [['adapters/second/.*', ADAM], ['.*', None]], 1)
    train_and_evaluate(more, tmp_path / 'next')
    before, after = stored(workdir), stored(tmp_path / 'next')
    assert all(np.array_equal(after[name], leaf) for name, leaf in before.items())
    assert len(after) == len(before) + 4


def test_adapter_of_another_base(base, tmp_path):
    own, run = tmp_path / 'base.safetensors', tmp_path / 'run'
    shutil.copy(base, own)
    train_and_evaluate(digits(dict(VIT, source=str(own), peft=LORA), RULES, 1), run)
    digest = hashlib.sha256(own.read_bytes()).hexdigest()
    tensors = safetensors.numpy.load_file(own)
    tensors['params/backbone/norm/scale'] += 1
    safetensors.numpy.save_file(tensors, own)
    other = hashlib.sha256(own.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f'an adapter of another base.*{digest}.*{other}'):
        finished.trained(run)
    own.unlink()
    with pytest.raises(UserError, match=r'holds what differs from .*base.safetensors; .*there is no such file'):
        finished.trained(run)


def test_a_network_without_adapters_refuses_the_file(run, tmp_path):
    workdir, _ = run
    with pytest.raises(UserError, match='has adapters; add model.peft=.*lora.*--merge'):
        train_and_evaluate(digits(dict(VIT, source=str(workdir / 'model.safetensors')), RULES), tmp_path / 'next')


def test_a_random_base_is_saved_whole(tmp_path):
    state = train_and_evaluate(digits(dict(VIT, peft=LORA), RULES, 1), tmp_path / 'run')
    assert 'base' not in card(tmp_path / 'run')
    assert_equal(finished.trained(tmp_path / 'run').variables, {'params': state.params})


def test_statistics_that_moved(tmp_path):
    convnet = dict(name='convnet', widths=[4, 8], norm='batch')
    train_and_evaluate(digits(convnet, [['.*', ADAM]], 1), tmp_path / 'base')
    lora = dict(LORA, targets='backbone/conv2')
    section = dict(convnet, source=str(tmp_path / 'base' / 'model.safetensors'), peft=lora)
    rules = [['(adapters|head)/.*', ADAM], ['backbone/norm2/.*', ADAM], ['.*', None]]
    state = train_and_evaluate(digits(section, rules, 1), tmp_path / 'run')
    names = stored(tmp_path / 'run').keys()
    assert {name for name in names if name.startswith('batch_stats')} == {
        'batch_stats/backbone/norm2/mean',
        'batch_stats/backbone/norm2/var',
    }
    variables = finished.trained(tmp_path / 'run').variables
    assert_equal(variables['batch_stats'], state.collections['batch_stats'])


def test_export_merged(run, tmp_path):
    workdir, _ = run
    with pytest.raises(UserError, match='has adapters; merge them'):
        run_export({'workdir': str(workdir), 'origin': 'timm', 'output': str(tmp_path / 'net.safetensors')}, [])
    plain = {'workdir': str(workdir), 'origin': 'tl_jax', 'output': str(tmp_path / 'net.safetensors'), 'merge': 'true'}
    run_export(plain, [])
    fields = {name: value for name, value in VIT.items() if name != 'name'}
    whole = pretrained.load_pretrained(VIT['name'], tmp_path / 'net.safetensors', image_shape=(8, 8, 1), **fields)
    module = create_model(VIT['name'], num_classes=10, **fields)
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)
    model = finished.trained(workdir)
    wanted = model.predict(model.variables, {'image': images})['logits']
    unadapted = jax.tree.map(np.zeros_like, model.variables['params']['adapters'])
    params = {**model.variables['params'], 'adapters': unadapted}
    assert np.abs(model.predict({'params': params}, {'image': images})['logits'] - wanted).max() > 1e-3
    np.testing.assert_allclose(module.apply(whole, images)['logits'], wanted, rtol=1e-5, atol=1e-5)


def test_a_base_in_few_bits_is_left_to_its_source(base, tmp_path):
    section = dict(VIT, source=str(base), peft=LORA, quantize=dict(name='int8'))
    state = train_and_evaluate(digits(section, RULES, 1), tmp_path / 'run')
    assert len(stored(tmp_path / 'run')) == 8
    model = finished.trained(tmp_path / 'run')
    assert_equal(model.variables, {'params': state.params})
    with pytest.raises(
        UserError, match='its base was held in int8, and merging makes it whole again.*--merge=restored'
    ):
        finished.network(tmp_path / 'run', merge='true')
    module, merged = finished.network(tmp_path / 'run', merge='restored')
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)
    wanted = model.predict(model.variables, {'image': images})['logits']
    np.testing.assert_allclose(module.apply(merged, images)['logits'], wanted, rtol=1e-5, atol=1e-5)


def test_export_as_a_folder_of_peft_and_train_from_it(run, base, tmp_path):
    workdir, state = run
    run_export({'workdir': str(workdir), 'origin': 'peft', 'output': str(tmp_path / 'adapter')}, [])
    described = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
    assert (described['r'], described['lora_alpha'], described['peft_type']) == (2, 16, 'LORA')
    assert described['modules_to_save'] == ['classifier', 'vit.layernorm']
    a = safetensors.numpy.load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')[
        'base_model.model.vit.layers.0.attention.v_proj.lora_A.weight'
    ]
    ours = state.params['adapters']['default']['backbone']['block1']['attention']['value']['lora_a']
    np.testing.assert_array_equal(a, np.asarray(ours).T)

    section = dict(VIT, source=str(base), peft=str(tmp_path / 'adapter'))
    again = digits(section, [['head/bias', ADAM], ['.*', None]], 1)
    train_and_evaluate(again, tmp_path / 'run')
    before, after = stored(workdir), stored(tmp_path / 'run')
    assert [name for name in after if not np.array_equal(after[name], before[name])] == ['params/head/bias']
    assert after.keys() == before.keys()
    # The file stands for itself: the folder may go.
    shutil.rmtree(tmp_path / 'adapter')
    finished.trained(tmp_path / 'run')


def test_a_folder_of_peft_over_another_base(run, base, tmp_path):
    run_export({'workdir': str(run[0]), 'origin': 'peft', 'output': str(tmp_path / 'adapter')}, [])
    file = tmp_path / 'adapter' / 'adapter_model.safetensors'
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    with safetensors.safe_open(file, 'numpy') as opened:
        assert opened.metadata() == {'format': 'pt', 'base_sha256': digest}
    tensors = safetensors.numpy.load_file(base)
    tensors['params/backbone/norm/scale'] += 1
    safetensors.numpy.save_file(tensors, tmp_path / 'other.safetensors')
    other = hashlib.sha256((tmp_path / 'other.safetensors').read_bytes()).hexdigest()

    def begin(source):
        section = dict(VIT, source=str(source), fresh=['head/.*'], peft=str(tmp_path / 'adapter'))
        model = model_from(**section, classes=10, dtype=np.float32, load=True)
        return model.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))

    begin(run[0] / 'model.safetensors')  # over the same base
    with pytest.raises(UserError, match=f'{file}: an adapter of another base.*{digest[:12]}.*{other[:12]}') as raised:
        begin(tmp_path / 'other.safetensors')
    assert '\n' not in str(raised.value)
    # Those of other hands do not say.
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file, {'format': 'pt'})
    begin(tmp_path / 'other.safetensors')


def test_a_run_without_adapters_or_base_has_no_folder(tmp_path):
    train_and_evaluate(digits(dict(VIT, peft=LORA), RULES, 1), tmp_path / 'run')
    with pytest.raises(UserError, match='began at random; use --merge'):
        run_export({'workdir': str(tmp_path / 'run'), 'origin': 'peft', 'output': str(tmp_path / 'adapter')}, [])


@pytest.mark.parametrize(
    'changes',
    [dict(input_dtype='O'), dict(input_dtype='nothing'), dict(input_shape=[-1, 8, 3]), dict(input_shape=[2**70, 8, 3])],
    ids=str,
)
def test_card_of_no_network(changes):
    whole = dict(model=VIT, class_names=['a', 'b'], input_shape=[8, 8, 1])
    with pytest.raises(UserError, match='run: does not say which network it is of'):
        based._network({**whole, **changes}, Path('run'))


@pytest.mark.parametrize(('active', 'acting'), [(None, ['one', 'two']), ([], []), (['two'], ['two'])])
def test_adapters_that_act_are_those_of_the_run(active, acting):
    assert finished._active({'peft': {'one': LORA, 'two': LORA}, 'active': active}) == acting
