"""Fields that no network can be built of are refused by name, in one line."""

import pytest

from tl_jax.errors import UserError
from tl_jax.models import create_model


@pytest.mark.parametrize(
    'name, fields, field',
    [
        ('vit_tiny_patch16', dict(heads=0), 'heads'),
        ('vit_tiny_patch16', dict(patch_size=0), 'patch_size'),
        ('vit_tiny_patch16', dict(depth=-1), 'depth'),
        ('vit_tiny_patch16', dict(num_registers=-1), 'num_registers'),
        ('vit_tiny_patch16', dict(dropout=1.5), 'dropout'),
        ('vit_tiny_patch16', dict(image_size=(8, 8, 3)), 'image_size'),
        ('bit_50x1', dict(groups=0), 'groups'),
        ('squeezenet1_1', dict(squeeze=0), 'squeeze'),
        ('resnet18', dict(stage_sizes=[], widths=[]), 'stage_sizes'),
        ('resnet50', dict(base_width=0), 'base_width'),
        ('resnext50_32x4d', dict(widths=(8, 8, 8, 8)), 'base_width'),
        ('resnet50', dict(stem='tiered', stem_width=4), 'stem_width'),
        ('convnext_tiny', dict(kernel_size=4), 'kernel_size'),
        ('convnext_tiny', dict(drop_path=float('nan')), 'drop_path'),
        ('swin_t', dict(depths=[], heads=[]), 'depths'),
        ('swin_t', dict(heads=(0, 1, 1, 1)), 'heads'),
        ('densenet121', dict(stage_sizes=[0]), 'stage_sizes'),
        ('efficientnet_b0', dict(depth=0.0), 'depth'),
        ('deberta_v3_small', dict(pooler_activation='swish'), 'pooler_activation'),
        ('gpt2', dict(heads=0), 'heads'),
        ('llama', dict(kv_heads=0), 'kv_heads'),
        ('t5_small', dict(dropout=-0.1), 'dropout'),
    ],
)
def test_refused(name, fields, field):
    with pytest.raises(UserError, match=rf'^model\.{field}: [^\n]+$'):
        create_model(name, **fields)
