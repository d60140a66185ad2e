"""Swin transformers: names of timm, of the authors' own files, of torchvision, and of Hugging Face."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tl_jax.models.swin import MODELS, Swin
from tl_jax.pretrained.catalogue import Entry, Preprocessing
from tl_jax.pretrained.maps.hub_config import require, timm_architectures, timm_fields
from tl_jax.pretrained.maps.vit import fused
from tl_jax.pretrained.names import SAME, Family, Fit, Origin, Rule, conv, dense, norm, stem_fit

_PARTS = ('query', 'key', 'value')
_IGNORED = (
    (r'.*\.relative_position_index', 'a table that the window determines'),
    (r'.*\.attn_mask', 'a table that the window and the image determine'),
)


def _block(theirs: str, ours: str, mlp: tuple[str, str]) -> tuple[Rule, ...]:
    return (
        *norm(f'{theirs}.norm{{i}}', f'{ours}/norm{{i}}'),
        *fused(f'{theirs}.attn.qkv.', f'{ours}/attention', _PARTS),
        *dense(f'{theirs}.attn.proj', f'{ours}/attention/out'),
        Rule(f'{theirs}.attn.relative_position_bias_table', f'params/{ours}/relative_position', SAME),
        *dense(f'{theirs}.mlp.{mlp[0]}', f'{ours}/mlp/dense1'),
        *dense(f'{theirs}.mlp.{mlp[1]}', f'{ours}/mlp/dense2'),
    )


def _merge(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (*norm(f'{theirs}.norm', f'{ours}/norm'), *dense(f'{theirs}.reduction', f'{ours}/reduce'))


def _stages(backbone: Swin | None) -> range:
    return range(1, 1 + (len(backbone.depths) if backbone is not None else 4))


def _layers(backbone: Swin | None) -> tuple[Rule, ...]:
    """What timm and the authors have in common."""
    return (
        *conv('patch_embed.proj', 'backbone/stem'),
        *norm('patch_embed.norm', 'backbone/stem_norm'),
        *_block('layers.{stage}.blocks.{block}', 'backbone/stage{stage+1}/block{block+1}', ('fc1', 'fc2')),
        *norm('norm', 'backbone/norm'),
    )


def _timm(backbone: Swin | None) -> tuple[Rule, ...]:
    merge = _merge('layers.{stage}.downsample', 'backbone/stage{stage+1}/merge')
    return (*_layers(backbone), *merge, *dense('head.fc', 'head'))


def _microsoft(backbone: Swin | None) -> tuple[Rule, ...]:
    """The authors merge at the end of a stage, and count it there."""
    merges = (_merge(f'layers.{i - 2}.downsample', f'backbone/stage{i}/merge') for i in _stages(backbone)[1:])
    return (*_layers(backbone), *(rule for rules in merges for rule in rules), *dense('head', 'head'))


def _torchvision(backbone: Swin | None) -> tuple[Rule, ...]:
    """Torchvision counts the stem, each stage and each merge in one list."""
    rules = [*conv('features.0.0', 'backbone/stem'), *norm('features.0.2', 'backbone/stem_norm')]
    for i in _stages(backbone):
        rules += _merge(f'features.{2 * i - 2}', f'backbone/stage{i}/merge') if i > 1 else ()
        rules += _block(f'features.{2 * i - 1}.{{block}}', f'backbone/stage{i}/block{{block+1}}', ('0', '3'))
    return (*rules, *norm('norm', 'backbone/norm'), *dense('head', 'head'))


def _transformers(backbone: Swin | None) -> tuple[Rule, ...]:
    """Hugging Face's names in files, then those of version 5 in memory. It merges as the authors do."""
    block, ours = 'encoder.layers.{stage}.blocks.{block}', 'backbone/stage{stage+1}/block{block+1}'
    table = f'params/{ours}/relative_position'
    rules = [
        *conv('embeddings.patch_embeddings.projection', 'backbone/stem'),
        *norm('embeddings.norm', 'backbone/stem_norm'),
        *norm(f'{block}.layernorm_before', f'{ours}/norm1'),
        *norm(f'{block}.layernorm_after', f'{ours}/norm2'),
        Rule(f'{block}.attention.self.relative_position_bias_table', table, SAME),
        Rule(f'{block}.attention.relative_position_bias.relative_position_bias_table', table, SAME),
        *norm('layernorm', 'backbone/norm'),
        *dense('classifier', 'head'),
    ]
    dense_layers = {
        **{f'attention.self.{part}': f'attention/{part}' for part in _PARTS},
        **{f'attention.{part[0]}_proj': f'attention/{part}' for part in _PARTS},
        'attention.output.dense': 'attention/out',
        'attention.o_proj': 'attention/out',
        'intermediate.dense': 'mlp/dense1',
        'output.dense': 'mlp/dense2',
        'mlp.fc1': 'mlp/dense1',
        'mlp.fc2': 'mlp/dense2',
    }
    for name, place in dense_layers.items():
        rules += dense(f'{block}.{name}', f'{ours}/{place}')
    for i in _stages(backbone)[1:]:
        rules += _merge(f'encoder.layers.{i - 2}.downsample', f'backbone/stage{i}/merge')
    return tuple(rules)


