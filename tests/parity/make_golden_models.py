"""Makes `golden_models.npz`: what torch's own networks give for weights that both sides draw from the same numbers.

    python tests/parity/make_golden_models.py     # needs torch and torchvision beside this project's requirements

Stored for each case: the logits in evaluation and in training mode; the gradient of the training logits' sum of squares
with respect to the first kernel; the last norm's running variance after that step. Weights are not stored:
`draw_variables` makes each leaf from its path.
"""

import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = Path(__file__).with_name('golden_models.npz')
CLASSES = 7
FIRST_KERNEL = 'params/backbone/stem/conv/kernel'


class Case(NamedTuple):
    """A model of ours, small, the module of its last running variance, and the size of the images it sees."""

    model: str
    overrides: Mapping[str, Any]
    last_norm: str
    pixels: int = 32


_SMALL = dict(widths=(8, 16, 24, 32), stem_width=8)
CASES = {
    'basic': Case('resnet18', dict(stage_sizes=(2, 1, 1, 1), **_SMALL), 'stage4/block1/norm2'),
    'bottleneck': Case('resnet50', dict(stage_sizes=(1, 2, 1, 1), **_SMALL), 'stage4/block1/norm3', pixels=128),
    'cifar': Case('resnet20', dict(stage_sizes=(2, 1, 2)), 'stage3/block2/norm2'),
    'mobilenet': Case('mobilenet_v2', dict(width=0.1), 'final/norm', pixels=128),
}


def draw_image(case: Case) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, case.pixels, case.pixels, 3), np.float32)


def draw_variables(shapes: Any, path: str = '') -> Any:
    """Returns float32 arrays in place of a nested dict of shaped leaves, each a function of its path and shape alone."""
    if isinstance(shapes, Mapping):
        return {name: draw_variables(node, f'{path}/{name}'.lstrip('/')) for name, node in shapes.items()}
    values = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shapes.shape)
    leaf = path.rpartition('/')[2]
    if leaf == 'kernel':
        values *= np.sqrt(2 / np.prod(shapes.shape[:-1]))
    elif leaf in ('scale', 'var'):
        values = 1 + 0.5 * np.tanh(values)
    else:
        values *= 0.1
    return values.astype(np.float32)


def main():
    sys.path.insert(0, str(ROOT))
    import torch

    from tl_jax import trees
    from tl_jax.models import create_model

    golden = {}
    for name, case in CASES.items():
        model = create_model(case.model, num_classes=CLASSES, **case.overrides)
        image = draw_image(case)
        shapes = jax.eval_shape(model.init, jax.random.key(0), image)
        image = torch.from_numpy(image).permute(0, 3, 1, 2)
        reference = torch_model(name)
        names = load(reference, trees.flatten(draw_variables(shapes)))
        # In float64: torch's own float32 gradients of a normalised network are no better than ours.
        reference, image = reference.double(), image.double()
        golden[f'{name}/eval'] = reference.eval()(image).detach().numpy()
        logits = reference.train()(image)
        (logits**2).sum().backward()
        kernel = reference.get_parameter(names[FIRST_KERNEL])
        variance = reference.get_buffer(names[f'batch_stats/backbone/{case.last_norm}/var'])
        golden[f'{name}/train'] = logits.detach().numpy()
        golden[f'{name}/gradient'] = kernel.grad.permute(2, 3, 1, 0).numpy()
        golden[f'{name}/variance'] = variance.numpy()
    np.savez_compressed(GOLDEN, **{name: value.astype(np.float32) for name, value in golden.items()})
    print(f'{GOLDEN}: {GOLDEN.stat().st_size} bytes, torch {torch.__version__}')


def load(reference, variables: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Gives a torch network our variables, all of them, and returns `{our path: torch's name}`."""
    import torch

    from tl_jax.pretrained import names

    tensors = reference.state_dict()
    name_map = names.choose(tensors, 'torch')
    torch_names = {}
    for name, tensor in tensors.items():
        if target := names.target(name_map, name):
            value = variables[target.path]
            value = value.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim])
            tensors[name] = torch.from_numpy(np.ascontiguousarray(value)).reshape(tensor.shape)
            torch_names[target.path] = name
    assert torch_names.keys() == variables.keys()
    reference.load_state_dict(tensors)
    return torch_names


def torch_model(name: str):
    """torchvision's network with our small sizes."""
    import torch

    operators = torch.library.Library('torchvision', 'FRAGMENT')
    for operator in ('nms', 'qnms'):  # what a torchvision without its compiled operators asks for
        if not hasattr(torch.ops.torchvision, operator):
            operators.define(f'{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor')
    from torchvision.models import mobilenetv2, resnet

    class OptionA(torch.nn.Module):  # section 3.3 of He et al.; torchvision has the projection only
        def forward(self, x):
            zeros = x.shape[1] // 2
            return torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, zeros, zeros))

    overrides = CASES[name].overrides
    if name == 'mobilenet':
        return mobilenetv2.MobileNetV2(num_classes=CLASSES, width_mult=overrides['width'], dropout=0.0)
    widths = overrides.get('widths', (16, 32, 64))
    block = resnet.Bottleneck if name == 'bottleneck' else resnet.BasicBlock
    model = resnet.ResNet(block, [1, 1, 1, 1])
    model.inplanes = widths[0]
    for i, (size, width) in enumerate(zip(overrides['stage_sizes'], widths, strict=True), start=1):
        setattr(model, f'layer{i}', model._make_layer(block, width, size, stride=1 if i == 1 else 2))
    model.conv1 = torch.nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
    model.bn1 = torch.nn.BatchNorm2d(widths[0])
    model.fc = torch.nn.Linear(widths[-1] * block.expansion, CLASSES)
    if name == 'cifar':
        model.conv1 = torch.nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        model.maxpool = model.layer4 = torch.nn.Identity()
        model.layer2[0].downsample, model.layer3[0].downsample = OptionA(), OptionA()
    return model


if __name__ == '__main__':
    main()
