"""Frechet distance between two sets of features: |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a
C_b)^(1/2)) (Heusel et al., arXiv 1706.08500).
"""

from typing import NamedTuple

import numpy as np


class Sums(NamedTuple):
    """Sums over a set of images from which its moments follow, in float64; those of two sets add
    up.
    """

    count: int
    sum: np.ndarray  # [D]
    outer: np.ndarray  # [D, D]

    def __add__(self, other):
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))


class Moments(NamedTuple):
    """What a set of images is to the distance."""

    mean: np.ndarray  # [D]
    covariance: np.ndarray  # [D, D]


def sums(features: np.ndarray) -> Sums:
    """Of features [N, D]."""
    features = features.astype(np.float64)
    return Sums(len(features), features.sum(0), features.T @ features)


def moments(sums: Sums) -> Moments:
    """Raises ValueError for fewer than two images."""
    if sums.count < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {sums.count}.")
    mean = sums.sum / sums.count
    return Moments(mean, (sums.outer - sums.count * np.outer(mean, mean)) / (sums.count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The distance; zero for equal moments, up to float64's rounding, also with fewer images than
    features.

    With C = R R^T the trace of the root is the sum of the singular values of R_a^T R_b. Against the
    usual matrix root, nothing is divided by an eigenvalue, and the eigenvalues that are zero but
    for rounding, whose roots would be of 1e-8, are left out.

    Args:
      a: of one set of images.
      b: of the other.

    Returns:
      The squared distance of the two normal distributions, at least 0 up to rounding.

    Source: the equation above; as pytorch-fid's where both covariances are regular.
    """
    trace_of_root = np.linalg.svd(
        _factor(a.covariance).T @ _factor(b.covariance), compute_uv=False
    ).sum()
    return float(
        np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance) - 2 * trace_of_root
    )


def _factor(covariance):
    """R, [D, rank]"""
    values, vectors = np.linalg.eigh(covariance)
    real = values > len(values) * np.finfo(values.dtype).eps * values[-1]
    return vectors[:, real] * np.sqrt(values[real])
