"""Precision, recall (Kynkaanniemi et al., arXiv 1904.06991) and coverage (Naeem et al., arXiv 2002.09797) on features."""

import numpy as np


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
    across = _distances(real, fake)
    radius_real, radius_fake = _radii(real, k), _radii(fake, k)
    return {
        "precision": float((across <= radius_real[:, None]).any(0).mean()),
        "recall": float((across <= radius_fake[None]).any(1).mean()),
        "coverage": float((across.min(1) <= radius_real).mean()),
    }


def _radii(x, k):
    return np.partition(_distances(x, x), k, axis=1)[:, k]  # the 0-th neighbour is the point itself


def _distances(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0))
