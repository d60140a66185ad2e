"""Our networks against torch's, for the same weights: values, a gradient, a running variance. Needs no torch."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.models import create_model
from tl_jax.trees import flatten

_PATH = Path(__file__).parent.parent / 'parity' / 'make_golden_models.py'
_SPEC = importlib.util.spec_from_file_location('make_golden_models', _PATH)
maker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(maker)


@pytest.mark.parametrize('name', maker.CASES)
def test_equals_torch(name):
    case = maker.CASES[name]
    model = create_model(case.model, num_classes=maker.CLASSES, **case.overrides)
    image = maker.draw_image(case)
    variables = maker.draw_variables(jax.eval_shape(model.init, jax.random.key(0), image))

    @jax.jit
    def everything(params, batch_stats):
        def loss(params):
            endpoints, updates = model.apply(
                {'params': params, 'batch_stats': batch_stats}, image, train=True, mutable=['batch_stats']
            )
            return jnp.sum(endpoints['logits'] ** 2), (endpoints['logits'], updates)

        gradient, (trained, updates) = jax.grad(loss, has_aux=True)(params)
        evaluated = model.apply({'params': params, 'batch_stats': batch_stats}, image)['logits']
        return evaluated, trained, {'params': gradient}, updates

    evaluated, trained, gradient, updates = everything(**variables)
    ours = {
        'eval': evaluated,
        'train': trained,
        'gradient': flatten(gradient)[maker.FIRST_KERNEL],
        'variance': flatten(updates)[f'batch_stats/backbone/{case.last_norm}/var'],
    }
    golden = np.load(maker.GOLDEN)
    for quantity, value in ours.items():
        expected = golden[f'{name}/{quantity}']
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=quantity)
