"""The Kernel Inception Distance on any features (Binkowski et al., arXiv 1801.01401).

It is the squared maximum mean discrepancy

    E k(a, a') + E k(b, b') - 2 E k(a, b),   k(a, b) = (a.b / D + 1)^3,

where a and a' are different images, and b and b' also.
"""

import numpy as np

from dmd_jax import sharding
from dmd_jax.evals import pairwise


def kernel_distance(a: np.ndarray, b: np.ndarray, parallel: sharding.Parallel) -> float:
    """Returns the unbiased estimate from all pairs.

    It can be negative by chance if the distance is near 0. The authors' code, clean-fid and
    torch-fidelity give the mean of this estimate over 50 or 100 random subsets of 1,000 images
    instead. That has the same expectation, so figures can be compared, but it has more noise.

    Args:
      a: features of one set, [N, D], N at least 2.
      b: features of the other set, [M, D], M at least 2.
      parallel: the devices.

    Returns:
      The distance; papers often give it multiplied by 1,000.

    Raises:
      ValueError: a set has fewer than two images.

    Source: eq. 4 and section 4 of the paper.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(
            f"a kernel distance needs at least 2 images of each set, got {len(a)} and {len(b)}."
        )
    a, b = (x.astype(np.float64) for x in (a, b))
    across = pairwise.by_rows(_sums, b, a, parallel).sum() / (len(a) * len(b))
    return float(_mean_of_different(a, parallel) + _mean_of_different(b, parallel) - 2 * across)


def _sums(whole, rows):
    return ((rows @ whole.T / rows.shape[1] + 1) ** 3).sum(axis=1)


def _mean_of_different(a, parallel):
    with_themselves = ((a**2).mean(axis=1) + 1) ** 3
    with_others = pairwise.by_rows(_sums, a, a, parallel) - with_themselves
    return with_others.sum() / (len(a) * (len(a) - 1))
