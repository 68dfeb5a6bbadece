"""The recall of captions, which measures if images show what their captions say.

An image should be nearest to the vector of a gallery that has the same caption. The gallery has
features of real images, or CLIP's vectors of the captions themselves.
"""

import numpy as np

BLOCK = 256  # images in a batch, for each of which the cosines with the whole gallery are kept
DIGITS = 12  # of a cosine; so equal vectors are equally near, whatever the order of their sums


def recall(
    features: np.ndarray,
    captions: list[str],
    gallery: np.ndarray,
    gallery_captions: list[str],
    ks=(1, 10),
) -> dict[str, float]:
    """Returns R@k, the fraction of images whose caption is among those of the k nearest vectors.

    Nearness is by cosine; of equally near vectors the first counts.

    Args:
      features: features of the images, [N, D].
      captions: captions of the images, N.
      gallery: features of real images, or of captions in the same space, [M, D].
      gallery_captions: captions of the gallery, M.
      ks: numbers of neighbours.
    """
    features = _unit(features)
    gallery = _unit(gallery)
    different = dict.fromkeys([*captions, *gallery_captions])
    numbers = {caption: i for i, caption in enumerate(different)}
    own = np.array([numbers[caption] for caption in captions])
    theirs = np.array([numbers[caption] for caption in gallery_captions])
    blocks = [
        _nearest(features[i : i + BLOCK], gallery, max(ks)) for i in range(0, len(features), BLOCK)
    ]
    hits = theirs[np.concatenate(blocks)] == own[:, None]
    return {f"R@{k}": float(hits[:, :k].any(axis=1).mean()) for k in ks}


def _unit(vectors):
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _nearest(features, gallery, k):
    """Returns the indices of the nearest rows of the gallery, [N, min(k, M)], nearest first."""
    distances = np.round(-features @ gallery.T, DIGITS)
    k = min(k, len(gallery))
    furthest = np.partition(distances, k - 1, axis=1)[:, k - 1]
    nearest = []
    for row, limit in zip(distances, furthest, strict=True):
        candidates = np.flatnonzero(row <= limit)
        nearest.append(candidates[np.argsort(row[candidates], kind="stable")[:k]])
    return np.stack(nearest)
