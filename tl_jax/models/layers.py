"""Convolution, batch normalisation and pooling, shared by every model. Layout NHWC; parameters and statistics float32.

XLA's convolution on CPU is good for large maps, and up to a hundred times slower than a matrix product for small ones, for
depthwise kernels and for many gradients. So on CPU `Conv` picks by shape (`choose_forms`) among five forms of the same sum,
for the output and for each of the two gradients on its own:

  'xla'      `jax.lax.conv_general_dilated`;
  'patches'  the shifted, strided views of the input side by side, then one matrix product: rows · columns of the kernel times
             the output's positions times the input's channels in memory. For a 1×1 kernel it is a plain product, no copy;
  'taps'     the sum over kernel positions of that position's view @ its matrix, or times its vector if depthwise: one view in
             memory at a time, but the output is read and written as often as the kernel has positions;
  'rows'     the same for depthwise kernels, a row of one image's output at a time in a loop: as a kernel's gradient its sums
             stay in the cache, where XLA would write every view's product to memory before it adds it up;
  'images'   the same for dense kernels, a few images at a time: 'patches' that fit the cache, or one image by 'taps'.

On GPU and TPU the form is always 'xla'. The platform is `jax.default_backend()`, read while tracing, and not
`jax.lax.platform_dependent`, whose branches would each keep their residuals for the gradient. A computation pinned to another
platform gets a form that may be slow there, never a wrong one; `Conv(form=…)` sets it by hand.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from tl_jax.errors import UserError

MAX_PATCH_BYTES = 64 * 2**20
# What 'images' takes at a time, about a core's second cache; one image whose patches are larger than four of these goes by taps.
CACHED_PATCH_BYTES = 2**20


class Window(NamedTuple):
    """The geometry of a convolution, all of it static. `padding` is ((top, bottom), (left, right))."""

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int


class Forms(NamedTuple):
    """How to compute the output, and how its gradients with respect to the input and the kernel."""

    output: str
    input: str
    kernel: str


def choose_forms(x_shape: Sequence[int], kernel_shape: Sequence[int], window: Window) -> Forms:
    """Returns the fastest forms on a CPU for these shapes.

    Milliseconds for the output, the input's gradient and the kernel's (benchmarks/conv.py; two AVX-512 cores, jax 0.10.2):

      kernel, map, channels, batch              xla                patches               taps
      1×1,   56, 64→256, 16                78    64    262      38    15    22      32    11    19
      1×1,   14, 1024→256, 16              20    16     70      15    14    21      13    11    17
      3×3,    2, 512→512, 32              273   351      6       7     6     5       7     7     6
      3×3/2,  4, 256→512, 32                4    86      5       3     2     3       3     4     5
      3×3,    4, 256→256, 32                6     7      6       7     4     7       6     6     7
      3×3,    7, 512→512, 16               47    53     37      40    24    26      28    26    28
      3×3,   14, 256→256, 16               31    30     77      71    31    70      50    34    43
      3×3,   16, 64→64, 32                 10    11     28      11     7    16       9     9    18
      3×3,   56, 64→64, 16                 63    53    331     253   168   326     212   200   291
      3×3,   32, 16→16, 128                26    26     48     157   101   177     127    97   122
      7×7/2, 64, 3→64, 32                  10    33     30      38    34    36     405    86    51
      3×3,   56, 144 depthwise, 16        600   679   2776    1884     9  1791      21    16   345
      3×3,    7, 960 depthwise, 16         44    40    357     111     2    71       2     1    12
      3×3,   14, 256→256, 32 groups, 16    25    27  10276     109    23    98     132    24    47

    'rows' for a depthwise kernel's gradient, on one core, beside 'taps' in the same run: 56, 144: 61 and 249; 7, 960: 4 and 11.
    'images' for a dense kernel's, on one AVX2 core beside xla and taps: 14, 256: 78, 163, 116; 28, 128→128, 16: 114, 172, 154;
    56, 64, 16: 133, 726, 256; 32, 16, 64: 15, 21, 66; 7×7/2, 64: 28, 157, 43; 8, 256, 32: 56, 74, 44.

    Args:
      x_shape: [batch, height, width, channels].
      kernel_shape: [rows, columns, channels / groups, features].
      window: the geometry.
    """
    batch, *size, channels = x_shape
    *kernel_size, depth, _ = kernel_shape
    positions = math.prod(_output_size(size, kernel_size, window))
    patch_bytes = batch * _patch_bytes((*size, channels), kernel_size, window)
    if math.prod(kernel_size) == 1:
        return Forms('patches', 'patches', 'patches')
    if depth == 1 and window.groups > 1:
        return Forms('taps', 'taps', 'rows')
    if window.groups > 1:
        return Forms('xla', 'xla', 'taps')
    if positions <= 49:
        form = 'patches' if patch_bytes <= MAX_PATCH_BYTES else 'taps'
        return Forms(form, form, form)
    return Forms('xla', 'xla', 'taps' if depth >= 64 and positions <= 100 else 'images')


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def convolve(
    x: Float[Array, 'batch height width channels'],
    kernel: Float[Array, 'rows columns depth features'],
    window: Window,
    forms: Forms,
    dtype: Any = jnp.float32,
) -> Float[Array, 'batch out_height out_width features']:
    """Convolves with the named forms, differentiably to any order and in both modes.

    A convolution is linear in each operand, so its derivative is a sum of two convolutions, and each may be computed in a form
    of its own, which reverse mode transposes. The operands of matrix products are cast to `dtype`; all else is in `x`'s.
    """
    return _FORMS[forms.output](x, kernel, window, dtype)


@functools.partial(convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(window, forms, dtype, primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    y = convolve(x, kernel, window, forms, dtype)
    dy = jnp.zeros_like(y)
    if not isinstance(dx, SymbolicZero):
        dy += _FORMS[forms.input](dx, kernel, window, dtype)
    if not isinstance(dkernel, SymbolicZero):
        dy += _FORMS[forms.kernel](x, dkernel, window, dtype)
    return y, dy


def _xla(x, kernel, window, dtype):
    del dtype  # on CPU a convolution in bfloat16 is slower than in float32; elsewhere `x` has the right type already
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=window.groups,
    )


def _patches(x, kernel, window, dtype):
    return _product(jnp.concatenate(_views(x, kernel.shape, window), -1), kernel, window.groups, dtype)


def _taps(x, kernel, window, dtype):
    taps = kernel.reshape(-1, *kernel.shape[2:])
    views = _views(x, kernel.shape, window)
    products = [_product(view, tap, window.groups, dtype) for view, tap in zip(views, taps, strict=True)]
    return functools.reduce(jnp.add, products)


def _rows(x, kernel, window, dtype):
    del dtype  # there is no matrix product
    (rows, columns), stride, step = kernel.shape[:2], window.strides[0], window.dilation[0]
    height, width = _output_size(x.shape[1:3], (rows, columns), window)
    # A tap of its own for each column: a loop adds up their gradients as they come, and the columns' sum is taken once, after it.
    taps = [jnp.broadcast_to(tap, (width, *tap.shape)) for tap in kernel.reshape(rows * columns, window.groups, -1)]
    bare = window._replace(padding=((0, 0), (0, 0)))
    # What a gradient needs of an image is the image: views kept for it would be as many images as the kernel has positions.
    again = functools.partial(jax.checkpoint, prevent_cse=False)

    @again
    def row_of(taps, image, number):
        strip = lax.dynamic_slice_in_dim(image, number * stride, (rows - 1) * step + 1)
        views = _views(strip[None], kernel.shape, bare)
        return functools.reduce(jnp.add, [view[0, 0] * tap for view, tap in zip(views, taps, strict=True)])

    @again
    def image_of(taps, image):
        return lax.map(lambda number: row_of(taps, image, number), jnp.arange(height))

    y = lax.map(lambda image: image_of(taps, image), jnp.pad(x, ((0, 0), *window.padding, (0, 0))))
    return y.reshape(*y.shape[:3], -1)


def _images(x, kernel, window, dtype):
    batch, patch_bytes = len(x), _patch_bytes(x.shape[1:], kernel.shape[:2], window)
    count = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * patch_bytes <= CACHED_PATCH_BYTES))
    form = _patches if patch_bytes <= 4 * CACHED_PATCH_BYTES else _taps

    # As in `_rows`, a gradient keeps the images and not their views.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def few(images, kernel):
        return form(images, kernel, window, dtype)

    y = lax.map(lambda images: few(images, kernel), x.reshape(-1, count, *x.shape[1:]))
    return y.reshape(batch, *y.shape[2:])


_FORMS = {'xla': _xla, 'patches': _patches, 'taps': _taps, 'rows': _rows, 'images': _images}


def _views(x, kernel_shape, window) -> list[Float[Array, 'batch out_height out_width groups depth']]:
    """The input as each kernel position sees it, row by row."""
    kernel_size = kernel_shape[:2]
    height, width = _output_size(x.shape[1:3], kernel_size, window)
    (row_stride, column_stride), (row_step, column_step) = window.strides, window.dilation
    x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    views = []
    for row, column in itertools.product(*map(range, kernel_size)):
        rows = slice(row * row_step, row * row_step + (height - 1) * row_stride + 1, row_stride)
        columns = slice(column * column_step, column * column_step + (width - 1) * column_stride + 1, column_stride)
        view = x[:, rows, columns]
        views.append(view.reshape(*view.shape[:3], window.groups, -1))
    return views


def _output_size(size: Sequence[int], kernel_size: Sequence[int], window: Window) -> list[int]:
    return [
        (n + sum(pad) - d * (k - 1) - 1) // s + 1
        for n, k, s, pad, d in zip(size, kernel_size, window.strides, window.padding, window.dilation, strict=True)
    ]


def _patch_bytes(image_shape: Sequence[int], kernel_size: Sequence[int], window: Window) -> int:
    *size, channels = image_shape
    return 4 * math.prod(_output_size(size, kernel_size, window)) * math.prod(kernel_size) * channels


def _product(views, matrices, groups, dtype):
    """[batch, height, width, groups, depth] @ [depth, groups · features] -> [batch, height, width, groups · features]."""
    *where, _, depth = views.shape
    matrices = matrices.reshape(depth, groups, -1)
    if depth == 1:
        return (views * matrices[0]).reshape(*where, -1)
    dot = functools.partial(jnp.einsum, preferred_element_type=views.dtype)
    # One axis of positions: for a gradient that contracts several, XLA would first transpose a copy of the views.
    views, matrices = views.reshape(-1, groups, depth).astype(dtype), matrices.astype(dtype)
    y = dot('ni,io->no', views[:, 0], matrices[:, 0]) if groups == 1 else dot('ngi,igo->ngo', views, matrices)
    return y.reshape(*where, -1)


def kaiming(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Normal with variance 2 / fan-out (He et al. 2015, arXiv:1502.01852), as torchvision starts its networks.

    Drawn in one dimension: XLA's CPU compiler takes four times as long over the same numbers in four.
    """
    fan_out = math.prod(shape) // shape[-2]
    return math.sqrt(2 / fan_out) * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


