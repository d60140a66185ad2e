"""ConvNeXts of torchvision, timm and transformers."""

from parity_harness import CLASSES, Case, images, timm_network, torchvision_network

from tl_jax.models.convnext import MODELS

# Few blocks, since a depthwise 7×7 takes long to compile; timm's have four stages.
_DEPTHS, _WIDTHS = (2, 1), (8, 12)
_FIELDS = dict(stage_sizes=_DEPTHS, widths=_WIDTHS)
_TIMM_DEPTHS, _TIMM_WIDTHS = (1, 2, 1, 1), (8, 12, 16, 24)
_TIMM_FIELDS = dict(stage_sizes=_TIMM_DEPTHS, widths=_TIMM_WIDTHS)


def torchvision_reference():
    import torch_side  # noqa: F401
    from torchvision.models import convnext

    settings = zip(_WIDTHS, (*_WIDTHS[1:], None), _DEPTHS, strict=True)
    return convnext.ConvNeXt([convnext.CNBlockConfig(*setting) for setting in settings], num_classes=CLASSES)


def torchvision_outputs(model, image):
    import torch_side

    stages = {f'stage{i + 1}': f'features.{2 * i + 1}' for i in range(len(_DEPTHS))}
    return torch_side.with_logits(model, image, {'stem': 'features.0', **stages, 'features': 'classifier.1'})


def timm_reference(**fields):
    import torch_side  # noqa: F401
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=_TIMM_DEPTHS, dims=_TIMM_WIDTHS, num_classes=CLASSES, **fields)


def timm_outputs(model, image):
    import torch_side

    stages = {f'stage{i + 1}': f'stages.{i}' for i in range(len(_TIMM_DEPTHS))}
    return torch_side.with_logits(model, image, {'stem': 'stem', **stages, 'features': 'head.drop'})


def transformers_reference(version):
    import transformers

    config = getattr(transformers, f'ConvNext{version}Config')(
        num_stages=len(_DEPTHS), depths=list(_DEPTHS), hidden_sizes=list(_WIDTHS), num_labels=CLASSES, image_size=64
    )
    return getattr(transformers, f'ConvNext{version}ForImageClassification')(config)


def transformers_outputs(model, image):
    import torch_side

    base = model.base_model_prefix
    modules = {f'stage{i + 1}': f'{base}.encoder.stages.{i}' for i in range(len(_DEPTHS))}
    modules = {'stem': f'{base}.embeddings', **modules, 'features': f'{base}.layernorm'}
    endpoints, result = torch_side.recorded(model, modules, image)
    return {**endpoints, 'logits': result.logits}


CASES = (
    Case(
        'convnext_torchvision',
        'convnext_tiny',
        _FIELDS,
        'torchvision',
        torchvision_reference,
        torchvision_outputs,
        images(2, 30, 33),
        golden=True,
    ),
    Case(
        'convnext_timm_tiered',
        'convnext_atto_ols',
        _TIMM_FIELDS | dict(norm_first=True, kernel_size=5, activation='gelu_tanh', epsilon=1e-5, last_epsilon=1e-5),
        'timm',
        lambda: timm_reference(
            stem_type='overlap_tiered',
            conv_mlp=True,
            head_norm_first=True,
            kernel_sizes=5,
            act_layer='gelu_tanh',
            norm_eps=1e-5,
        ),
        timm_outputs,
        images(2, 65, 67),
    ),
    Case(
        'convnextv2_timm',
        'convnextv2_tiny',
        _TIMM_FIELDS | dict(hidden=9, kernel_size=3),
        'timm',
        lambda: timm_reference(use_grn=True, ls_init_value=None, head_hidden_size=9, kernel_sizes=3),
        timm_outputs,
        images(2, 64, 75),
        golden=True,
    ),
    Case(
        'convnext_transformers',
        'convnext_tiny',
        _FIELDS | dict(last_epsilon=1e-12),
        'transformers',
        lambda: transformers_reference(''),
        transformers_outputs,
        images(2, 33, 30),
    ),
    Case(
        'convnextv2_transformers',
        'convnextv2_tiny',
        _FIELDS | dict(last_epsilon=1e-12),
        'transformers',
        lambda: transformers_reference('V2'),
        transformers_outputs,
        images(2, 33, 30),
    ),
)


def transformers_model(version, stage_sizes, widths):
    import transformers

    config = getattr(transformers, f'ConvNext{version}Config')(depths=stage_sizes, hidden_sizes=widths, num_labels=1000)
    return getattr(transformers, f'ConvNext{version}ForImageClassification')(config)


_TIMM = (
    *('convnext_atto', 'convnext_pico_ols', 'convnext_nano', 'convnext_nano_ols', 'convnext_tiny', 'convnext_tiny_hnf'),
    *('convnext_small', 'convnext_large_mlp', 'convnext_xxlarge', 'convnextv2_femto', 'convnextv2_base'),
    'convnextv2_huge',
)
SIZES = (
    *(
        (f'convnext_{size}', 1000, {}, 'torchvision', lambda size=size: torchvision_network(f'convnext_{size}'))
        for size in ('tiny', 'small', 'base', 'large')
    ),
    *((name, 1000, {}, 'timm', lambda name=name: timm_network(name)) for name in _TIMM),
    *(
        (
            name,
            1000,
            {},
            'transformers',
            lambda name=name: transformers_model(
                'V2' if 'v2' in name else '',
                MODELS[name].keywords['stage_sizes'],
                MODELS[name].keywords['widths'],
            ),
        )
        for name in ('convnext_tiny', 'convnext_xlarge', 'convnextv2_atto', 'convnextv2_huge')
    ),
)
