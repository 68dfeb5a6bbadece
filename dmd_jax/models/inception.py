"""Inception-v3 of the FID (Szegedy et al., arXiv 1512.00567; Heusel et al., arXiv 1706.08500).

It is the TensorFlow graph of 2015-12-05. Attribute names are the keys of its translation in
pytorch-fid, of which `fc` and `num_batches_tracked` are left out. Unlike in other Inception-v3s,
average pools do not count padding, and the pool of the last block takes the maximum.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmd_jax.models import layers

SIZE = 299  # height and width of the images that the network was trained on [pixels]
INITIALIZERS = (
    (r"conv\.kernel$", layers.xavier_uniform()),
    (r"(scale|var)$", layers.ones),
    (r"(bias|mean)$", layers.zeros),
)


class Conv(nnx.Module):
    """Convolution, batch normalisation with fixed statistics, ReLU."""

    def __init__(self, c_in, c_out, size, *, rngs, dtype, strides=1, padding="SAME"):
        size = (size, size) if isinstance(size, int) else size
        self.conv = nnx.Conv(
            c_in, c_out, size, strides, padding=padding, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.bn = nnx.BatchNorm(
            c_out, use_running_average=True, epsilon=1e-3, dtype=dtype, rngs=rngs
        )

    def __call__(self, x):
        return nnx.relu(self.bn(self.conv(x)))


class BlockA(nnx.Module):
    """A block at 35 x 35 pixels, for images of full size."""

    def __init__(self, c_in, c_pool, *, conv):
        self.branch1x1 = conv(c_in, 64, 1)
        self.branch5x5_1 = conv(c_in, 48, 1)
        self.branch5x5_2 = conv(48, 64, 5)
        self.branch3x3dbl_1 = conv(c_in, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3)
        self.branch_pool = conv(c_in, c_pool, 1)

    def __call__(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return _join(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            double,
            self.branch_pool(_average(x)),
        )


class BlockB(nnx.Module):
    """The block from 35 x 35 to 17 x 17 pixels."""

    def __init__(self, c_in, *, conv):
        self.branch3x3 = conv(c_in, 384, 3, strides=2, padding="VALID")
        self.branch3x3dbl_1 = conv(c_in, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3, strides=2, padding="VALID")

    def __call__(self, x):
        return _join(
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            _halve(x),
        )


class BlockC(nnx.Module):
    """A block at 17 x 17 pixels."""

    def __init__(self, c, *, conv):
        self.branch1x1 = conv(768, 192, 1)
        self.branch7x7_1 = conv(768, c, 1)
        self.branch7x7_2 = conv(c, c, (1, 7))
        self.branch7x7_3 = conv(c, 192, (7, 1))
        self.branch7x7dbl_1 = conv(768, c, 1)
        self.branch7x7dbl_2 = conv(c, c, (7, 1))
        self.branch7x7dbl_3 = conv(c, c, (1, 7))
        self.branch7x7dbl_4 = conv(c, c, (7, 1))
        self.branch7x7dbl_5 = conv(c, 192, (1, 7))
        self.branch_pool = conv(768, 192, 1)

    def __call__(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return _join(self.branch1x1(x), single, double, self.branch_pool(_average(x)))


class BlockD(nnx.Module):
    """The block from 17 x 17 to 8 x 8 pixels."""

    def __init__(self, *, conv):
        self.branch3x3_1 = conv(768, 192, 1)
        self.branch3x3_2 = conv(192, 320, 3, strides=2, padding="VALID")
        self.branch7x7x3_1 = conv(768, 192, 1)
        self.branch7x7x3_2 = conv(192, 192, (1, 7))
        self.branch7x7x3_3 = conv(192, 192, (7, 1))
        self.branch7x7x3_4 = conv(192, 192, 3, strides=2, padding="VALID")

    def __call__(self, x):
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return _join(self.branch3x3_2(self.branch3x3_1(x)), seven, _halve(x))


class BlockE(nnx.Module):
    """A block at 8 x 8 pixels; `pool` is its kind of pooling."""

    def __init__(self, c_in, *, pool, conv):
        self.pool = pool
        self.branch1x1 = conv(c_in, 320, 1)
        self.branch3x3_1 = conv(c_in, 384, 1)
        self.branch3x3_2a = conv(384, 384, (1, 3))
        self.branch3x3_2b = conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = conv(c_in, 448, 1)
        self.branch3x3dbl_2 = conv(448, 384, 3)
        self.branch3x3dbl_3a = conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = conv(384, 384, (3, 1))
        self.branch_pool = conv(c_in, 192, 1)

    def __call__(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        single = _join(self.branch3x3_2a(single), self.branch3x3_2b(single))
        double = _join(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double))
        return _join(self.branch1x1(x), single, double, self.branch_pool(self.pool(x)))


class Inception(nnx.Module):
    """See `make`."""

    def __init__(self, *, rngs, dtype):
        conv = functools.partial(Conv, rngs=rngs, dtype=dtype)
        self.Conv2d_1a_3x3 = conv(3, 32, 3, strides=2, padding="VALID")
        self.Conv2d_2a_3x3 = conv(32, 32, 3, padding="VALID")
        self.Conv2d_2b_3x3 = conv(32, 64, 3)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, padding="VALID")
        self.Mixed_5b = BlockA(192, 32, conv=conv)
        self.Mixed_5c = BlockA(256, 64, conv=conv)
        self.Mixed_5d = BlockA(288, 64, conv=conv)
        self.Mixed_6a = BlockB(288, conv=conv)
        self.Mixed_6b = BlockC(128, conv=conv)
        self.Mixed_6c = BlockC(160, conv=conv)
        self.Mixed_6d = BlockC(160, conv=conv)
        self.Mixed_6e = BlockC(192, conv=conv)
        self.Mixed_7a = BlockD(conv=conv)
        self.Mixed_7b = BlockE(1280, pool=_average, conv=conv)
        self.Mixed_7c = BlockE(2048, pool=_maximum, conv=conv)

    def __call__(self, x):
        x = _halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.astype(jnp.float32).mean(axis=(1, 2))


def _join(*branches):
    return jnp.concatenate(branches, axis=-1)


def _halve(x):
    return nnx.max_pool(x, (3, 3), (2, 2), "VALID")


def _maximum(x):
    return nnx.max_pool(x, (3, 3), (1, 1), "SAME")


def _average(x):
    return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def make(*, dtype: str = "float32") -> layers.Network:
    """Returns the network `(params, x [B, H, W, 3]) -> features [B, 2048]`.

    x comes from one of the functions below; H and W are at least 75.
    """
    return layers.functional(
        lambda rngs: Inception(rngs=rngs, dtype=jnp.dtype(dtype)), INITIALIZERS
    )


def tensorflow_input(images):
    """Prepares images [B, H, W, 3] of 0 to 255 as the original graph does: TensorFlow 1's resizing.

    The FIDs of StyleGAN and EDM are computed so.
    """
    return (_resize(images, half_pixel=False) - 128) / 128


def pytorch_fid_input(images):
    """Prepares images [B, H, W, 3] of 0 to 255 as pytorch-fid does."""
    return _resize(images, half_pixel=True) / 127.5 - 1


def _resize(images, *, half_pixel):
    """Resizes bilinearly, without antialiasing.

    Pixel i lies at i * scale of the original, as in TensorFlow 1, or with `half_pixel` at
    (i + 1/2) * scale - 1/2.
    """
    rows, columns = (_interpolation(n, half_pixel) for n in images.shape[1:3])
    return jnp.einsum(
        "ih,bhwc,jw->bijc", rows, jnp.asarray(images, jnp.float32), columns, precision="highest"
    )


def _interpolation(size, half_pixel):
    """Returns the weights of `size` pixels in each of SIZE pixels: [SIZE, size]."""
    shift = 0.5 * half_pixel
    position = np.clip((np.arange(SIZE) + shift) * size / SIZE - shift, 0, size - 1)
    return np.maximum(1 - np.abs(position[:, None] - np.arange(size)), 0).astype(np.float32)
