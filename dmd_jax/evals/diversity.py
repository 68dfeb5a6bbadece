"""The diversity of generated images: the mean distance by LPIPS of pairs of them,

    diversity = mean over pairs i != j of LPIPS(x_i, x_j),

as in Table 6 of DMD2 (arXiv 2405.14867).
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dmd_jax import features, sharding
from dmd_jax.models import lpips as lpips_lib
from dmd_jax.weights import lpips, state_dict


class Diversity(NamedTuple):
    """A measure of diversity: `(images, pairs, seed) -> mean distance`.

    Attributes:
      digest: the digest of the weights, and of the size to which images are resized.
      distances: `(x [N, H, W, C], y [N, H, W, C]) -> distances [N]`, numpy.
      batch_size: pairs in a batch, over all devices.
    """

    digest: str
    distances: Callable
    batch_size: int

    def __call__(self, images: np.ndarray, pairs: int, seed: int) -> float:
        """Returns the mean distance of random pairs of different images.

        No pair is used twice. If there are no more than `pairs`, all pairs are used.

        Args:
          images: [N, H, W, C], bytes or floats in [-1, 1].
          pairs: how many pairs.
          seed: the seed of their choice.

        Raises:
          ValueError: there are fewer than two images, or no pair is asked for.
        """
        chosen = draw_pairs(len(images), pairs, seed)
        distances = []
        for start in range(0, len(chosen), self.batch_size):
            i, j = chosen[start : start + self.batch_size].T
            distances.append(self.distances(_floats(images[i]), _floats(images[j])))
        return float(np.concatenate(distances).mean(dtype=np.float64))


def make(
    parallel: sharding.Parallel,
    *,
    batch_size: int,
    weights: str | os.PathLike,
    size: int | None = None,
) -> Diversity:
    """Returns the measure by VGG16 with average pools, see dmd_jax/models/vgg.py.

    Args:
      parallel: the devices.
      batch_size: pairs in a batch, over all devices.
      weights: the file of LPIPS' weights, see dmd_jax/weights/lpips.py.
      size: height and width, in pixels, to which images are resized bilinearly; None = they stay as
        they are.

    Raises:
      ValueError: the file is missing or holds something else, or the devices cannot share such a
        batch.
    """
    network = lpips_lib.make(size=size)
    params = state_dict.from_torch(lpips.read(weights), network.abstract)

    def apply(params, batch):
        return network.apply(params, *batch)

    run = parallel.in_batches("diversity batch_size", apply, batch_size)
    placed = sharding.place(params, parallel.replicated)

    def distances(x, y):
        return run(placed, (x, y))

    return Diversity(features.digest(params, "lpips", size), distances, batch_size)


def draw_pairs(count: int, pairs: int, seed: int) -> np.ndarray:
    """Draws different pairs i < j of `count` images.

    Returns:
      [P, 2], P at most `pairs`.

    Raises:
      ValueError: there are fewer than two images, or no pair is asked for.
    """
    if count < 2 or pairs < 1:
        raise ValueError(
            f"diversity needs at least 2 images and 1 pair, got {count} images and {pairs} pairs."
        )
    there = count * (count - 1) // 2
    if there > pairs:
        numbers = np.sort(np.random.default_rng(seed).choice(there, pairs, replace=False))
    else:
        numbers = np.arange(there)
    # The pairs have the numbers 0, 1, ... in the order (0, 1), (0, 2), (1, 2), (0, 3), ...
    second = ((1 + np.sqrt(1 + 8 * numbers)) / 2).astype(np.int64)
    return np.stack([numbers - second * (second - 1) // 2, second], axis=1)


def _floats(images):
    return images / np.float32(127.5) - 1 if images.dtype == np.uint8 else images
