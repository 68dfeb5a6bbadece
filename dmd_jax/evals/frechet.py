"""The Frechet distance between two sets of features (Heusel et al., arXiv 1706.08500):

|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np


class Sums(NamedTuple):
    """Sums over a set of images, in float64, which give its moments.

    The sums of two sets can be added.
    """

    count: int
    sum: np.ndarray  # [D]
    outer: np.ndarray  # [D, D]

    def __add__(self, other):
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """The moments of the features of a set of images."""

    mean: np.ndarray  # [D]
    covariance: np.ndarray  # [D, D]

    @functools.cached_property
    def root(self) -> np.ndarray:
        """R [D, rank], of which the covariance is R R^T; seconds for 2,048 features, so kept."""
        values, vectors = np.linalg.eigh(self.covariance)
        real = values > len(values) * np.finfo(values.dtype).eps * values[-1]
        return vectors[:, real] * np.sqrt(values[real])


def sums(features: np.ndarray) -> Sums:
    """Sums over features [N, D]."""
    features = features.astype(np.float64)
    return Sums(len(features), features.sum(0), features.T @ features)


def moments(sums: Sums) -> Moments:
    """Returns the moments of a set of images.

    Raises:
      ValueError: there are fewer than two images.
    """
    if sums.count < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {sums.count}.")
    mean = sums.sum / sums.count
    return Moments(mean, (sums.outer - sums.count * np.outer(mean, mean)) / (sums.count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Returns the squared Frechet distance of two normal distributions.

    With C = R R^T the trace of the root is the sum of the singular values of R_a^T R_b. Unlike the
    usual matrix root, this divides by no eigenvalue. It also leaves out the eigenvalues that only
    rounding keeps from 0, whose roots would be about 1e-8. So equal moments have the distance 0 up
    to float64's rounding, also for fewer images than features.

    Args:
      a: moments of one set of images.
      b: moments of the other set.

    Returns:
      The squared distance, at least 0 up to rounding.

    Source: the equation above; pytorch-fid gives the same if both covariances are regular.
    """
    trace_of_root = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    of_means = np.sum((a.mean - b.mean) ** 2)
    return float(of_means + np.trace(a.covariance + b.covariance) - 2 * trace_of_root)
