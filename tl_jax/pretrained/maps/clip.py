"""CLIP and SigLIP: names of OpenAI (and open_clip) and of Hugging Face; one file fills both towers or either.

A tower that is loaded alone leaves the other's tensors aside, by a rule that the account shows.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from tl_jax.errors import UserError
from tl_jax.models.clip import Clip, ImageTower, TextTower
from tl_jax.models.vit import resize_positions
from tl_jax.pretrained.catalogue import Entry, Preprocessing
from tl_jax.pretrained.maps.hub_config import activation
from tl_jax.pretrained.maps.vit import TABLE, fused
from tl_jax.pretrained.names import (
    SAME,
    Family,
    Fit,
    Layout,
    Origin,
    Rule,
    conv,
    dense,
    embed,
    norm,
    nowhere,
    stem_fit,
)

Backbone = Clip | ImageTower | TextTower
_PARTS = ('query', 'key', 'value')


def _places(backbone: Backbone | None) -> tuple[str, str]:
    """Where the image and the text tower are in our model; '' for one that it lacks."""
    if isinstance(backbone, ImageTower):
        return 'backbone', ''
    return ('', 'backbone') if isinstance(backbone, TextTower) else ('backbone/image', 'backbone/text')


def _projection(backbone: Backbone | None, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of a projection, which go nowhere where the model has none."""
    return rules if backbone is None or backbone.projection is not None else nowhere(rules)


def _openai(backbone: Backbone | None) -> tuple[Rule, ...]:
    image, text = _places(backbone)
    rules = (Rule('logit_scale', 'params/backbone/log_scale', SAME),)
    if image:
        rules += (
            Rule('visual.class_embedding', f'params/{image}/encoder/cls', SAME),
            Rule('visual.positional_embedding', f'params/{image}/encoder/position', SAME),
            *conv('visual.conv1', f'{image}/encoder/stem'),
            *norm('visual.ln_pre', f'{image}/encoder/embedding_norm'),
            *_openai_block('visual.transformer.resblocks.{block}', f'{image}/encoder/block{{block+1}}'),
            *norm('visual.ln_post', f'{image}/encoder/norm'),
            *_projection(backbone, (Rule('visual.proj', f'params/{image}/projection/kernel', SAME),)),
        )
    if text:
        rules += (
            *embed('token_embedding', f'{text}/token'),
            Rule('positional_embedding', f'params/{text}/position', SAME),
            *_openai_block('transformer.resblocks.{block}', f'{text}/block{{block+1}}'),
            *norm('ln_final', f'{text}/norm'),
            *_projection(backbone, (Rule('text_projection', f'params/{text}/projection/kernel', SAME),)),
        )
    return rules


def _openai_block(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *norm(f'{theirs}.ln_{{i}}', f'{ours}/norm{{i}}'),
        *fused(f'{theirs}.attn.in_proj_', f'{ours}/attention', _PARTS),
        *dense(f'{theirs}.attn.out_proj', f'{ours}/attention/out'),
        *dense(f'{theirs}.mlp.c_fc', f'{ours}/mlp/dense1'),
        *dense(f'{theirs}.mlp.c_proj', f'{ours}/mlp/dense2'),
    )


def _transformers(backbone: Backbone | None) -> tuple[Rule, ...]:
    """Names in files; a bare tower is without its prefix in memory, in version 5."""
    image, text = _places(backbone)
    siglip = backbone is not None and backbone.kind == 'siglip'
    scalar = Layout(lambda t: t.reshape(()), lambda leaf: leaf.reshape(1)) if siglip else SAME
    rules = (
        Rule('logit_scale', 'params/backbone/log_scale', scalar),
        Rule('logit_bias', 'params/backbone/bias', scalar),
    )
    if image:
        projection = dense('visual_projection', f'{image}/projection')
        rules += (*_image('vision_model.', image), *_projection(backbone, projection))
    if text:
        projection = dense('text_model.head' if siglip else 'text_projection', f'{text}/projection')
        rules += (*_text('text_model.', text), *_projection(backbone, projection))
    if isinstance(backbone, ImageTower):
        rules += _image('', image)
    if isinstance(backbone, TextTower):
        rules += (*_text('', text), *_projection(backbone, dense('head', f'{text}/projection')))
    return rules


