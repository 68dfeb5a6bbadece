"""A small classifier of the training images, made with scikit-learn.

Its last hidden layer gives the features of datasets for which there is no other network.
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
      weights: those of each layer, [in, out].
      biases: those of each layer, [out].
    """

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]

    def features(self, images: np.ndarray) -> np.ndarray:
        """Maps images [N, H, W, C] to the last hidden layer [N, D]."""
        h = np.asarray(images, np.float64).reshape(len(images), -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = np.maximum(h @ weight + bias, 0)
        return h

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Maps images [N, H, W, C] to the most likely labels [N]."""
        return (self.features(images) @ self.weights[-1] + self.biases[-1]).argmax(axis=-1)


def make(parallel, *, images, path: str) -> features.Features:
    """Returns the features of a classifier that is trained on the host.

    Args:
      parallel: the devices, which are not used.
      images: the data source on which it is trained.
      path: the file in which it is kept.
    """
    rows = [images[i] for i in range(len(images))]
    pixels = np.stack([row["image"] for row in rows])
    labels = np.stack([row["cond"] for row in rows])
    classifier = cached(path, pixels, labels)
    name = f"mlp@{len(rows[0]['image'])}"
    digest = digests.of_params(_arrays(classifier))
    return features.Features(name, digest, classifier.features, classifier.predict)


def fit(images: np.ndarray, labels: np.ndarray, hidden: tuple[int, ...] = (256, 64)) -> Classifier:
    """Trains a classifier, which is the same every time.

    Args:
      images: [N, H, W, C].
      labels: integers 0, 1, ..., [N].
      hidden: widths of the hidden layers.
    """
    from sklearn import exceptions, neural_network

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        mlp = neural_network.MLPClassifier(hidden, max_iter=60, random_state=0)
        mlp.fit(images.reshape(len(images), -1), labels)
    return Classifier(tuple(mlp.coefs_), tuple(mlp.intercepts_))


def cached(path: str | os.PathLike, images: np.ndarray, labels: np.ndarray) -> Classifier:
    """Reads the classifier from the file `path`; if there is none, calls `fit` and writes it.

    Raises:
      ValueError: the file is damaged.
    """
    path = storage.path(path)
    if not path.exists() and jax.process_index() == 0:
        classifier = fit(images, labels)
        with storage.writing(path) as file:
            np.savez(file, **_arrays(classifier))
    distributed.barrier(f"{path} is there")
    try:
        with np.load(storage.local(path)) as file:
            layers = range(len(file) // 2)
            weights = tuple(file[f"weights{i}"] for i in layers)
            biases = tuple(file[f"biases{i}"] for i in layers)
            return Classifier(weights, biases)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged; delete it and run again.") from error


def _arrays(classifier):
    """Returns the arrays by name: {"weights0": [in, out], ..., "biases0": [out], ...}."""
    return {
        f"{kind}{i}": array
        for kind, arrays in classifier._asdict().items()
        for i, array in enumerate(arrays)
    }