class Conv(nn.Module):
    """A 2-D convolution with the parameters of `nn.Conv` (`kernel` [rows, columns, depth, features], `bias`), and equal to it.

    Attributes:
      features: output channels.
      kernel_size: (rows, columns), or one number for both.
      strides: one number for both axes.
      padding: 'same' and 'valid' as XLA and TensorFlow have them, or as torch the rows and columns of zeros on every side, one
        number for both.
      dilation: spacing of the kernel's positions.
      groups: `feature_group_count`; equal to the input's channels for a depthwise convolution.
      use_bias: whether there is one.
      dtype: of the computation. On CPU only the operands of matrix products take it; what comes out is float32.
      form: 'xla', 'patches', 'taps' or 'images' for all three of output and gradients; None for the measured choice.
      kernel_init: of the kernel.
      reparametrize: the stored kernel -> the one to convolve with, such as the standardised one; None for the same.
    """

    features: int
    kernel_size: int | tuple[int, int] = 3
    strides: int = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32
    form: str | None = None
    kernel_init: nn.initializers.Initializer = kaiming
    reparametrize: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, 'batch height width channels']) -> Float[Array, 'batch rows columns features']:
        kernel_size = _pair(self.kernel_size)
        kernel_shape = (*kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param('kernel', self.kernel_init, kernel_shape, jnp.float32)
        if self.reparametrize is not None:
            kernel = self.reparametrize(kernel)
        padding = _pad_amounts(self.padding, x.shape[1:3], kernel_size, self.strides, self.dilation)
        window = Window(_pair(self.strides), padding, _pair(self.dilation), self.groups)
        if min(_output_size(x.shape[1:3], kernel_size, window)) < 1:
            size = ' × '.join(map(str, x.shape[1:3]))
            raise UserError(
                f'model: the map is {size} where {"/".join(self.path)} has a kernel of {kernel_size}; use larger images or'
                " padding='same'"
            )
        on_cpu = jax.default_backend() == 'cpu'
        if self.form:
            forms = Forms(self.form, self.form, self.form)
        else:
            forms = choose_forms(x.shape, kernel_shape, window) if on_cpu else Forms('xla', 'xla', 'xla')
        dtype = jnp.dtype(self.dtype)
        outer_dtype = jnp.float32 if on_cpu else dtype
        y = convolve(x.astype(outer_dtype), kernel.astype(outer_dtype), window, forms, dtype)
        if self.use_bias:
            y += self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32).astype(outer_dtype)
        return y


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _pad_amounts(padding, size, kernel_size, stride, dilation) -> tuple[tuple[int, int], tuple[int, int]]:
    if not isinstance(padding, str):
        rows, columns = _pair(padding)
        return (rows, rows), (columns, columns)
    reach = [dilation * (k - 1) + 1 for k in kernel_size]
    return tuple(map(tuple, lax.padtype_to_pads(size, reach, _pair(stride), padding.upper())))


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with torch's semantics and in float32.

    In training it normalises by the batch's mean and biased variance and moves the running statistics by
    `(1 - momentum) · (batch - running)`, where the batch's variance is the unbiased one. Under `jax.jit` over a mesh "the
    batch" is the global one. In evaluation it uses the running statistics.

    A `batch_stats` node that also holds a leaf named `frozen` (its value is of no account) is used as it stands, as in
    evaluation, and is not changed, whatever `train` says: that is how a training loop freezes a layer's statistics.

    Attributes:
      momentum: the share of the old running statistics that is kept; torch's `1 - momentum`.
      epsilon: added to the variance.
      dtype: of the output. On CPU it is float32 in any case, as elementwise bfloat16 is slow there.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, '*batch channels'], train: bool) -> Float[Array, '*batch channels']:
        shape = x.shape[-1:]
        scale = self.param('scale', nn.initializers.ones, shape, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, jnp.float32)
        running_var = self.variable('batch_stats', 'var', jnp.ones, shape, jnp.float32)
        x = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train and not self.has_variable('batch_stats', 'frozen'):
            axes = tuple(range(x.ndim - 1))
            mean, var = jnp.mean(x, axes), jnp.var(x, axes)
            count = x.size // x.shape[-1]
            if not self.is_initializing() and self.is_mutable_collection('batch_stats'):
                step = 1 - self.momentum
                running_mean.value += step * (mean - running_mean.value)
                running_var.value += step * (var * (count / max(count - 1, 1)) - running_var.value)
        y = (x - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
        return y if jax.default_backend() == 'cpu' else y.astype(self.dtype)


class SqueezeExcite(nn.Module):
    """Channels weighed by what they hold on average: `x · gate(expand(act(reduce(mean(x)))))` (Hu et al. 2017, arXiv:1709.01507).

    Attributes:
      width: channels between `reduce` and `expand`.
      activation: between them.
      gate: of the weights.
      dtype: of the computation.
    """

    width: int
    activation: Literal['relu', 'silu'] = 'relu'
    gate: Literal['sigmoid', 'hard_sigmoid'] = 'sigmoid'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, 'batch height width channels']) -> Float[Array, 'batch height width channels']:
        mean = jnp.mean(x, (1, 2), keepdims=True, dtype=jnp.float32)
        y = Conv(self.width, 1, use_bias=True, dtype=self.dtype, name='reduce')(mean)
        y = getattr(nn, self.activation)(y)
        y = Conv(x.shape[-1], 1, use_bias=True, dtype=self.dtype, name='expand')(y)
        return x * getattr(nn, self.gate)(y)


