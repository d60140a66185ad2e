"""CLIP and SigLIP: both towers and each alone, from files that hold both; OpenAI's names and Hugging Face's.

OpenAI's own package is not among what `make parity` installs: `openai_clip` builds the paper's network from torch's
modules, under the names of OpenAI's files.
"""

import functools

import numpy as np
from parity_harness import Case

VOCABULARY, LENGTH, END, DIM = 83, 11, 80, 20
_IMAGE = dict(width=24, depth=2, heads=3, mlp_width=40)
_TEXT = dict(width=16, depth=3, heads=2, mlp_width=28)
_PIXELS = dict(patch_size=8, image_size=32)
_TOKENS = dict(vocabulary=VOCABULARY, length=LENGTH)
_BOTH = {f'{which}_{k}': v for which, sizes in (('image', _IMAGE), ('text', _TEXT)) for k, v in sizes.items()}


def texts(end=END, mask=False, length=LENGTH):
    """Three texts that end where `end` stands, and then are padded."""

    def draw(rng):
        tokens = rng.integers(1, END - 1, (3, length)).astype(np.int32)
        last = np.array([[length - 1], [3], [length // 2]])
        place = np.arange(length)
        tokens = np.where(place < last, tokens, np.where(place == last, end, 0)).astype(np.int32)
        return dict(tokens=tokens, mask=place <= last) if mask else tokens

    return draw


def pictures(height=32, width=32):
    return lambda rng: rng.standard_normal((2, height, width, 3), np.float32)


def both(image, text):
    """Inputs of the two towers together."""

    def draw(rng):
        tokens = text(rng)
        return dict(image=image(rng)) | (tokens if isinstance(tokens, dict) else dict(tokens=tokens))

    return draw


def arguments(inputs):
    """Our inputs as the arguments of transformers."""
    import torch

    if not isinstance(inputs, dict):
        inputs = {'image' if inputs.ndim == 4 else 'tokens': inputs}
    given = {}
    if 'image' in inputs:
        given['pixel_values'] = torch.from_numpy(np.ascontiguousarray(inputs['image'].transpose(0, 3, 1, 2)))
    if 'tokens' in inputs:
        given['input_ids'] = torch.from_numpy(inputs['tokens'].astype(np.int64))
    if 'mask' in inputs:
        given['attention_mask'] = torch.from_numpy(inputs['mask'].astype(np.int64))
    return given


def openai_clip():
    """A contrastive pair of transformers under the names of OpenAI's files, which are those of torch's own modules."""
    import torch
    from torch import nn

    class Gelu(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    class Block(nn.Module):
        def __init__(self, width, heads, mlp_width):
            super().__init__()
            self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.mlp = nn.Sequential()
            self.mlp.add_module('c_fc', nn.Linear(width, mlp_width))
            self.mlp.add_module('gelu', Gelu())
            self.mlp.add_module('c_proj', nn.Linear(mlp_width, width))

        def forward(self, x, mask=None):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    class Transformer(nn.Module):
        def __init__(self, width, depth, heads, mlp_width):
            super().__init__()
            self.resblocks = nn.ModuleList(Block(width, heads, mlp_width) for _ in range(depth))

        def forward(self, x, mask=None):
            for block in self.resblocks:
                x = block(x, mask)
            return x

    class Visual(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
            self.class_embedding = nn.Parameter(torch.zeros(width))
            self.positional_embedding = nn.Parameter(torch.zeros(17, width))
            self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
            self.transformer = Transformer(**_IMAGE)
            self.proj = nn.Parameter(torch.zeros(width, DIM))

        def forward(self, image):
            x = self.conv1(image).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
            return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            width = _TEXT['width']
            self.visual = Visual(_IMAGE['width'])
            self.token_embedding = nn.Embedding(VOCABULARY, width)
            self.positional_embedding = nn.Parameter(torch.zeros(LENGTH, width))
            self.transformer = Transformer(**_TEXT)
            self.ln_final = nn.LayerNorm(width)
            self.text_projection = nn.Parameter(torch.zeros(width, DIM))
            self.logit_scale = nn.Parameter(torch.zeros(()))

        def encode_text(self, tokens):
            x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
            mask = torch.full((tokens.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
            x = self.ln_final(self.transformer(x, mask))
            return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection

        def forward(self, pixel_values, input_ids):
            image, text = self.visual(pixel_values), self.encode_text(input_ids)
            unit = [x / x.norm(dim=1, keepdim=True) for x in (image, text)]
            return dict(features=image, image_features=unit[0], text_features=unit[1]) | dict(
                logits_per_image=self.logit_scale.exp() * unit[0] @ unit[1].T
            )

    return Model()


def openai_outputs(model, given):
    import torch_side

    modules = {
        'image_embedding': 'visual.ln_pre',
        **{f'image_block{i + 1}': f'visual.transformer.resblocks.{i}' for i in range(_IMAGE['depth'])},
        **{f'text_block{i + 1}': f'transformer.resblocks.{i}' for i in range(_TEXT['depth'])},
        'text_encoded': 'ln_final',
    }
    endpoints, result = torch_side.recorded(model, modules, **given)
    return endpoints | result


def openai_text_outputs(model, given):
    return {'features': model.encode_text(given['input_ids'])}


def transformers_pair(kind):
    """A CLIPModel or SiglipModel of small and odd sizes."""
    import transformers

    def sizes(own):
        names = dict(hidden_size='width', num_hidden_layers='depth', num_attention_heads='heads')
        return {k: own[v] for k, v in names.items()} | dict(intermediate_size=own['mlp_width'])

    text = sizes(_TEXT) | dict(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, eos_token_id=END)
    vision = sizes(_IMAGE) | _PIXELS
    if kind == 'clip':
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)
        return transformers.CLIPModel(config)
    text['projection_size'] = _IMAGE['width']
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))


def _modules(model, which):
    siglip = not hasattr(model, 'visual_projection')
    if which == 'text':
        ends = {
            'encoded': 'text_model.final_layer_norm',
            'features': 'text_model.head' if siglip else 'text_projection',
        }
        return {
            'embedding': 'text_model.embeddings',
            **{f'block{i + 1}': f'text_model.encoder.layers.{i}' for i in range(_TEXT['depth'])},
            **ends,
        }
    return {
        'embedding': 'vision_model.embeddings' if siglip else 'vision_model.pre_layrnorm',
        **{f'block{i + 1}': f'vision_model.encoder.layers.{i}' for i in range(_IMAGE['depth'])},
        **({'encoded': 'vision_model.post_layernorm'} if siglip else {}),
        'features': 'vision_model.head' if siglip else 'visual_projection',
    }


def pair_outputs(model, given):
    import torch_side

    modules = {f'{which}_{k}': v for which in ('image', 'text') for k, v in _modules(model, which).items()}
    modules['features'] = modules.pop('image_features')
    del modules['text_features']
    endpoints, result = torch_side.recorded(model, modules, **given)
    units = dict(image_features=result.image_embeds, text_features=result.text_embeds)
    return endpoints | units | dict(logits_per_image=result.logits_per_image)


def image_outputs(model, given):
    import torch_side

    whole = _Alone(functools.partial(model.get_image_features, interpolate_pos_encoding=True), model)
    return torch_side.recorded(whole, _modules(model, 'image'), **given)[0]


def text_outputs(model, given):
    import torch_side

    return torch_side.recorded(_Alone(model.get_text_features, model), _modules(model, 'text'), **given)[0]


class _Alone:
    """One method of a model, with the model's submodules."""

    def __init__(self, call, model):
        self.call, self.get_submodule = call, model.get_submodule

    def __call__(self, **given):
        return self.call(**given)


_NO_TEXT = (r'text_model\..*', r'text_projection\..*', r'logit_(scale|bias)')
_NO_IMAGE = (r'vision_model\..*', r'visual_projection\..*', r'visual\..*', r'logit_(scale|bias)')


def _case(name, model, fields, origin, reference, outputs, inputs, **options):
    return Case(name, model, fields, origin, reference, outputs, inputs, arguments, num_classes=None, **options)


CASES = (
    _case(
        'clip_openai',
        'clip_base_patch32',
        dict(projection=DIM, **_BOTH, **_PIXELS, **_TOKENS),
        'openai',
        openai_clip,
        openai_outputs,
        both(pictures(), texts(VOCABULARY - 1, length=9)),
        golden=True,
    ),
    _case(
        'clip_text_openai',
        'clip_text_base',
        dict(projection=DIM, **_TEXT, **_TOKENS),
        'openai',
        openai_clip,
        openai_text_outputs,
        texts(VOCABULARY - 1),
        absent=_NO_IMAGE,
    ),
    _case(
        'clip_transformers',
        'clip_base_patch16',
        dict(projection=DIM, eot=END, **_BOTH, **_PIXELS, **_TOKENS),
        'transformers',
        lambda: transformers_pair('clip'),
        pair_outputs,
        both(pictures(), texts(mask=True)),
    ),
    _case(
        'clip_vision_transformers',
        'clip_vision_base_patch32',
        dict(projection=DIM, **_IMAGE, **_PIXELS),
        'transformers',
        lambda: transformers_pair('clip'),
        image_outputs,
        pictures(45, 24),
        absent=_NO_TEXT,
    ),
    _case(
        'siglip',
        'siglip_base_patch16',
        dict(projection=_IMAGE['width'], **_BOTH, **_PIXELS, **_TOKENS),
        'transformers',
        lambda: transformers_pair('siglip'),
        pair_outputs,
        both(pictures(), texts(mask=True)),
        golden=True,
    ),
    _case(
        'siglip_vision',
        'siglip_vision_base_patch16',
        dict(**_IMAGE, **_PIXELS),
        'transformers',
        lambda: transformers_pair('siglip'),
        image_outputs,
        pictures(24, 45),
        absent=_NO_TEXT,
    ),
    _case(
        'siglip_text',
        'siglip_text_base',
        dict(projection=_IMAGE['width'], **_TEXT, **_TOKENS),
        'transformers',
        lambda: transformers_pair('siglip'),
        text_outputs,
        texts(length=10),
        absent=_NO_IMAGE,
    ),
)


def full(kind, vision, text, dim, patch_size, image_size):
    """Both towers of a catalogue size; (width, depth, heads, mlp width) of each."""
    import transformers

    names = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size')
    vision = dict(zip(names, vision, strict=True)) | dict(patch_size=patch_size, image_size=image_size)
    text = dict(zip(names, text, strict=True))
    if kind == 'clip':
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)
        return transformers.CLIPModel(config)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))


_BASE, _LARGE, _SO400M = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 27, 16, 4304)
_FULL = (
    ('clip', 'base', _BASE, (512, 12, 8, 2048), 512, 16, 224),
    ('clip', 'base', _BASE, (512, 12, 8, 2048), 512, 32, 224),
    ('clip', 'large', _LARGE, (768, 12, 12, 3072), 768, 14, 224),
    ('siglip', 'base', _BASE, _BASE, None, 16, 224),
    ('siglip', 'large', _LARGE, _LARGE, None, 16, 256),
    ('siglip', 'so400m', _SO400M, _SO400M, None, 14, 384),
)


def _sizes():
    """Each tower, and both, beside the whole model."""
    image, tokens = np.zeros((1, 224, 224, 3), np.float32), np.zeros((1, 8), np.int32)
    for kind, size, *shape in _FULL:
        patch = f'{size}_patch{shape[-2]}'
        for name, inputs, absent in (
            (f'{kind}_vision_{patch}', image, _NO_TEXT),
            (f'{kind}_text_{size}', tokens, _NO_IMAGE),
            (f'{kind}_{patch}', {'image': image, 'tokens': tokens}, ()),
        ):
            build = functools.partial(full, kind, *shape)
            yield name, None, {}, 'transformers', build, inputs, absent


SIZES = tuple(_sizes())
