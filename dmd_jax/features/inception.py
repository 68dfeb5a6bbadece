"""The features of FID: the last pool of the Inception network of 2015."""

import jax

from dmd_jax import features
from dmd_jax.features import resize as resize_lib
from dmd_jax.models import inception
from dmd_jax.weights import published


def clean_input(images: jax.Array) -> jax.Array:
    """Images [B, H, W, 3] of 0 to 255 as clean-fid takes them in its mode "clean" (Parmar et al.,
    arXiv 2104.11222): bicubic, no bytes.
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
    """FID's features.

    Args:
      parallel: the devices.
      batch_size: images, over all devices.
      weights: pytorch-fid's translation of them, pt_inception-2015-12-05-6726825d.pth.
      resize: to 299 pixels: "edm", in the original graph, of which EDM's and DMD's figures of
        CIFAR-10 and ImageNet are; "pytorch_fid"; or "clean", clean-fid's, of which those of COCO
        are.
      crop_to: before that the square in the middle becomes bytes of so many pixels by Lanczos'
        filter, 256 for COCO (Kang et al., arXiv 2303.05511); 0 = images stay as they are.

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
    # FID has but one network.
    name = (
        "inception" if found == published.SHA256[published.INCEPTION] else f"inception-{found[:8]}"
    )
    return features.of_network(name, apply, params, parallel, batch_size, resize, crop_to)
