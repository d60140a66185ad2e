"""MLPerf Tiny's networks in Keras' and TFLite's files, and DoodleNet in TensorFlow.js'."""

from tl_jax.models.tiny import DSCNN, DoodleNet, ResNet8
from tl_jax.pretrained.maps.mobilenet import keras_layer, keras_norm, numbered, tflite
from tl_jax.pretrained.names import Family, Origin, Rule, stem_fit


def _resnet8_convs(backbone: ResNet8 | None) -> list[str]:
    """The convolutions in the order of both files, where the shortcut follows the branch."""
    modules = ['stem']
    for i in range(1, len((backbone or ResNet8()).widths) + 1):
        modules += [f'stage{i}/conv1', f'stage{i}/conv2', *([f'stage{i}/shortcut'] if i > 1 else [])]
    return modules


def _resnet8_keras(backbone: ResNet8 | None) -> list[Rule]:
    modules = _resnet8_convs(backbone)
    rules = [rule for i, m in enumerate(modules) for rule in keras_layer(numbered('conv2d', i), f'backbone/{m}')]
    norms = ['stem_norm', *(m.replace('conv', 'norm') for m in modules[1:] if not m.endswith('shortcut'))]
    for i, module in enumerate(norms):
        rules += keras_norm(numbered('batch_normalization', i), f'backbone/{module}')
    return [*rules, *keras_layer('dense', 'head')]


def _ds_cnn_tflite(backbone: DSCNN | None) -> list[Rule]:
    blocks = range(1, (backbone or DSCNN()).depth + 1)
    return tflite(['stem', *(f'block{i}/{part}' for i in blocks for part in ('depthwise', 'pointwise'))])


def _doodlenet(backbone: DoodleNet | None) -> list[Rule]:
    count = 2 * len((backbone or DoodleNet()).widths)
    rules = [rule for i in range(count) for rule in keras_layer(numbered('conv2d', i), f'backbone/conv{i + 1}')]
    return [*rules, *keras_layer('dense', 'backbone/dense'), *keras_layer('dense_1', 'head')]


FAMILIES = (
    Family(
        ResNet8,
        (
            Origin('keras', r'batch_normalization_6/gamma', _resnet8_keras),
            Origin('tflite', r'05_conv_s2_act0/weight', lambda backbone: tflite(_resnet8_convs(backbone))),
        ),
        fits=lambda _: (stem_fit('backbone/stem'),),
    ),
    Family(DSCNN, (Origin('tflite', r'09_fc_s1_act0/weight', _ds_cnn_tflite),)),
    Family(
        DoodleNet,
        (Origin('tfjs', r'dense_1/kernel', _doodlenet),),
        fits=lambda _: (stem_fit('backbone/conv1'),),
    ),
)
CATALOGUE = {}  # The files are MLPerf Tiny's and ml5's, at no hub.
