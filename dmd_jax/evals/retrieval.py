"""Whether images show what their captions say: the real image nearest to each in feature space should carry the same caption."""

import numpy as np


def recall(features: np.ndarray, captions: list[str], gallery: np.ndarray, gallery_captions: list[str], ks=(1, 10)) -> dict[str, float]:
    """R@k: the fraction of images that have their own caption among those of the k nearest real images, by cosine.

    Args:
      features: of the images, [N, D].
      captions: of the images, N.
      gallery: features of real images, [M, D].
      gallery_captions: of the real images, M.
      ks: numbers of neighbours.
    """
    features, gallery = (np.asarray(a, np.float64) for a in (features, gallery))
    features, gallery = (a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12) for a in (features, gallery))
    nearest = np.argsort(-features @ gallery.T, axis=1, kind="stable")[:, : max(ks)]
    hits = np.array(gallery_captions)[nearest] == np.array(captions)[:, None]
    return {f"R@{k}": float(hits[:, :k].any(axis=1).mean()) for k in ks}
