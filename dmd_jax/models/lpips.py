"""LPIPS (Zhang et al., arXiv 1801.03924) by VGG16 (Simonyan and Zisserman, arXiv 1409.1556), with average instead of maximum pooling.

Attribute names are torchvision's keys for the trunk and those of the package lpips for the linear weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmd_jax.models import layers

CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # of ImageNet
INITIALIZERS = (
    (r"features\..*kernel$", layers.xavier_uniform(2**0.5)),
    (r"bias$", layers.zeros),
    (r"lin.*kernel$", lambda rng, shape: np.full(shape, 1 / shape[2])),
)


class LPIPS(nnx.Module):
    """See `make` for the arguments."""

    def __init__(self, *, rngs, size, dtype):
        self.size = size
        convs, stages, c_in, layer = {}, [], 3, 0
        for i, widths in enumerate(CHANNELS):
            stages.append(())
            for c in widths:
                convs[str(layer)] = nnx.Conv(c_in, c, (3, 3), dtype=dtype, rngs=rngs)
                stages[-1] += (str(layer),)
                c_in, layer = c, layer + 2  # convolution, ReLU
            layer += 1  # pool
            linear = nnx.Conv(c_in, 1, (1, 1), use_bias=False, rngs=rngs)
            setattr(self, f"lin{i}", nnx.Dict(model=nnx.Dict({"1": linear})))
        self.features, self.stages = nnx.Dict(convs), tuple(stages)

    def __call__(self, x, y):
        distance = 0.0
        for i, (a, b) in enumerate(
            zip(self._taps(x), jax.lax.stop_gradient(self._taps(y)), strict=True)
        ):
            weights = getattr(self, f"lin{i}").model["1"].kernel[...][0, 0, :, 0]
            distance += jnp.dot(((a - b) ** 2).mean(axis=(1, 2)), weights, precision="highest")
        return distance

    def _taps(self, x):
        """The channels' directions at the end of each stage, float32."""
        x = x.astype(jnp.float32)
        if self.size:
            b, _, _, c = x.shape
            x = jax.image.resize(x, (b, self.size, self.size, c), "bilinear", antialias=False)
        x = ((x + 1) / 2 - MEAN[None, None, None]) / STD[
            None, None, None
        ]  # grey images become three channels
        taps = []
        for stage in self.stages:
            if taps:
                x = layers.downsample(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])
            for name in stage:
                x = nnx.relu(self.features[name](x))
            taps.append(_normalize(x.astype(jnp.float32)))
        return taps


def _normalize(x):
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    norm = jnp.sqrt(
        jnp.where(square > 0, square, 1)
    )  # the gradient of a pixel without features is not NaN
    return x / (norm + 1e-10)


def make(*, size: int | None = 224, dtype: str = "float32") -> layers.Network:
    """The network `(params, x [B, H, W, C], y [B, H, W, C]) -> distance [B]` of images in [-1, 1] with one or three channels.

    `y` is the target: it gets no gradient.

    Args:
      size: height and width to which both are resized, bilinearly; None leaves them as they are.
      dtype: of the convolutions.
    """
    return layers.functional(
        lambda rngs: LPIPS(rngs=rngs, size=size, dtype=jnp.dtype(dtype)), INITIALIZERS
    )
