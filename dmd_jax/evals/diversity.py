"""How much generated images differ: the mean distance by LPIPS of pairs of them (as Table 6 of
DMD2, arXiv 2405.14867, has it).

diversity = mean over pairs i != j of LPIPS(x_i, x_j)
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
      digest: of the weights, and of the size to which images are resized.
      distances: `(x [N, H, W, C], y [N, H, W, C]) -> distances [N]`, numpy.
      batch_size: pairs that the devices work on at once.
    """

    digest: str
    distances: Callable
    batch_size: int

    def __call__(self, images: np.ndarray, pairs: int, seed: int) -> float:
        """The mean distance of random pairs of different images, no pair twice; of all pairs, if
        there are no more than `pairs`.

        Args:
          images: [N, H, W, C], bytes or floats in [-1, 1].
          pairs: how many.
          seed: of their choice.

        Raises:
          ValueError: there are fewer than two images, or no pair is asked for.
        """
        chosen = draw_pairs(len(images), pairs, seed)
        blocks = (
            chosen[start : start + self.batch_size].T
            for start in range(0, len(chosen), self.batch_size)
        )
        return float(
            np.concatenate(
                [self.distances(_floats(images[i]), _floats(images[j])) for i, j in blocks]
            ).mean(dtype=np.float64)
        )


def make(
    parallel: sharding.Parallel,
    *,
    batch_size: int,
    weights: str | os.PathLike,
    size: int | None = None,
) -> Diversity:
    """The measure by VGG16, whose pools take averages, see dmd_jax/models/vgg.py.

    Args:
      parallel: the devices.
      batch_size: pairs, over all devices.
      weights: file of LPIPS' weights, see dmd_jax/weights/lpips.py.
      size: height and width to which images are resized, bilinearly; None leaves them as they are.

    Raises:
      ValueError: the file is missing or holds something else; the devices cannot share such a
        batch.
    """
    network = lpips_lib.make(size=size)
    params = state_dict.from_torch(lpips.read(weights), network.abstract)
    run = parallel.in_batches(
        "diversity batch_size", lambda params, batch: network.apply(params, *batch), batch_size
    )
    placed = sharding.place(params, parallel.replicated)
    return Diversity(
        features.digest(params, "lpips", size), lambda x, y: run(placed, (x, y)), batch_size
    )


def draw_pairs(count: int, pairs: int, seed: int) -> np.ndarray:
    """Different pairs i < j of `count` images, [P, 2], P at most `pairs`.

    Raises:
      ValueError: there are fewer than two images, or no pair is asked for.
    """
    if count < 2 or pairs < 1:
        raise ValueError(
            f"diversity needs at least 2 images and 1 pair, got {count} images and {pairs} pairs."
        )
    there = count * (count - 1) // 2
    numbers = (
        np.arange(there)
        if there <= pairs
        else np.sort(np.random.default_rng(seed).choice(there, pairs, replace=False))
    )
    # (0, 1), (0, 2), (1, 2), (0, 3), ...
    second = ((1 + np.sqrt(1 + 8 * numbers)) / 2).astype(np.int64)
    return np.stack([numbers - second * (second - 1) // 2, second], axis=1)


def _floats(images):
    return images / np.float32(127.5) - 1 if images.dtype == np.uint8 else images
