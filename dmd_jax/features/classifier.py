"""A small classifier of the training images, by scikit-learn: its last hidden layer is the feature
space of datasets that have no other.
"""

import os
import warnings
import zipfile
from typing import NamedTuple

import jax
import numpy as np

from dmd_jax import features
from dmd_jax.runtime import distributed, storage
from dmd_jax.weights import digests


class Classifier(NamedTuple):
    """A multilayer perceptron with ReLU.

    Attributes:
      weights: of each layer, [in, out].
      biases: of each layer, [out].
    """

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]

    def features(self, images: np.ndarray) -> np.ndarray:
        """[N, H, W, C] to [N, D], the last hidden layer."""
        h = np.asarray(images, np.float64).reshape(len(images), -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = np.maximum(h @ weight + bias, 0)
        return h

    def predict(self, images: np.ndarray) -> np.ndarray:
        """[N, H, W, C] to the most likely labels [N]."""
        return (self.features(images) @ self.weights[-1] + self.biases[-1]).argmax(axis=-1)


def make(parallel, *, images, path: str) -> features.Features:
    """The features of a classifier of the data source `images`, kept in the file `path`; runs on
    the host.
    """
    rows = [images[i] for i in range(len(images))]
    classifier = cached(
        path, np.stack([row["image"] for row in rows]), np.stack([row["cond"] for row in rows])
    )
    arrays = {
        f"{kind}{i}": a
        for kind, values in classifier._asdict().items()
        for i, a in enumerate(values)
    }
    return features.Features(
        f"mlp@{len(rows[0]['image'])}",
        digests.of_params(arrays),
        classifier.features,
        classifier.predict,
    )


def fit(images: np.ndarray, labels: np.ndarray, hidden: tuple[int, ...] = (256, 64)) -> Classifier:
    """Trained on images [N, H, W, C] with integer labels 0, 1, ... [N]; the same every time."""
    from sklearn import exceptions, neural_network

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        mlp = neural_network.MLPClassifier(hidden, max_iter=60, random_state=0).fit(
            images.reshape(len(images), -1), labels
        )
    return Classifier(tuple(mlp.coefs_), tuple(mlp.intercepts_))


def cached(path: str | os.PathLike, images: np.ndarray, labels: np.ndarray) -> Classifier:
    """As `fit`, or as a former call left it in the file `path`."""
    path = storage.path(path)
    if not path.exists() and jax.process_index() == 0:
        classifier = fit(images, labels)
        with storage.writing(path) as file:
            np.savez(
                file,
                **{
                    f"{kind}{i}": a
                    for kind, arrays in classifier._asdict().items()
                    for i, a in enumerate(arrays)
                },
            )
    distributed.barrier(f"{path} is there")
    try:
        with np.load(storage.local(path)) as file:
            return Classifier(
                *(
                    tuple(file[f"{kind}{i}"] for i in range(len(file) // 2))
                    for kind in Classifier._fields
                )
            )
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged; delete it and run again.") from error
