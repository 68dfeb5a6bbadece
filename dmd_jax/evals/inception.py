"""The features of FID: the last pool of the Inception network of 2015."""

from dmd_jax.evals import features as features_lib
from dmd_jax.models import inception

INPUTS = {"edm": inception.tensorflow_input, "pytorch_fid": inception.pytorch_fid_input}


def make(parallel, *, batch_size: int, weights: str, resize: str = "edm") -> features_lib.Features:
    """FID's features.

    Args:
      parallel: the devices.
      batch_size: images, over all devices.
      weights: pytorch-fid's translation of them, pt_inception-2015-12-05-6726825d.pth.
      resize: "edm", the original graph's resizing to 299 pixels, of which EDM's and DMD's figures are; or "pytorch_fid".

    Raises:
      ValueError: the file is missing, damaged or of another network.
    """
    if resize not in INPUTS:
        raise ValueError(f"no resize {resize!r} for inception; there are: {', '.join(INPUTS)}.")
    network, prepare = inception.make(), INPUTS[resize]
    params = features_lib.read_params(weights, network.abstract, without=r"^fc\.")
    return features_lib.of_network("inception", lambda p, images: network.apply(p, prepare(images)), params, parallel, batch_size, resize)
