"""LPIPS (Zhang et al., arXiv 1801.03924) by VGG16 (Simonyan and Zisserman, arXiv 1409.1556).

It has average instead of maximum pooling. Attribute names are torchvision's keys for the trunk and
those of the package lpips for the linear weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmd_jax.models import layers

CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet's channels
STD = np.array([0.229, 0.224, 0.225], np.float32)
INITIALIZERS = (
    (r"features\..*kernel$", layers.xavier_uniform(2**0.5)),
    (r"bias$", layers.zeros),
    (r"lin.*kernel$", lambda rng, shape: np.full(shape, 1 / shape[2])),
)


class LPIPS(nnx.Module):
    """See `make` for the arguments."""

    def __init__(self, *, rngs, size, dtype):
        self.size = size
        convs = {}
        stages = []
        c_in = 3
        layer = 0  # the number in torchvision's `features`
        for i, widths in enumerate(CHANNELS):
            stages.append(())
            for c in widths:
                convs[str(layer)] = nnx.Conv(c_in, c, (3, 3), dtype=dtype, rngs=rngs)
                stages[-1] += (str(layer),)
                c_in = c
                layer += 2  # convolution, ReLU
            layer += 1  # pool
            linear = nnx.Conv(c_in, 1, (1, 1), use_bias=False, rngs=rngs)
            setattr(self, f"lin{i}", nnx.Dict(model=nnx.Dict({"1": linear})))
        self.features = nnx.Dict(convs)
        self.stages = tuple(stages)

    def __call__(self, x, y):
        distance = 0.0
        taps = zip(self._taps(x), jax.lax.stop_gradient(self._taps(y)), strict=True)
        for i, (a, b) in enumerate(taps):
            weights = getattr(self, f"lin{i}").model["1"].kernel[...][0, 0, :, 0]
            distance += jnp.dot(((a - b) ** 2).mean(axis=(1, 2)), weights, precision="highest")
        return distance

    def _taps(self, x):
        """Returns the channels' directions at the end of each stage, float32."""
        x = x.astype(jnp.float32)
        if self.size:
            b, _, _, c = x.shape
            x = jax.image.resize(x, (b, self.size, self.size, c), "bilinear", antialias=False)
        mean, std = (a[None, None, None] for a in (MEAN, STD))
        x = ((x + 1) / 2 - mean) / std  # a single channel becomes three
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
    # Without `where` the gradient of a pixel without features would be NaN.
    norm = jnp.sqrt(jnp.where(square > 0, square, 1))
    return x / (norm + 1e-10)


def make(*, size: int | None = 224, dtype: str = "float32") -> layers.Network:
    """Returns the network `(params, x [B, H, W, C], y [B, H, W, C]) -> distance [B]`.

    Images are in [-1, 1], with one or three channels. `y` is the target, which gets no gradient.

    Args:
      size: height and width to which both are resized bilinearly [pixels]; None to leave them.
      dtype: of the convolutions.
    """
    return layers.functional(
        lambda rngs: LPIPS(rngs=rngs, size=size, dtype=jnp.dtype(dtype)), INITIALIZERS
    )