def _fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sizes that a `config.json` of timm or Hugging Face states."""
    if config.get('model_type') != 'swin':
        return timm_fields(config, timm_architectures(MODELS, CATALOGUE))
    require(config, dict(use_absolute_embeddings=False, qkv_bias=True, hidden_act='gelu', layer_norm_eps=1e-5))
    return dict(
        width=config.get('embed_dim', 96),
        depths=tuple(config.get('depths', (2, 2, 6, 2))),
        heads=tuple(config.get('num_heads', (3, 6, 12, 24))),
        window=config.get('window_size', 7),
        patch_size=config.get('patch_size', 4),
        mlp_ratio=config.get('mlp_ratio', 4.0),
        pad='before_shift',
    )


def resize_relative_position(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A table [(2 · window - 1)², heads] for windows of another side, as timm does it.

    The old distances are taken to lie the closer the nearer to zero, in geometric progression (Bao et al. 2021,
    arXiv:2106.08254, its code); between them it is linear in rows and columns.

    Raises:
      ValueError: either is no table of a square window, or the heads differ.
    """
    old, new = math.isqrt(table.shape[0]), math.isqrt(shape[0])
    if table.ndim != 2 or len(shape) != 2 or table.shape[1] != shape[1] or (old**2, new**2) != (len(table), shape[0]):
        raise ValueError(f'{table.shape} is not {shape} with another window')
    matrix = _between(old, new)
    grid = table.astype(np.float32).reshape(old, old, -1)
    return np.einsum('ri,cj,ijh->rch', matrix, matrix, grid).reshape(shape).astype(np.float32)


def _between(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] that gives the values at distances -new // 2 … new // 2 from those at the old ones."""
    steps, reach = old // 2, new // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**steps) / (1 - ratio) > reach else (ratio, high)
    half = np.cumsum(ratio ** np.arange(steps))
    known = np.concatenate([-half[::-1], [0], half])
    wanted = np.arange(-reach, reach + 1)
    return np.stack([np.interp(wanted, known, row) for row in np.eye(old)], 1)


FAMILIES = (
    Family(
        Swin,
        (
            Origin('torchvision', r'features\.1\.0\.attn\.relative_position_bias_table', _torchvision, _IGNORED),
            Origin('microsoft', r'layers\.0\.downsample\.reduction\.weight', _microsoft, _IGNORED),
            Origin('timm', r'layers\.0\.blocks\.0\.attn\.relative_position_bias_table', _timm, _IGNORED),
            Origin(
                'transformers',
                r'encoder\.layers\.0\.blocks\.0\.layernorm_before\.weight',
                _transformers,
                _IGNORED,
                prefix='swin.',
                files_only=r'.*\.(attention\.(self|output)|intermediate\.dense|output\.dense)\..*',
            ),
        ),
        fits=lambda _: (
            stem_fit('backbone/stem'),
            Fit(
                'params/backbone/stage{stage}/block{block}/relative_position',
                resize_relative_position,
                'resized to another window',
            ),
        ),
        fields=_fields,
    ),
)

_TIMM = (
    *(f'swin_{size}_patch4_window7_224.ms_in22k_ft_in1k' for size in ('tiny', 'small', 'base', 'large')),
    *(f'swin_{size}_patch4_window7_224.ms_in1k' for size in ('tiny', 'small', 'base')),
    *(f'swin_{size}_patch4_window7_224.ms_in22k' for size in ('tiny', 'small', 'base', 'large')),
    *(f'swin_{size}_patch4_window12_384.ms_in22k{tuned}' for size in ('base', 'large') for tuned in ('_ft_in1k', '')),
    'swin_base_patch4_window12_384.ms_in1k',
    *(f'swin_s3_{size}_224.ms_in1k' for size in ('tiny', 'small', 'base')),
)


def _entry(name: str) -> Entry:
    """By timm's `default_cfgs`: 224 pixels are cropped from 90 %, 384 from all."""
    size, crop = (384, 1.0) if '384' in name else (224, 0.9)
    preprocessing = Preprocessing(size, crop=crop, interpolation='bicubic')
    return Entry(name.split('.')[0], f'hf://timm/{name}', 'mit', preprocessing)


CATALOGUE: dict[str, Entry] = {f'timm/{name}': _entry(name) for name in _TIMM}
