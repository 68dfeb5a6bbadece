"""A feature network, the space in which two sets of images are compared."""

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
      digest: of its parameters, and of what it does to images before.
      extract: images [N, H, W, C], bytes or in [-1, 1], to float32 [N, D], numpy.
      predict: images to labels [N]; None where there is no classifier.
    """

    name: str
    digest: str
    extract: Callable
    predict: Callable | None = None

    @property
    def frechet(self) -> str:
        """The name of the Frechet distance: FID is the one in the features of the Inception network
        of 2015, and no other.
        """
        return "FID" if self.name == "inception" else f"FD-{self.name}"

    @property
    def kernel(self) -> str:
        """The name of the kernel distance."""
        return "KID" if self.name == "inception" else f"KD-{self.name}"


def digest(params: dict, *settings) -> str:
    """Of everything that features follow from: parameters, and settings such as the way images are
    resized.
    """
    return hashlib.sha256(f"{digests.of_params(params)} {settings}".encode()).hexdigest()[:16]


def read_params(path: str | os.PathLike, abstract: dict, *, without: str) -> dict:
    """Parameters of a network out of a PyTorch file, but for the tensors whose names the regex
    `without` finds and for counters.

    Raises:
      ValueError: the file is missing, damaged or of another network.
    """
    tensors = pickles.read(published.find(path))
    kept = {
        k: a for k, a in tensors.items() if not re.search(rf"{without}|num_batches_tracked$", k)
    }
    try:
        return state_dict.from_torch(kept, abstract)
    except ValueError as error:
        raise ValueError(
            f"{path} holds another network: {str(error)[:300]} ...; name the right file."
        ) from error


def of_network(
    name: str,
    apply: Callable,
    params: dict,
    parallel: sharding.Parallel,
    batch_size: int,
    *settings,
) -> Features:
    """The features of a network `(params, bytes [B, H, W, 3] as float32 from 0 to 255) -> [B, D]`,
    over all devices.

    `settings` are what its features depend on besides its parameters and its name.
    """

    def extract(params, images):
        images = images.astype(jnp.float32)
        return apply(params, jnp.repeat(images, 3 // images.shape[-1], axis=-1)).astype(jnp.float32)

    run, params = (
        parallel.in_batches("features batch_size", extract, batch_size),
        sharding.place(params, parallel.replicated),
    )

    def of_bytes(images):
        return run(params, pixels.to_uint8(images))

    return Features(name, digest(params, name, *settings), of_bytes)
