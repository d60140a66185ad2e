"""Swin transformers of timm, torchvision and Hugging Face: windows that fill the map, leave a rest, or exceed it."""

from collections.abc import Sequence

import numpy as np
from parity_harness import CLASSES, Case, images, timm_network, torchvision_network

_SMALL = dict(width=12, depths=(2, 3, 1), heads=(1, 2, 3))


def timm_swin(size: tuple[int, int], window: int | Sequence[int], **changes):
    import torch_side  # noqa: F401
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        **dict(
            img_size=size,
            embed_dim=_SMALL['width'],
            depths=_SMALL['depths'],
            num_heads=_SMALL['heads'],
            window_size=window,
            num_classes=CLASSES,
        )
        | changes
    )


def timm_outputs(model, image):
    import torch_side

    stages = {f'stage{i + 1}': f'layers.{i}' for i in range(len(model.layers))}
    return nchw(torch_side.with_logits(model, image, {'stem': 'patch_embed', **stages, 'features': 'head.global_pool'}))


def torchvision_swin(window: int):
    import torch_side  # noqa: F401
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        [4, 4], _SMALL['width'], list(_SMALL['depths']), list(_SMALL['heads']), [window] * 2, num_classes=CLASSES
    )


def torchvision_outputs(model, image):
    import torch_side

    stages = {f'stage{i + 1}': f'features.{2 * i + 1}' for i in range(3)}
    return nchw(torch_side.with_logits(model, image, {'stem': 'features.0', **stages, 'features': 'flatten'}))


def hugging_face_swin(size: int, window: int):
    import torch_side  # noqa: F401
    import transformers
    from cases_vit import HuggingFace

    config = transformers.SwinConfig(
        image_size=size,
        embed_dim=_SMALL['width'],
        depths=list(_SMALL['depths']),
        num_heads=list(_SMALL['heads']),
        window_size=window,
        drop_path_rate=0.0,
        num_labels=CLASSES,
    )
    return HuggingFace(transformers.SwinForImageClassification(config))


def hugging_face_outputs(model, image):
    import torch_side

    modules = {
        f'stage{i}': f'swin.encoder.layers.{i - 1}.blocks.{d - 1}' for i, d in enumerate(_SMALL['depths'], start=1)
    }
    endpoints, result = torch_side.recorded(model, modules | {'features': 'swin.pooler'}, image)
    side = round(endpoints['stage1'].shape[1] ** 0.5)
    maps = {}
    for i in (1, 2, 3):
        maps[f'stage{i}'] = endpoints[f'stage{i}'].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        side = (side + 1) // 2
    return maps | {'features': endpoints['features'].flatten(1), 'logits': result.logits}


def nchw(endpoints):
    """Both keep maps as we do, and the harness expects torch's layout."""
    return {name: x.permute(0, 3, 1, 2) if x.ndim == 4 else x for name, x in endpoints.items()}


def _timm_case(name, size, window, ours=None, **options):
    return Case(
        name,
        'swin_tiny_patch4_window7_224',
        _SMALL | dict(window=ours or window),
        'timm',
        lambda: timm_swin(size, window),
        timm_outputs,
        images(2, *size),
        **options,
    )


def _torchvision_case(name, size, window, **options):
    return Case(
        name,
        'swin_t',
        _SMALL | dict(window=window),
        'torchvision',
        lambda: torchvision_swin(window),
        torchvision_outputs,
        images(2, *size),
        absent=(r'.*relative_position_index',),
        **options,
    )


CASES = (
    _timm_case('swin_timm', (64, 96), 4, golden=True),
    _timm_case('swin_timm_padded', (52, 76), 3),
    # timm has windows no larger than the map.
    _timm_case('swin_timm_stages', (40, 40), (6, 5, 7), (6, 5, 3)),
    _torchvision_case('swin_torchvision', (64, 48), 4),
    Case(
        'swin_transformers',
        'swin_t',
        _SMALL | dict(window=3),
        'transformers',
        lambda: hugging_face_swin(52, 3),
        hugging_face_outputs,
        images(2, 52),
        absent=(r'.*relative_position_index',),
    ),
    # The last stage's map is 4 × 5, of windows with 5.
    _torchvision_case('swin_torchvision_padded', (61, 79), 5, golden=True),
)


_TIMM = (
    *(f'swin_{size}_patch4_window7_224' for size in ('tiny', 'small', 'base', 'large')),
    *(f'swin_{size}_patch4_window12_384' for size in ('base', 'large')),
    *(f'swin_s3_{size}_224' for size in ('tiny', 'small', 'base')),
)
SIZES = (
    *(
        (
            name,
            1000,
            {},
            'torchvision',
            lambda name=name: torchvision_network(name),
            np.zeros((1, 224, 224, 3), np.float32),
            (r'.*relative_position_index',),
        )
        for name in ('swin_t', 'swin_s', 'swin_b')
    ),
    *((name, 1000, {}, 'timm', lambda name=name: timm_network(name)) for name in _TIMM),
)
