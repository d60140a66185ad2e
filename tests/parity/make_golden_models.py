"""Makes `golden_models.npz`: what torch's own networks give for weights that both sides draw from the same numbers.

    python tests/parity/make_golden_models.py     # needs torch and torchvision beside this project's requirements

Stored for each case: logits in evaluation mode; logits in training mode; the gradient of the training logits' sum of squares with
respect to the first kernel; the running variance of the last norm after that training step. Weights are not stored:
`draw_variables` makes them from each leaf's path.
"""

import functools
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = Path(__file__).with_name('golden_models.npz')
CLASSES = 7
IMAGE_SHAPE = (4, 32, 32, 3)
STAGES = dict(widths=(8, 16, 24, 32), stem_width=8)
# Name: model and its overrides; small, but with every kind of block and shortcut.
CASES = {
    'basic': ('resnet18', dict(stage_sizes=(2, 1, 1, 1), **STAGES)),
    'bottleneck': ('resnet50', dict(stage_sizes=(1, 2, 1, 1), **STAGES)),
    'cifar': ('resnet20', dict(stage_sizes=(2, 1, 2))),
    'mobilenet': ('mobilenet_v2', dict(width=0.1)),
}
FIRST_KERNEL = 'params/backbone/stem/conv/kernel'


def last_variance(case: str) -> str:
    norm = {
        'basic': 'stage4/block1/norm2',
        'bottleneck': 'stage4/block1/norm3',
        'cifar': 'stage3/block2/norm2',
        'mobilenet': 'final/norm',
    }[case]
    return f'batch_stats/backbone/{norm}/var'


def draw_image() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(IMAGE_SHAPE, np.float32)


def draw_variables(shapes: Mapping, path: str = '') -> dict:
    """Returns float32 arrays in place of a nested dict of shaped leaves, each a function of its path alone."""
    if isinstance(shapes, Mapping):
        return {k: draw_variables(v, f'{path}/{k}'.lstrip('/')) for k, v in shapes.items()}
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    values = rng.standard_normal(shapes.shape)
    leaf = path.rpartition('/')[2]
    if leaf == 'kernel':
        values *= np.sqrt(2 / np.prod(shapes.shape[:-1]))
    elif leaf in ('scale', 'var'):
        values = 1 + 0.5 * np.tanh(values)
    else:
        values *= 0.1
    return values.astype(np.float32)


def leaf(variables: Mapping, path: str) -> np.ndarray:
    return functools.reduce(lambda node, key: node[key], path.split('/'), variables)


def main():
    import torch

    from tl_jax.models import create_model

    golden = {}
    image = torch.from_numpy(draw_image()).permute(0, 3, 1, 2)
    for case, (name, overrides) in CASES.items():
        model = create_model(name, num_classes=CLASSES, **overrides)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(IMAGE_SHAPE))
        reference = torch_model(case)
        names = torch_names(draw_variables(shapes))
        reference.load_state_dict(names, strict=True)
        reference.eval()
        golden[f'{case}/eval'] = reference(image).detach().numpy()
        reference.train()
        logits = reference(image)
        (logits**2).sum().backward()
        golden[f'{case}/train'] = logits.detach().numpy()
        parameters, buffers = dict(reference.named_parameters()), dict(reference.named_buffers())
        first, last = torch_name(FIRST_KERNEL), torch_name(last_variance(case))
        golden[f'{case}/gradient'] = parameters[first].grad.permute(2, 3, 1, 0).numpy()
        golden[f'{case}/variance'] = buffers[last].numpy()
    np.savez_compressed(GOLDEN, **golden)
    print(f'{GOLDEN}: {GOLDEN.stat().st_size} bytes, torch {torch.__version__}')


def torch_model(case: str):
    """torchvision's network with our small widths; option A's, which torchvision has not, after the paper."""
    import torch

    operators = torch.library.Library('torchvision', 'FRAGMENT')
    for operator in ('nms', 'qnms'):  # what a torchvision without its compiled operators asks for
        operators.define(f'{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor')
    from torchvision.models import mobilenetv2, resnet

    if case == 'mobilenet':
        return mobilenetv2.MobileNetV2(num_classes=CLASSES, width_mult=CASES[case][1]['width'], dropout=0.0)
    sizes = CASES[case][1]['stage_sizes']
    widths = CASES[case][1].get('widths', (16, 32, 64))
    block = resnet.Bottleneck if case == 'bottleneck' else resnet.BasicBlock
    model = resnet.ResNet(block, [1, 1, 1, 1])
    model.inplanes = widths[0]
    for i, (size, width) in enumerate(zip(sizes, widths, strict=True), start=1):
        setattr(model, f'layer{i}', model._make_layer(block, width, size, stride=1 if i == 1 else 2))
    model.conv1 = torch.nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
    model.bn1 = torch.nn.BatchNorm2d(widths[0])
    model.fc = torch.nn.Linear(widths[-1] * block.expansion, CLASSES)
    if case == 'cifar':
        model.conv1 = torch.nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        model.maxpool = model.layer4 = torch.nn.Identity()
        for layer, width in ((model.layer2, widths[1]), (model.layer3, widths[2])):
            layer[0].downsample = OptionA(width)
    return model


class OptionA:
    """Every other position, and a quarter of the new channels as zeros on each side."""

    def __new__(cls, width: int):
        import torch

        class Shortcut(torch.nn.Module):
            def forward(self, x):
                return torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, width // 4, width // 4))

        return Shortcut()


def torch_names(variables: Mapping) -> dict:
    """Our variables as a torch state dict."""
    import torch

    flat = {}

    def visit(node, path):
        if isinstance(node, Mapping):
            for key, value in node.items():
                visit(value, f'{path}/{key}'.lstrip('/'))
        else:
            axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[node.ndim]
            name = torch_name(path)
            flat[name] = torch.from_numpy(np.ascontiguousarray(node.transpose(axes)))
            if name.endswith('running_var'):
                flat[name.replace('running_var', 'num_batches_tracked')] = torch.zeros((), dtype=torch.int64)

    visit(variables, '')
    return flat


def torch_name(path: str) -> str:
    """Our path as torchvision's name, for both families (`block` directly under the backbone: MobileNetV2)."""
    collection, role, *modules, leaf_name = path.split('/')
    norm = bool(modules) and 'norm' in modules[-1]
    leaf_name = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}.get(
        leaf_name, leaf_name
    )
    if role == 'head':
        return f'HEAD.{leaf_name}'
    del collection, norm
    return f'{"/".join(modules)}.{leaf_name}'