def max_pool(x: Float[Array, 'batch height width channels'], window: int, stride: int, padding: int = 0):
    """The maximum over windows of `window × window`, `padding` minus infinities on every side; ties: the first, as in torch.

    On CPU it is taken along the columns and then the rows, as an elementwise maximum of shifted views: XLA's gradient of a
    window reduction is several times slower there (112×112×64, batch 16: 665 ms forward and backward, against 160 ms).
    """
    _check_window(x, window, padding)
    if jax.default_backend() != 'cpu':
        return nn.max_pool(x, (window, window), (stride, stride), ((padding, padding),) * 2)
    for axis in (2, 1):
        x = _max_along(x, axis, window, stride, padding)
    return x


def avg_pool(x: Float[Array, 'batch height width channels'], window: int, stride: int, padding: int = 0):
    """The mean over windows of `window × window`, in which the `padding` zeros on every side count as values, as in torch.

    Sums are float32 whatever the map is.
    """
    _check_window(x, window, padding)
    total = x.astype(jnp.float32)
    for axis in (2, 1):
        total = functools.reduce(jnp.add, _shifted(total, axis, window, stride, padding, 0.0))
    return (total / window**2).astype(x.dtype)


def _check_window(x: Array, window: int, padding: int) -> None:
    if min(x.shape[1:3]) + 2 * padding < window:
        raise UserError(f'model: a map is smaller than the {window} × {window} window that pools it; use larger images')


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _max_along(x, axis, window, stride, padding):
    return functools.reduce(jnp.maximum, _shifted(x, axis, window, stride, padding, -jnp.inf))


@_max_along.defjvp
def _max_along_jvp(axis, window, stride, padding, primals, tangents):
    (x,), (dx,) = primals, tangents
    y = _max_along(x, axis, window, stride, padding)
    dy, taken = jnp.zeros_like(y), jnp.zeros(y.shape, bool)
    values = _shifted(x, axis, window, stride, padding, -jnp.inf)
    changes = _shifted(dx, axis, window, stride, padding, 0.0)
    for value, change in zip(values, changes, strict=True):
        first = (value == y) & ~taken
        dy, taken = dy + jnp.where(first, change, 0), taken | first
    return y, dy


def _shifted(x, axis, window, stride, padding, fill) -> list[Array]:
    pads = [(padding, padding, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)]
    x = lax.pad(x, jnp.asarray(fill, x.dtype), pads)
    count = (x.shape[axis] - window) // stride + 1
    return [lax.slice_in_dim(x, k, k + (count - 1) * stride + 1, stride, axis) for k in range(window)]
