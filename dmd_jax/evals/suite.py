"""The measurements of a set of generated images against a set of real ones, in the features of one classifier."""

import numpy as np

from dmd_jax.evals import classifier as classifier_lib
from dmd_jax.evals import frechet, kid, precision_recall

FD = f"FD-{classifier_lib.NAME}"  # not "FID", which is the distance in the features of the Inception network of 2015
KD = f"KD-{classifier_lib.NAME}"
SCORES = (FD, KD, "precision", "recall", "coverage", "agreement")


def compare(classifier: classifier_lib.Classifier, real: np.ndarray, fake: np.ndarray, cond: np.ndarray) -> dict[str, float]:
    """Scores of images `fake` [M, H, W, C], made for the labels `cond` [M], against `real` [N, H, W, C].

    Returns:
      FD-mlp and KD-mlp (lower is better), precision, recall, coverage, and agreement: the fraction of `fake` that the classifier
      gives the label it was made for.
    """
    a, b = classifier.features(real), classifier.features(fake)
    return {
        FD: frechet.frechet_distance(frechet.statistics(a), frechet.statistics(b)),
        KD: kid.kernel_distance(a, b),
        **precision_recall.precision_recall(a, b),
        "agreement": float((classifier.predict(fake) == cond).mean()),
    }
