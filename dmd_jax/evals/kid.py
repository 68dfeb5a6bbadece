"""Kernel Inception Distance's statistic on any features (Binkowski et al., arXiv 1801.01401)."""

import numpy as np

ROWS = 1000  # at a time


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared MMD of features [N, D] and [M, D] under the kernel (a.b / D + 1)^3; negative values are zero up to chance."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, m = len(a), len(b)
    return (_total(a, a) - _diagonal(a)) / (n * (n - 1)) + (_total(b, b) - _diagonal(b)) / (m * (m - 1)) - 2 * _total(a, b) / (n * m)


def _total(a, b):
    """The sum of the kernel over all pairs."""
    return float(sum(((a[i : i + ROWS] @ b.T / a.shape[1] + 1) ** 3).sum() for i in range(0, len(a), ROWS)))


def _diagonal(a):
    return float((((a**2).mean(1) + 1) ** 3).sum())
