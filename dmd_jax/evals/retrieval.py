"""Whether images show what their captions say: the gallery's vector nearest to each image should
carry the same caption.

The gallery is of real images, in the space of some features, or of the captions themselves, in
CLIP's.
"""

import numpy as np

BLOCK = 256  # images whose cosines with the whole gallery are held at once
DIGITS = 12  # of a cosine: equal vectors tie, in whatever order their products were added up


def recall(
    features: np.ndarray,
    captions: list[str],
    gallery: np.ndarray,
    gallery_captions: list[str],
    ks=(1, 10),
) -> dict[str, float]:
    """R@k: the fraction of images that have their own caption among those of the k nearest in the
    gallery, by cosine; of ties the first.

    Args:
      features: of the images, [N, D].
      captions: of the images, N.
      gallery: features of real images, or of captions in the same space, [M, D].
      gallery_captions: of the gallery, M.
      ks: numbers of neighbours.
    """
    features, gallery = (np.asarray(a, np.float64) for a in (features, gallery))
    features, gallery = (
        a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12) for a in (features, gallery)
    )
    numbers = {
        caption: i for i, caption in enumerate(dict.fromkeys([*captions, *gallery_captions]))
    }
    own, theirs = (
        np.array([numbers[caption] for caption in texts]) for texts in (captions, gallery_captions)
    )
    blocks = [
        _nearest(features[i : i + BLOCK], gallery, max(ks)) for i in range(0, len(features), BLOCK)
    ]
    hits = theirs[np.concatenate(blocks)] == own[:, None]
    return {f"R@{k}": float(hits[:, :k].any(axis=1).mean()) for k in ks}


def _nearest(features, gallery, k):
    """The rows of the gallery that are nearest, [N, min(k, M)], the nearest first."""
    distances, k = np.round(-features @ gallery.T, DIGITS), min(k, len(gallery))
    furthest = np.partition(distances, k - 1, axis=1)[:, k - 1]
    candidates = (
        np.flatnonzero(row <= limit) for row, limit in zip(distances, furthest, strict=True)
    )
    return np.stack(
        [
            c[np.argsort(row[c], kind="stable")[:k]]
            for row, c in zip(distances, candidates, strict=True)
        ]
    )