def _image(prefix: str, ours: str) -> tuple[Rule, ...]:
    encoder, pooler = f'{ours}/encoder', f'{ours}/encoder/pooler'
    return (
        Rule(f'{prefix}embeddings.class_embedding', f'params/{encoder}/cls', SAME),
        Rule(f'{prefix}embeddings.position_embedding.weight', f'params/{encoder}/position', SAME),
        *conv(f'{prefix}embeddings.patch_embedding', f'{encoder}/stem'),
        *norm(f'{prefix}pre_layrnorm', f'{encoder}/embedding_norm'),  # their spelling
        *_block(prefix, f'{encoder}/block{{block+1}}'),
        *norm(f'{prefix}post_layernorm', f'{encoder}/norm'),
        Rule(f'{prefix}head.probe', f'params/{pooler}/probe', TABLE),
        *fused(f'{prefix}head.attention.in_proj_', f'{pooler}/attention', _PARTS),
        *dense(f'{prefix}head.attention.out_proj', f'{pooler}/attention/out'),
        *norm(f'{prefix}head.layernorm', f'{pooler}/norm'),
        *dense(f'{prefix}head.mlp.fc{{i}}', f'{pooler}/mlp/dense{{i}}'),
    )


def _text(prefix: str, ours: str) -> tuple[Rule, ...]:
    return (
        *embed(f'{prefix}embeddings.token_embedding', f'{ours}/token'),
        Rule(f'{prefix}embeddings.position_embedding.weight', f'params/{ours}/position', SAME),
        *_block(prefix, f'{ours}/block{{block+1}}'),
        *norm(f'{prefix}final_layer_norm', f'{ours}/norm'),
    )


def _block(prefix: str, ours: str) -> tuple[Rule, ...]:
    theirs = f'{prefix}encoder.layers.{{block}}'
    attention = {'q_proj': 'query', 'k_proj': 'key', 'v_proj': 'value', 'out_proj': 'out'}
    return (
        *(
            r
            for name, part in attention.items()
            for r in dense(f'{theirs}.self_attn.{name}', f'{ours}/attention/{part}')
        ),
        *norm(f'{theirs}.layer_norm{{i}}', f'{ours}/norm{{i}}'),
        *dense(f'{theirs}.mlp.fc{{i}}', f'{ours}/mlp/dense{{i}}'),
    )


_TABLES = (
    (r'(.*\.)?position_ids', 'a table of 0, 1, 2, …'),
    (r'attn_mask', 'a table that the length determines'),
    (r'input_resolution|context_length|vocab_size', 'a number that the shapes state'),
)
_NO_IMAGE = (
    (r'vision_model\..*|visual_projection\..*|visual\..*', 'the image tower'),
    (r'logit_(scale|bias)', 'the temperature'),
)
_NO_TEXT = (
    (r'text_model\..*|text_projection(\..*)?', 'the text tower'),
    (r'token_embedding\..*|positional_embedding|transformer\..*|ln_final\..*', 'the text tower'),
    (r'logit_(scale|bias)', 'the temperature'),
)


def _origins(*ignored: tuple[str, str]) -> tuple[Origin, ...]:
    openai = r'(visual\.)?transformer\.resblocks\.0\.attn\.in_proj_weight'
    transformers = r'((vision|text)_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight'
    return (
        Origin('openai', openai, _openai, _TABLES + ignored),
        Origin('transformers', transformers, _transformers, _TABLES + ignored),
    )


def _fits(backbone: Backbone | None) -> tuple[Fit, ...]:
    image, _ = _places(backbone)
    if backbone is None or not image:
        return ()
    tower = backbone if isinstance(backbone, ImageTower) else backbone.tower('image', parent=None)
    vit = tower.transformer(parent=None)

    def resize(position: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        position = np.asarray(position, np.float32)
        if position.ndim != 2 or position.shape[1] != shape[1]:
            raise ValueError(f'{position.shape} is not {shape} with another number of positions')
        return np.asarray(resize_positions(position, vit.grid, vit.embedded_prefix, antialias=vit.antialias))

    return (
        stem_fit(f'{image}/encoder/stem'),
        Fit(f'params/{image}/encoder/position', resize, f'resized to a grid of {vit.grid}'),
    )


_DEFAULTS = {
    ('clip', 'vision'): dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, patch_size=32),
    ('clip', 'text'): dict(
        hidden_size=512, intermediate_size=2048, num_attention_heads=8, vocab_size=49408, max_position_embeddings=77
    ),
    ('siglip', 'vision'): dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, patch_size=16),
    ('siglip', 'text'): dict(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, vocab_size=32000, max_position_embeddings=64
    ),
}
_ACTIVATION = {
    'clip': dict(hidden_act='quick_gelu', layer_norm_eps=1e-5),
    'siglip': dict(hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6),
}


