"""The modules that an adapter changes unless it is told: by family, as the papers do where they say.

Attention's queries and values in transformers (Hu et al. 2021, arXiv:2106.09685, sec. 4.2); in convolutional networks the
convolutions within the blocks, but neither the first one, whose channels are colours, nor depthwise ones and gates, whose
matrices are of low rank as they are; dense layers elsewhere.
"""

from tl_jax.errors import UserError

QUERY_VALUE = r'backbone/(.*/)?(attention|cross)/(query|value)'
CONVOLUTIONS = r'backbone/(.*/)?(conv\d?|expand\d?|project|pointwise|squeeze)(?<!stem/conv)'

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
            'VGG',
        ),
        CONVOLUTIONS,
    ),
    'ConvNeXt': r'backbone/stage\d+/block\d+/dense\d',
    **dict.fromkeys(('ConvNet', 'DoodleNet'), r'backbone/(conv|dense)\d*'),
    'TextBag': r'backbone/dense\d+',
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
