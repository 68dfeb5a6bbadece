"""Precision and recall (Kynkaanniemi et al., arXiv 1904.06991), density and coverage (Naeem et al.,
arXiv 2002.09797) on features.

Around each image x of a set lies the ball B_k(x) that reaches to its k-th nearest neighbour in the
set. With N real images x and M generated images y, and 1 where a condition holds, else 0,

    precision = 1/M     sum_j max_i 1[y_j in B_3(x_i)],
    recall    = 1/N     sum_i max_j 1[x_i in B_3(y_j)],
    density   = 1/(5 M) sum_ij      1[y_j in B_5(x_i)],
    coverage  = 1/N     sum_i max_j 1[y_j in B_5(x_i)].

Each k is that of the paper. As in the authors' programs, the balls of the first two include their
surface and those of the others do not. So the density and the coverage of a set by itself are 1.
"""

import jax.numpy as jnp
import numpy as np

from dmd_jax import sharding
from dmd_jax.evals import pairwise

K_MANIFOLD = 3  # Kynkaanniemi et al., section 3
K_DENSITY = 5  # Naeem et al., section 5
# Squared distances that differ by less than this, times the images' mean squared norm, are equal.
# Otherwise rounding would decide on copies of an image.
TIE = 1e-10


def precision_recall(
    real: np.ndarray, fake: np.ndarray, parallel: sharding.Parallel
) -> dict[str, float]:
    """Returns all four measures.

    Args:
      real: features of real images, [N, D].
      fake: features of generated images, [M, D].
      parallel: the devices.

    Returns:
      "precision": the fraction of generated images that are like real ones.
      "recall": the fraction of real images that are like generated ones.
      "density": in how many balls of real images a generated image lies, divided by k; it can be
        larger than 1.
      "coverage": the fraction of real images that have a generated image near them.

    Raises:
      ValueError: a set has too few images to have neighbours.
    """
    if min(len(real), len(fake)) <= K_DENSITY:
        raise ValueError(
            f"precision and recall need more than {K_DENSITY} images of each set, got {len(real)} "
            f"and {len(fake)}."
        )
    # Far from 0, differences of squares would lose digits.
    mean = real.mean(axis=0, dtype=np.float64)
    sets = [{"x": x} for x in (real - mean, fake - mean)]
    tie = TIE * np.mean([(s["x"] ** 2).sum(axis=1).mean() for s in sets])
    real, fake = (s | pairwise.by_rows(_radii, s["x"], s["x"], parallel) for s in sets)
    of_fake = pairwise.by_rows(_balls, real | {"tie": tie}, fake, parallel)
    of_real = pairwise.by_rows(_balls, fake | {"tie": tie}, real, parallel)
    return {
        "precision": float(of_fake["within"].mean()),
        "recall": float(of_real["within"].mean()),
        "density": float(of_fake["count"].mean() / K_DENSITY),
        "coverage": float(of_real["reached"].mean()),
    }


def _balls(whole, rows):
    """Returns for each row if it is in a ball, in how many open balls, and if its own holds any."""
    distances = _distances(rows["x"], whole["x"])
    return {
        "within": (distances <= (whole["manifold"] + whole["tie"])[None]).any(axis=1),
        "count": (distances + whole["tie"] < whole["density"][None]).sum(axis=1),
        "reached": (distances + whole["tie"] < rows["density"][:, None]).any(axis=1),
    }


def _radii(whole, rows):
    """Returns the squared radii of the balls of both kinds."""
    distances = _distances(rows, whole)
    columns = jnp.arange(len(whole))
    radii = []
    for _ in range(K_DENSITY + 1):  # the nearest is the image itself
        nearest = distances.argmin(axis=1, keepdims=True)
        radii.append(jnp.take_along_axis(distances, nearest, axis=1)[:, 0])
        distances = jnp.where(columns[None] == nearest, jnp.inf, distances)
    return {"manifold": radii[K_MANIFOLD], "density": radii[K_DENSITY]}


def _distances(a, b):
    """Returns the squared distances of all rows of `a` and `b`."""
    return jnp.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T, 0)
