"""Kernel Inception Distance's statistic on any features (Binkowski et al., arXiv 1801.01401)."""

import numpy as np


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared MMD of features [N, D] and [M, D] under the kernel (a.b / D + 1)^3; negative values are zero up to chance."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, m = len(a), len(b)
    within_a, within_b = _kernel(a, a), _kernel(b, b)
    return float(
        (within_a.sum() - np.trace(within_a)) / (n * (n - 1))
        + (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
        - 2 * _kernel(a, b).mean()
    )


def _kernel(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3
