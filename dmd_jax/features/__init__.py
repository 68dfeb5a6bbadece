"""Feature networks, in whose features two sets of images are compared."""

import hashlib
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from dmd_jax import sharding
from dmd_jax.data import pixels
from dmd_jax.weights import digests, pickles, published, state_dict


class Features(NamedTuple):
    """One feature network.

    Attributes:
      name: such as "mlp@8".
      digest: the digest of its parameters and of its preprocessing.
      extract: `(images [N, H, W, C], bytes or in [-1, 1]) -> float32 [N, D]`, numpy.
      predict: `(images) -> labels [N]`; None without a classifier.
    """

    name: str
    digest: str
    extract: Callable
    predict: Callable | None = None

    @property
    def frechet(self) -> str:
        """The name of the Frechet distance: FID only for the Inception network of 2015."""
        return "FID" if self.name == "inception" else f"FD-{self.name}"

    @property
    def kernel(self) -> str:
        """The name of the kernel distance: KID only for the Inception network of 2015."""
        return "KID" if self.name == "inception" else f"KD-{self.name}"


def digest(params: dict, *settings) -> str:
    """Returns a digest of what features depend on: parameters, and settings such as the resize."""
    return hashlib.sha256(f"{digests.of_params(params)} {settings}".encode()).hexdigest()[:16]


def read_params(path: str | os.PathLike, abstract: dict, *, without: str) -> dict:
    """Reads the parameters of a network from a PyTorch file.

    Args:
      path: the file.
      abstract: the shapes of the parameters.
      without: a regex; tensors whose names it finds are left out, as counters are.

    Raises:
      ValueError: the file is missing, damaged or of another network.
    """
    tensors = pickles.read(published.find(path))
    left_out = re.compile(rf"{without}|num_batches_tracked$")
    kept = {name: a for name, a in tensors.items() if not left_out.search(name)}
    try:
        return state_dict.from_torch(kept, abstract)
    except ValueError as error:
        raise ValueError(
            f"{path} holds another network: {str(error)[:300]} ...; give the right file."
        ) from error


def of_network(
    name: str,
    apply: Callable,
    params: dict,
    parallel: sharding.Parallel,
    batch_size: int,
    *settings,
) -> Features:
    """Returns the features of a network, computed on all devices.

    Args:
      name: of the features.
      apply: `(params, bytes [B, H, W, 3] as float32 from 0 to 255) -> [B, D]`.
      params: of the network.
      parallel: the devices.
      batch_size: images in a batch, over all devices.
      *settings: what the features depend on, besides parameters and name.
    """

    def extract(params, images):
        images = images.astype(jnp.float32)
        return apply(params, jnp.repeat(images, 3 // images.shape[-1], axis=-1)).astype(jnp.float32)

    run = parallel.in_batches("features batch_size", extract, batch_size)
    params = sharding.place(params, parallel.replicated)

    def of_bytes(images):
        return run(params, pixels.to_uint8(images))

    return Features(name, digest(params, name, *settings), of_bytes)
