"""Precision, recall (Kynkaanniemi et al., arXiv 1904.06991) and coverage (Naeem et al., arXiv 2002.09797) on features."""

import numpy as np

ROWS = 1000  # at a time


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> dict[str, float]:
    """Fractions in [0, 1].

    Args:
      real: features of real images, [N, D].
      fake: features of generated images, [M, D].
      k: a set's manifold is the union of balls that reach from each point to its k-th nearest neighbour in the set.

    Returns:
      precision: generated images within the real manifold; recall: real images within the generated manifold;
      coverage: real images whose own ball holds a generated image.
    """
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    radius_real, radius_fake = _radii(real, k), _radii(fake, k)
    within_real, within_fake, covered = np.zeros(len(fake), bool), [], []
    for start, across in _distances(real, fake):
        radius = radius_real[start : start + len(across)]
        within_real |= (across <= radius[:, None]).any(0)
        within_fake.append((across <= radius_fake[None]).any(1))
        covered.append(across.min(1) <= radius)
    means = (within_real, np.concatenate(within_fake), np.concatenate(covered))
    return {name: float(mean.mean()) for name, mean in zip(("precision", "recall", "coverage"), means, strict=True)}


def _radii(x, k):
    return np.concatenate([np.partition(d, k, axis=1)[:, k] for _, d in _distances(x, x)])  # the 0-th neighbour is the point itself


def _distances(a, b):
    """(first row, squared distances of ROWS rows of `a` to all of `b`)."""
    for start in range(0, len(a), ROWS):
        rows = a[start : start + ROWS]
        yield start, np.maximum((rows**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * rows @ b.T, 0)
