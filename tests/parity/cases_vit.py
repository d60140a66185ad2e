"""Vision transformers of timm, torchvision, Hugging Face, and Google's npz files as timm reads them."""

import functools
import importlib
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from parity_harness import CLASSES, Case, images, timm_network, torchvision_network

SMALL = dict(width=24, depth=2, heads=3, patch_size=8, image_size=32)


class Renamed:
    """A reference network whose weights go by the names in its files and not by those in memory."""

    def __init__(self, network):
        self.network = network

    def __call__(self, *args, **kwargs):
        return self.network(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.network, name)

    def eval(self):
        self.network.eval()
        return self

    def double(self):
        self.network.double()
        return self

    def state_dict(self):
        return self.in_file(self.network.state_dict())

    def named_parameters(self):
        grads = self.in_file({name: p.grad for name, p in self.network.named_parameters() if p.grad is not None})
        return [(name, SimpleNamespace(grad=grad)) for name, grad in grads.items()]


class HuggingFace(Renamed):
    """Names as `save_pretrained` writes and `from_pretrained` reads them; `options` go to every call."""

    def __init__(self, network, **options):
        super().__init__(network)
        self.options = options

    def __call__(self, image):
        return self.network(image, **self.options)

    def load_state_dict(self, tensors, strict):
        del strict
        self.network, info = type(self.network).from_pretrained(
            None, config=self.network.config, state_dict=dict(tensors), output_loading_info=True
        )
        return SimpleNamespace(unexpected_keys=info['unexpected_keys'], missing_keys=info['missing_keys'])

    def in_file(self, tensors):
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.network, tensors)

    def named_parameters(self):
        # Our exports bear the names of whole models, which bare ones read as well.
        bare = self.network.base_model is self.network
        prefix = f'{self.network.base_model_prefix}.' if bare else ''
        return [(prefix + name, parameter) for name, parameter in super().named_parameters()]


class Google(Renamed):
    """timm's network, which reads Google's npz files; names back by hand."""

    def __init__(self, network, attention, mlp, norm2, position):
        super().__init__(network)
        self.numbers = attention, mlp, norm2, position

    def load_state_dict(self, tensors, strict):
        del strict
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'weights.npz'
            np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
            self.network.load_pretrained(str(path))
        return SimpleNamespace(unexpected_keys=set(tensors) - set(self.state_dict()), missing_keys=[])

    def in_file(self, tensors):
        named = {}
        for name, tensor in tensors.items():
            named |= self._in_file(name, tensor)
        return named

    def _in_file(self, name, tensor):
        attention, mlp, norm2, position = self.numbers
        kept = {'cls_token': 'cls', 'pos_embed': position, 'attn_pool.latent': 'MAPHead_0/probe'}
        if name in kept:
            return {kept[name]: tensor}
        module, _, leaf = name.rpartition('.')
        for theirs, ours in (
            ('patch_embed.proj', 'embedding'),
            ('attn_pool.mlp', 'MAPHead_0/MlpBlock_0'),
            ('attn_pool.norm', 'MAPHead_0/LayerNorm_0'),
            ('attn_pool', 'MAPHead_0/MultiHeadDotProductAttention_0'),
            ('blocks.', 'Transformer/encoderblock_'),
            ('.norm1', '/LayerNorm_0'),
            ('.norm2', f'/LayerNorm_{norm2}'),
            ('.attn', f'/MultiHeadDotProductAttention_{attention}'),
            ('.mlp', f'/MlpBlock_{mlp}'),
            ('.fc1', '/Dense_0'),
            ('.fc2', '/Dense_1'),
        ):
            module = module.replace(theirs, ours)
        if module in ('norm', 'fc_norm'):
            module = 'Transformer/encoder_norm'
        heads = SMALL['heads']
        is_kernel = leaf == 'weight' and tensor.ndim > 1
        leaf = 'kernel' if is_kernel else 'scale' if leaf == 'weight' else 'bias'
        module, _, last = module.rpartition('.')
        split = {'qkv': ('query', 'key', 'value'), 'kv': ('key', 'value'), 'q': ('query',)}.get(last)
        if split:
            parts = zip(split, tensor.chunk(len(split)), strict=True)
            return {
                f'{module}/{part}/{leaf}': t.T.unflatten(1, (heads, -1)) if is_kernel else t.unflatten(0, (heads, -1))
                for part, t in parts
            }
        if last == 'proj':
            return {f'{module}/out/{leaf}': tensor.T.unflatten(0, (heads, -1)) if is_kernel else tensor}
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[tensor.ndim]
        return {f'{f"{module}.{last}".lstrip(".")}/{leaf}': tensor.permute(axes)}


