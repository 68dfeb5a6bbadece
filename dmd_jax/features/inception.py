"""The features of FID: the last pool of the Inception network of 2015."""

import jax

from dmd_jax import features
from dmd_jax.features import resize as resize_lib
from dmd_jax.models import inception
from dmd_jax.weights import published


def clean_input(images: jax.Array) -> jax.Array:
    """Resizes images [B, H, W, 3] of 0 to 255 as clean-fid does in its mode "clean".

    The filter is bicubic, and the result is not rounded to bytes.

    Source: Parmar et al., arXiv 2104.11222.
    """
    return (resize_lib.float_resize(images, inception.SIZE, "bicubic").clip(0, 255) - 128) / 128


INPUTS = {
    "edm": inception.tensorflow_input,
    "pytorch_fid": inception.pytorch_fid_input,
    "clean": clean_input,
}


def make(
    parallel, *, batch_size: int, weights: str, resize: str = "edm", crop_to: int = 0
) -> features.Features:
    """Returns FID's features.

    Args:
      parallel: the devices.
      batch_size: images in a batch, over all devices.
      weights: the file of pytorch-fid, pt_inception-2015-12-05-6726825d.pth.
      resize: how images are resized to 299 pixels: "edm", as in the original graph, which EDM's
        and DMD's figures for CIFAR-10 and ImageNet use; "clean", as in clean-fid, which the
        figures for COCO use; or "pytorch_fid".
      crop_to: before that, Lanczos' filter resizes the square in the middle to bytes with this
        height and width, 256 for COCO (Kang et al., arXiv 2303.05511); 0 = images stay as they
        are.

    Raises:
      ValueError: the file is missing, damaged or of another network; there is no such `resize`.
    """
    if resize not in INPUTS:
        raise ValueError(f"no resize {resize!r} for inception; there are: {', '.join(INPUTS)}.")
    network = inception.make()
    params = features.read_params(weights, network.abstract, without=r"^fc\.")

    def apply(params, images):
        if crop_to:
            images = resize_lib.bytes_resize(resize_lib.center_crop(images), crop_to, "lanczos")
        return network.apply(params, INPUTS[resize](images))

    found = published.sha256(weights)
    # Only the published weights may be called FID.
    name = f"inception-{found[:8]}"
    if found == published.SHA256[published.INCEPTION]:
        name = "inception"
    return features.of_network(name, apply, params, parallel, batch_size, resize, crop_to)