def _tower_config(config: Mapping[str, Any], part: str) -> tuple[str, dict[str, Any]] | None:
    """The kind and what a `config.json` states of the 'vision' or 'text' tower; None where it is of something else."""
    kind, _, rest = str(config.get('model_type')).partition('_')
    if kind not in _ACTIVATION or rest not in ('', f'{part}_model'):
        return None
    stated = dict(config)
    if not rest:
        # Old files of CLIP state sizes a second time, and those count.
        stated = {**(config.get(f'{part}_config') or {}), **(config.get(f'{part}_config_dict') or {})}
        if kind == 'clip':
            stated['projection_dim'] = config.get('projection_dim', 512)
    return kind, _DEFAULTS[kind, part] | _ACTIVATION[kind] | dict(num_hidden_layers=12) | stated


def _tower_fields(config: Mapping[str, Any], part: str) -> dict[str, Any] | None:
    """The fields of one tower, of a file of both or of it alone."""
    found = _tower_config(config, part)
    if found is None:
        return None
    kind, stated = found
    fields = dict(
        kind=kind,
        width=stated['hidden_size'],
        depth=stated['num_hidden_layers'],
        heads=stated['num_attention_heads'],
        mlp_width=stated['intermediate_size'],
        activation=activation(stated, 'hidden_act'),
        epsilon=stated['layer_norm_eps'],
    )
    if part == 'text':
        projection = stated.get('projection_dim', 512) if kind == 'clip' else stated.get('projection_size')
        # 2 is what old files state, whatever the vocabulary.
        end = stated.get('eos_token_id', 49407) if kind == 'clip' else None
        return fields | dict(
            vocabulary=stated['vocab_size'],
            length=stated['max_position_embeddings'],
            projection=projection or fields['width'],
            eot=end if isinstance(end, int) and end != 2 else None,
        )
    if not stated.get('vision_use_head', True):
        raise UserError(
            'config.json: vision_use_head is false, and the image tower of SigLIP pools; choose another file'
        )
    return fields | dict(
        patch_size=stated['patch_size'],
        image_size=stated.get('image_size', 224),
        projection=stated.get('projection_dim', 512) if kind == 'clip' else None,
    )


def _clip_fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of both towers."""
    if config.get('model_type') not in _ACTIVATION:
        return None
    towers = {'image': _tower_fields(config, 'vision'), 'text': _tower_fields(config, 'text')}
    for name in ('activation', 'epsilon'):
        if towers['image'][name] != towers['text'][name]:
            raise UserError(
                f'config.json: {name} is {towers["image"][name]!r} of images, {towers["text"][name]!r} of texts; load '
                'each tower by itself'
            )
    own = ('width', 'depth', 'heads', 'mlp_width')
    fields = {f'{which}_{name}': tower[name] for which, tower in towers.items() for name in own}
    shared = {k: v for tower in towers.values() for k, v in tower.items() if k not in own}
    return fields | shared


FAMILIES = (
    Family(Clip, _origins(), _fits, _clip_fields),
    Family(ImageTower, _origins(*_NO_TEXT), _fits, functools.partial(_tower_fields, part='vision')),
    Family(TextTower, _origins(*_NO_IMAGE), fields=functools.partial(_tower_fields, part='text')),
)

# What transformers itself names; SigLIP's processor squeezes an image into the square, and no crop is needed.
CATALOGUE: dict[str, Entry] = {
    'openai/clip-vit-base-patch32': Entry(
        'clip_base_patch32',
        'hf://openai/clip-vit-base-patch32',
        '',
        Preprocessing(
            224,
            (0.48145466, 0.4578275, 0.40821073),
            (0.26862954, 0.26130258, 0.27577711),
            crop=1.0,
            interpolation='bicubic',
        ),
    ),
    'google/siglip-base-patch16-224': Entry(
        'siglip_base_patch16',
        'hf://google/siglip-base-patch16-224',
        '',
        Preprocessing(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), crop=1.0, interpolation='bicubic'),
    ),
}
