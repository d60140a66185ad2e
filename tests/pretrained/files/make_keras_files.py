"""How tests/pretrained/files/keras3.{keras,h5} were made: Keras 3.15.1 on its JAX backend."""

import os
import zlib

os.environ['KERAS_BACKEND'] = 'jax'
import keras
import numpy as np
from keras import layers as L

x = inputs = keras.Input((8, 8, 3), name='image')
x = L.Conv2D(2, 3, name='stem')(x)
x = L.DepthwiseConv2D(3, use_bias=False, name='depth')(x)
x = L.BatchNormalization(scale=False, name='norm')(x)
x = keras.Sequential([L.Input((4, 4, 2)), L.Conv2D(2, 1, name='b'), L.Conv2D(2, 1, name='a')], name='inner')(x)
x = L.Dropout(0.5, name='drop')(x)
x = L.Reshape((16, 2))(x)
x = L.LSTM(1, name='rnn')(x)
x = L.Dense(2, name='head')(x)
model = keras.Model(inputs, x)
for w in model.weights:
    if w.dtype == 'float32':
        w.assign(np.arange(w.value.size).reshape(w.shape) + zlib.crc32(w.path.encode()) % 97)
print([(w.path, w.shape) for w in model.weights])
model.save('keras3.keras')
model.save('keras3.h5')