def timm_vit(cls='vision_transformer.VisionTransformer', fields=SMALL, **changes):
    import torch_side  # noqa: F401

    module, name = cls.split('.')
    arguments = dict(
        img_size=fields['image_size'],
        patch_size=fields['patch_size'],
        embed_dim=fields['width'],
        depth=fields['depth'],
        num_heads=fields['heads'],
        num_classes=CLASSES,
    )
    return getattr(importlib.import_module(f'timm.models.{module}'), name)(**arguments | changes)


def timm_outputs(network, image):
    import torch_side

    modules = {'embedding': 'norm_pre', **{f'block{i + 1}': f'blocks.{i}' for i in range(len(network.blocks))}}
    if type(network.norm).__name__ != 'Identity':
        modules['encoded'] = 'norm'
    distilled = hasattr(network, 'head_dist')
    endpoints = torch_side.with_logits(network, image, modules | ({} if distilled else {'features': 'head_drop'}))
    return {**endpoints, 'logits': endpoints.pop('logits')}


def torchvision_vit(**changes):
    import torch_side  # noqa: F401
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        **dict(image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=40, num_classes=CLASSES)
        | changes
    )


def torchvision_outputs(network, image):
    import torch_side

    modules = {
        'embedding': 'encoder.dropout',
        **{f'block{i + 1}': f'encoder.layers.encoder_layer_{i}' for i in range(2)},
        'encoded': 'encoder.ln',
    }
    if network.representation_size:
        modules['features'] = 'heads.act'
    return torch_side.with_logits(network, image, modules)


def hugging_face(name, head='ForImageClassification', options=None, **changes):
    import torch_side  # noqa: F401
    import transformers

    config = getattr(transformers, f'{name}Config')(
        **dict(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            patch_size=8,
            image_size=32,
            num_labels=CLASSES,
            attn_implementation='eager',
        )
        | changes
    )
    return HuggingFace(getattr(transformers, f'{name}{head}')(config), **options or {})


def hugging_face_outputs(network, image, blocks, base=''):
    import torch_side

    modules = {
        'embedding': f'{base}embeddings',
        **{f'block{i + 1}': f'{base}{blocks}.{i}' for i in range(2)},
        'encoded': f'{base}layernorm',
    }
    endpoints, result = torch_side.recorded(network, modules, image)
    if hasattr(result, 'logits'):
        return {**endpoints, 'logits': result.logits}
    return {**endpoints, 'features': result.pooler_output}


DINOV2 = dict(SMALL, layer_scale=0.5)
HF_VIT = dict(SMALL, mlp_width=40, epsilon=1e-12, antialias=False)

