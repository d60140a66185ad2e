"""SqueezeNets: torchvision's names, and Caffe's as ncnn's files have them.

Caffe's network takes BGR images of 0 … 255 less a mean. Reading turns its first kernel about, so that ours takes RGB,
prepared by `Preprocessing(227, CAFFE_MEAN, CAFFE_STD)`.
"""

import numpy as np

from tl_jax.errors import UserError
from tl_jax.models.squeezenet import SqueezeNet
from tl_jax.pretrained.names import OIHW, SAME, Family, Layout, Origin, Rule, conv, stem_fit

CAFFE_MEAN = (123 / 255, 117 / 255, 104 / 255)
CAFFE_STD = (1 / 255,) * 3
_FROM_BGR = Layout(lambda t: OIHW.read(t)[:, :, ::-1], lambda leaf: OIHW.write(leaf[:, :, ::-1]))


def _refuse(leaf: np.ndarray) -> np.ndarray:
    raise UserError(
        "origin: a head on SqueezeNet's features has no place there, where a ReLU precedes the mean; export the "
        "backbone alone, choose 'tl_jax', or train a network with model.classes"
    )


def _classifier(backbone: SqueezeNet, weight: str, bias: str) -> tuple[Rule, ...]:
    """The origin's classifier: `conv10`, or a head that no linear head is equal to and that is therefore left out."""
    if backbone.classes is not None:
        return Rule(weight, 'params/backbone/conv10/kernel', OIHW), Rule(bias, 'params/backbone/conv10/bias', SAME)
    # Of four axes it never fits ours of two, so that ours stays fresh by the rule `head/.*`; nor does its bias say how
    # many classes to make a head for.
    return Rule(weight, 'params/head/kernel', Layout(OIHW.read, _refuse)), Rule(bias, 'params/head/conv10/bias', SAME)


def _torchvision(backbone: SqueezeNet | None) -> tuple[Rule, ...]:
    backbone = backbone or SqueezeNet()
    rules = [*conv('features.0', 'backbone/stem'), *_classifier(backbone, 'classifier.1.weight', 'classifier.1.bias')]
    place, fire = 2, 2  # after the stem and its ReLU
    for size in backbone.stage_sizes:
        place += 1  # the stage's pool
        for _ in range(size):
            ours = f'backbone/fire{fire}'
            rules += conv(f'features.{place}.squeeze', f'{ours}/squeeze')
            rules += conv(f'features.{place}.expand1x1', f'{ours}/expand1')
            rules += conv(f'features.{place}.expand3x3', f'{ours}/expand3')
            place, fire = place + 1, fire + 1
    return tuple(rules)


def _ncnn(backbone: SqueezeNet | None) -> tuple[Rule, ...]:
    def conv_rules(theirs: str, ours: str, layout: Layout = OIHW) -> tuple[Rule, ...]:
        return (
            Rule(f'{theirs}_w', f'params/backbone/{ours}/kernel', layout),
            Rule(f'{theirs}_b', f'params/backbone/{ours}/bias', SAME),
        )

    return (
        *conv_rules('conv1', 'stem', _FROM_BGR),
        *conv_rules('fire{i}_squeeze1x1', 'fire{i}/squeeze'),
        *conv_rules('fire{i}_expand1x1', 'fire{i}/expand1'),
        *conv_rules('fire{i}_expand3x3', 'fire{i}/expand3'),
        *_classifier(backbone or SqueezeNet(), 'conv10_w', 'conv10_b'),
    )


FAMILIES = (
    Family(
        SqueezeNet,
        (
            Origin('torchvision', r'features\.3\.squeeze\.weight', _torchvision),
            Origin('ncnn', r'fire2_squeeze1x1_w', _ncnn),
        ),
        fits=lambda _: (stem_fit('backbone/stem'),),
    ),
)
# The known files are at no hub: torchvision's own server and nihui/ncnn-assets have them.
CATALOGUE = {}
