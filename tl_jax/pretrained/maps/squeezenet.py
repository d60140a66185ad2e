"""SqueezeNets: torchvision's names, and Caffe's as ncnn's files have them.

Caffe's network takes BGR images of 0 … 255 less a mean. Reading turns its first kernel about, so that ours takes RGB,
prepared by `Preprocessing(227, CAFFE_MEAN, CAFFE_STD)`.
"""

from tl_jax.models.squeezenet import SqueezeNet
from tl_jax.pretrained.names import OIHW, SAME, Family, Layout, Origin, Rule, conv, nowhere, stem_fit

CAFFE_MEAN = (123 / 255, 117 / 255, 104 / 255)
CAFFE_STD = (1 / 255,) * 3
_FROM_BGR = Layout(lambda t: OIHW.read(t)[:, :, ::-1], lambda leaf: OIHW.write(leaf[:, :, ::-1]))


def _classifier(backbone: SqueezeNet, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The origin's classifier, `conv10`; a network without it has a linear head, which none of theirs is equal to."""
    return nowhere(rules) if backbone.classes is None else rules


def _other_features(backbone: SqueezeNet) -> str:
    return 'model.classes=None, where no ReLU precedes the mean,' if backbone.classes is None else ''


def _torchvision(backbone: SqueezeNet | None) -> tuple[Rule, ...]:
    backbone = backbone or SqueezeNet()
    rules = [*conv('features.0', 'backbone/stem'), *_classifier(backbone, conv('classifier.1', 'backbone/conv10'))]
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
        *_classifier(backbone or SqueezeNet(), conv_rules('conv10', 'conv10')),
    )


FAMILIES = (
    Family(
        SqueezeNet,
        (
            Origin('torchvision', r'features\.3\.squeeze\.weight', _torchvision, refuses_head=_other_features),
            Origin('ncnn', r'fire2_squeeze1x1_w', _ncnn, refuses_head=_other_features),
        ),
        fits=lambda _: (stem_fit('backbone/stem'),),
    ),
)
# The known files are at no hub: torchvision's own server and nihui/ncnn-assets have them.
CATALOGUE = {}
