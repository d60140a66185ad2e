"""Prepares a folder of images as a TFDS set: `python prepare.py IMAGES DATA_DIR FORMAT [tensorflow]`.

IMAGES holds SPLIT/CLASS/FILE.png|jpg. TFDS itself loads TensorFlow only where something asks for it, and array_record
files do not. With the last word the builder decodes by TensorFlow, as many public builders do. Prints as its last line
whether TensorFlow was loaded. Imports nothing of tl_jax.
"""

import sys
from pathlib import Path

import tensorflow_datasets as tfds


class LocalImages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')
    images: Path
    decode = staticmethod(lambda file: file)

    def _info(self) -> tfds.core.DatasetInfo:
        classes = sorted({folder.name for folder in self.images.glob('*/*')})
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {'image': tfds.features.Image(), 'label': tfds.features.ClassLabel(names=classes)}
            ),
        )

    def _split_generators(self, dl_manager):
        return {split.name: self._generate_examples(split) for split in sorted(self.images.iterdir())}

    def _generate_examples(self, split: Path):
        for file in sorted(split.glob('*/*')):
            key = f'{file.parent.name}/{file.name}'
            yield key, {'image': self.decode(file), 'label': file.parent.name}


def decode_by_tensorflow(file: Path):
    import tensorflow as tf

    return tf.io.decode_image(tf.io.read_file(str(file)), channels=3).numpy()


if __name__ == '__main__':
    LocalImages.images = Path(sys.argv[1])
    if sys.argv[4:] == ['tensorflow']:
        LocalImages.decode = staticmethod(decode_by_tensorflow)
    LocalImages(data_dir=sys.argv[2], file_format=sys.argv[3]).download_and_prepare()
    print(f'\ntensorflow loaded: {"tensorflow" in sys.modules}')
