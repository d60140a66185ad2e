"""The modules that an adapter changes unless it is told: by family, as the papers do where they say.

Attention's queries and values in transformers (Hu et al. 2021, arXiv:2106.09685, sec. 4.2); in convolutional networks the
convolutions, but neither the one that reads the image, whose channels are colours, nor shortcuts, nor depthwise ones and
squeeze-excite gates, whose matrices are of low rank as they are; dense layers elsewhere.
"""

from tl_jax.errors import UserError

QUERY_VALUE = r'backbone/(.*/)?(attention|cross)/(query|value)'
CONVOLUTIONS = (
    r'backbone/(?!stem/conv1?$|conv2d_1a_3x3/)(.*/)?(conv\d?|expand\d?|project|pointwise|squeeze)(?<!/se/expand)'
)

# Class of the backbone -> regex of module paths.
TARGETS = {
    **dict.fromkeys(
        (
            'Bert',
            'Clip',
            'Deberta',
            'GPT2',
            'ImageTower',
            'Llama',
            'Swin',
            'T5',
            'TextTower',
            'TextTransformer',
            'VisionTransformer',
        ),
        QUERY_VALUE,
    ),
    **dict.fromkeys(
        (
            'BiT',
            'DSCNN',
            'DenseNet',
            'EfficientNet',
            'InceptionV3',
            'MobileNetV1',
            'MobileNetV2',
            'MobileNetV3',
            'ResNet',
            'ResNet8',
            'SqueezeNet',
            'WideResNet',
        ),
        CONVOLUTIONS,
    ),
    'ConvNeXt': r'backbone/stage\d+/block\d+/dense\d',
    **dict.fromkeys(('ConvNet', 'DoodleNet'), r'backbone/(?!conv1$)(conv|dense)\d*'),
    'TextBag': r'backbone/dense\d+',
    'VGG': r'backbone/(?!stage1/conv1$)stage\d/conv\d',
}


def default_targets(family: str, field: str) -> str:
    """The regex of a family's own.

    Args:
      family: class of the backbone.
      field: where a rule would stand in the config.

    Raises:
      UserError: it has none.
    """
    if family not in TARGETS:
        raise UserError(f"{field}.targets: is required, as {family} has no default; such as targets='backbone/dense.*'")
    return TARGETS[family]