CASES = (
    Case('vit_timm', 'vit_tiny_patch16', SMALL, 'timm', timm_vit, timm_outputs, images(2, 32), golden=True),
    Case(
        'vit_timm_dynamic_size',
        'vit_tiny_patch16',
        SMALL,
        'timm',
        lambda: timm_vit(dynamic_img_size=True),
        timm_outputs,
        images(2, 40, 24),
    ),
    Case(
        'vit_timm_clip',
        'vit_tiny_patch16',
        dict(SMALL, image_size=(24, 40), norm_pre=True, patch_bias=False, activation='quick_gelu', qkv_bias=False),
        'timm',
        lambda: timm_vit(img_size=(24, 40), pre_norm=True, act_layer='quick_gelu', qkv_bias=False),
        timm_outputs,
        images(2, 24, 40),
    ),
    Case(
        'vit_timm_map',
        'vit_tiny_patch16',
        dict(SMALL, use_cls=False, pool='map', activation='gelu_tanh'),
        'timm',
        lambda: timm_vit(global_pool='map', class_token=False, act_layer='gelu_tanh'),
        timm_outputs,
        images(2, 32),
    ),
    Case(
        'vit_timm_mean',
        'vit_tiny_patch16',
        dict(SMALL, pool='mean', final_norm='after_pool', num_registers=2, embed_prefix=False),
        'timm',
        lambda: timm_vit(global_pool='avg', reg_tokens=2, no_embed_class=True),
        timm_outputs,
        images(2, 32),
    ),
    Case(
        'deit_timm_distilled',
        'deit_tiny_distilled_patch16',
        SMALL,
        'timm',
        lambda: timm_vit('deit.VisionTransformerDistilled'),
        timm_outputs,
        images(2, 32),
        golden=True,
    ),
    Case(
        'deit3_timm',
        'deit3_small_patch16',
        SMALL,
        'timm',
        lambda: timm_vit(no_embed_class=True, init_values=1e-6),
        timm_outputs,
        images(2, 32),
    ),
    Case(
        'dinov2_timm_registers_swiglu',
        'dinov2_giant_reg',
        dict(SMALL, mlp_width=40, embed_prefix=False),
        'timm',
        lambda: timm_vit(reg_tokens=4, no_embed_class=True, init_values=1e-5, mlp_ratio=80 / 24 + 1e-6, **_swiglu()),
        timm_outputs,
        images(2, 32),
        golden=True,
    ),
    Case(
        'vit_torchvision',
        'vit_base_patch16',
        dict(SMALL, mlp_width=40),
        'torchvision',
        torchvision_vit,
        torchvision_outputs,
        images(2, 32),
    ),
    Case(
        'vit_torchvision_representation',
        'vit_base_patch16',
        dict(SMALL, mlp_width=40, representation_size=11),
        'torchvision',
        lambda: torchvision_vit(representation_size=11),
        torchvision_outputs,
        images(2, 32),
    ),
    Case(
        'vit_transformers',
        'vit_base_patch16',
        HF_VIT,
        'transformers',
        lambda: hugging_face('ViT', intermediate_size=40),
        functools.partial(hugging_face_outputs, base='vit.', blocks='layers'),
        images(2, 32),
    ),
    Case(
        'vit_transformers_pooler_dynamic_size',
        'vit_base_patch16',
        dict(HF_VIT, width=48, representation_size=48),
        'transformers',
        lambda: hugging_face('ViT', 'Model', {'interpolate_pos_encoding': True}, hidden_size=48, intermediate_size=40),
        functools.partial(hugging_face_outputs, blocks='layers'),
        images(2, 40, 24),
        num_classes=None,
    ),
    Case(
        'deit_transformers_distilled',
        'deit_base_distilled_patch16',
        HF_VIT,
        'transformers',
        lambda: hugging_face('DeiT', 'ForImageClassificationWithTeacher', intermediate_size=40),
        functools.partial(hugging_face_outputs, base='deit.', blocks='layers'),
        images(2, 32),
    ),
    Case(
        'dinov2_transformers',
        'dinov2_small',
        dict(SMALL, antialias=False, pool='token_mean'),
        'transformers',
        lambda: hugging_face('Dinov2'),
        functools.partial(hugging_face_outputs, base='dinov2.', blocks='encoder.layer'),
        images(2, 44, 30),
        absent=(r'.*mask_token',),
    ),
    Case(
        'dinov2_transformers_registers_swiglu',
        'dinov2_giant_reg',
        dict(SMALL, mlp_width=64),
        'transformers',
        lambda: hugging_face('Dinov2WithRegisters', 'Model', use_swiglu_ffn=True),
        functools.partial(hugging_face_outputs, blocks='encoder.layer'),
        images(2, 40, 24),
        num_classes=None,
        absent=(r'.*mask_token',),
    ),
    Case(
        'vit_google',
        'vit_base_patch16',
        SMALL,
        'google',
        lambda: Google(timm_vit(), 1, 3, 2, 'Transformer/posembed_input/pos_embedding'),
        timm_outputs,
        images(2, 32),
    ),
    Case(
        'vit_big_vision_map',
        'vit_base_patch16',
        dict(SMALL, use_cls=False, pool='map'),
        'big_vision',
        lambda: Google(timm_vit(global_pool='map', class_token=False), 0, 0, 1, 'pos_embedding'),
        timm_outputs,
        images(2, 32),
    ),
)


def _swiglu():
    import torch
    from timm.layers import SwiGLUPacked

    return dict(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU)


SIZES = (
    *(
        (ours, classes, fields, 'timm', functools.partial(timm_network, theirs))
        for ours, theirs, classes, fields in (
            ('vit_tiny_patch16', 'vit_tiny_patch16_224', 1000, {}),
            ('vit_small_patch32', 'vit_small_patch32_384', 1000, {'image_size': 384}),
            ('vit_huge_patch14', 'vit_huge_patch14_224', None, {}),
            ('deit_small_distilled_patch16', 'deit_small_distilled_patch16_224', 1000, {}),
            ('deit3_base_patch16', 'deit3_base_patch16_224', 1000, {}),
            ('dinov2_small', 'vit_small_patch14_dinov2', None, {}),
            ('dinov2_giant_reg', 'vit_giant_patch14_reg4_dinov2', None, {'embed_prefix': False}),
        )
    ),
    *(
        (ours, 1000, {}, 'torchvision', functools.partial(torchvision_network, theirs))
        for ours, theirs in (('vit_base_patch16', 'vit_b_16'), ('vit_large_patch32', 'vit_l_32'))
    ),
    (
        'dinov2_giant',
        1000,
        {'pool': 'token_mean'},
        'transformers',
        lambda: hugging_face(
            'Dinov2',
            num_labels=1000,
            hidden_size=1536,
            num_hidden_layers=40,
            num_attention_heads=24,
            patch_size=14,
            image_size=518,
            use_swiglu_ffn=True,
            use_mask_token=False,
        ),
    ),
    (
        'vit_base_patch16',
        1000,
        {},
        'transformers',
        lambda: hugging_face(
            'ViT',
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            patch_size=16,
            image_size=224,
            num_labels=1000,
        ),
    ),
)
