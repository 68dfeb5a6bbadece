"""Frechet distance between two sets of features: |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al., arXiv 1706.08500)."""

from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    """Sums from which mean and covariance follow, in float64; those of two sets of images add up."""

    count: int
    sum: np.ndarray  # [D]
    outer: np.ndarray  # [D, D]

    def __add__(self, other):
        return Statistics(*(a + b for a, b in zip(self, other, strict=True)))


def statistics(features: np.ndarray) -> Statistics:
    """Of features [N, D]."""
    features = features.astype(np.float64)
    return Statistics(len(features), features.sum(0), features.T @ features)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Raises ValueError when a set has fewer than two images."""
    (mu_a, cov_a), (mu_b, cov_b) = _mean_and_covariance(a), _mean_and_covariance(b)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    trace_of_root = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0)).sum()  # also where a covariance is singular
    return float(np.sum((mu_a - mu_b) ** 2) + np.trace(cov_a + cov_b) - 2 * trace_of_root)


def _mean_and_covariance(stats):
    if stats.count < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {stats.count}.")
    mean = stats.sum / stats.count
    return mean, (stats.outer - stats.count * np.outer(mean, mean)) / (stats.count - 1)
