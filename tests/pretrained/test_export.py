"""Out again under an origin's names; `tests/parity` checks with the origin's own libraries that they load it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tl_jax.errors import UserError
from tl_jax.models import create_model
from tl_jax.pretrained import export_pretrained, load_pretrained, names
from tl_jax.pretrained.export import foreign_tensors

FIELDS = dict(stage_sizes=(1, 1), widths=(4, 8), stem_width=4)
MODULE = create_model('resnet18', num_classes=3, **FIELDS)


@pytest.fixture(scope='module')
def variables():
    return jax.jit(MODULE.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_comes_back_as_it_left(variables, tmp_path):
    path = tmp_path / 'net.safetensors'
    written = export_pretrained(path, variables, MODULE, 'torchvision', metadata={'from': 'a run'})
    stored = safetensors.numpy.load_file(path)
    assert stored.keys() == set(written) and 'layer2.0.downsample.1.running_var' in stored
    kernel = variables['params']['backbone']['stem']['conv']['kernel']
    np.testing.assert_array_equal(stored['conv1.weight'], np.transpose(kernel, (3, 2, 0, 1)))
    assert stored['fc.weight'].shape == (3, 8)
    loaded = load_pretrained('resnet18', path, **FIELDS)
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(variables))


def test_other_dtypes(variables, tmp_path):
    path = tmp_path / 'net.safetensors'
    export_pretrained(path, variables, MODULE, 'torchvision', dtype=np.float16)
    stored = safetensors.numpy.load_file(path)
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(np.float16)}


def test_the_backbone_alone(variables, tmp_path):
    backbone = {collection: {'backbone': tree['backbone']} for collection, tree in variables.items()}
    written = export_pretrained(tmp_path / 'net.safetensors', backbone, MODULE, 'torchvision')
    assert not any(name.startswith('fc') for name in written)


def test_refuses_what_the_origin_has_no_place_for(variables, tmp_path):
    more = {**variables, 'params': {**variables['params'], 'discriminator': {'kernel': np.zeros((2, 2))}}}
    path = tmp_path / 'net.safetensors'
    with pytest.raises(UserError, match="'torchvision' has no place for 1 leaves: 'params/discriminator/kernel'"):
        export_pretrained(path, more, MODULE, 'torchvision')
    with pytest.raises(UserError, match="there is no 'tim' of a ResNet"):
        export_pretrained(path, variables, MODULE, 'tim')
    with pytest.raises(UserError, match='dtype: must be a floating type, not int8'):
        export_pretrained(path, variables, MODULE, 'torchvision', dtype='int8')
    with pytest.raises(UserError, match='there is no folder'):
        export_pretrained(tmp_path / 'no' / 'net.safetensors', variables, MODULE, 'torchvision')
    cosine = create_model('resnet18', num_classes=3, head=dict(name='cosine', learn_scale=False), **FIELDS)
    with pytest.raises(UserError, match="'torchvision' has linear heads, and this is Cosine"):
        export_pretrained(path, variables, cosine, 'torchvision')
    with pytest.raises(UserError, match='the suffix'):
        export_pretrained(path.with_suffix('.bin'), variables, MODULE, 'torchvision')
    assert not list(tmp_path.iterdir())


def test_refuses_names_that_can_only_be_read():
    rule = names.Rule('{number}_conv_{rest*}', 'params/backbone/conv{number}', names.SAME)
    with pytest.raises(UserError, match="'tflite' names cannot be written"):
        foreign_tensors({'params/backbone/conv1': np.zeros(1)}, names.NameMap('tflite', (rule,)))
