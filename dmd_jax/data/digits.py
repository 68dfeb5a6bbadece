"""scikit-learn's handwritten digits."""

import numpy as np

from dmd_jax.data import images


def make(*, split: str, seed: int = 0, held_out: int = 500):
    """Returns scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels, 10 classes.

    Args:
      split: "train" or "held_out".
      seed: the seed of the split.
      held_out: how many images the split "held_out" has.

    Raises:
      ValueError: scikit-learn is not installed, or there is no such split.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError(
            'the digits need scikit-learn; run: pip install "dmd_jax[digits]"'
        ) from error
    pixels, label = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(label))
    splits = {"train": order[held_out:], "held_out": order[:held_out]}
    if split not in splits:
        raise ValueError(f"digits have no split {split!r}; use one of {', '.join(splits)}.")
    chosen = splits[split]
    image = pixels[chosen].reshape(-1, 8, 8, 1) / 8 - 1
    return images.from_arrays(image, label[chosen], origin="scikit-learn's digits")
