"""scikit-learn's handwritten digits."""

import importlib.util
import pathlib

import numpy as np

from dmd_jax.data import images

FILE = "datasets/data/digits.csv.gz"  # in scikit-learn; of `sklearn.datasets.load_digits`


def make(*, split: str, seed: int = 0, held_out: int = 500):
    """Returns scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels, 10 classes.

    Args:
      split: "train" or "held_out".
      seed: the seed of the split.
      held_out: how many images the split "held_out" has.

    Raises:
      ValueError: scikit-learn is not installed, or there is no such split.
    """
    found = importlib.util.find_spec("sklearn")
    if not found:
        raise ValueError('the digits need scikit-learn; run: pip install "dmd_jax[digits]"')
    # The file alone, because importing scikit-learn takes as long as the rest of a start.
    table = np.loadtxt(pathlib.Path(found.origin).parent / FILE, delimiter=",")
    pixels, label = table[:, :-1], table[:, -1].astype(int)
    order = np.random.default_rng(seed).permutation(len(label))
    splits = {"train": order[held_out:], "held_out": order[:held_out]}
    if split not in splits:
        raise ValueError(f"digits have no split {split!r}; use one of {', '.join(splits)}.")
    chosen = splits[split]
    image = pixels[chosen].reshape(-1, 8, 8, 1) / 8 - 1
    return images.from_arrays(image, label[chosen], origin="scikit-learn's digits")
