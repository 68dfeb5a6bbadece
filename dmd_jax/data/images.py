"""Labelled images, as random-access sources of {"image": [H, W, C] float32 in [-1, 1], "cond": int32}, and labels alone."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Images:
    """A source held in memory."""

    image: np.ndarray
    cond: np.ndarray

    def __len__(self):
        return len(self.cond)

    def __getitem__(self, index):
        return {"image": self.image[index], "cond": self.cond[index]}


@dataclasses.dataclass(frozen=True)
class Labels:
    """A source of {"cond": int32}, every class once."""

    num_classes: int

    def __len__(self):
        return self.num_classes

    def __getitem__(self, index):
        return {"cond": np.int32(index)}


def from_arrays(image: np.ndarray, cond: np.ndarray, *, origin: str) -> Images:
    """A source out of images [N, H, W, C] in [-1, 1] and labels [N]; `origin` names them in errors.

    Raises:
      ValueError: the arrays are something else.
    """
    image = np.asarray(image)
    if image.ndim != 4 or image.dtype.kind != "f" or len(image) != len(cond) or not np.isfinite(image).all() or abs(image).max() > 1:
        raise ValueError(
            f"{origin}: expected images [N, H, W, C] of finite floats in [-1, 1] and N labels, got an array of shape {image.shape} and "
            f"type {image.dtype} with {len(cond)} labels; convert the images first."
        )
    return Images(image.astype(np.float32), np.asarray(cond, np.int32))


def digits(*, split: str, seed: int = 0, held_out: int = 500):
    """scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels, 10 classes.

    Args:
      split: "train", or "held_out" for the `held_out` images kept apart.
      seed: of the split.
      held_out: how many images are kept apart.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError('the digits need scikit-learn; run: pip install "dmd_jax[digits]"') from error
    pixels, label = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(label))
    splits = {"train": order[held_out:], "held_out": order[:held_out]}
    if split not in splits:
        raise ValueError(f"digits have no split {split!r}; use one of {', '.join(splits)}.")
    chosen = splits[split]
    return from_arrays(pixels[chosen].reshape(-1, 8, 8, 1) / 8 - 1, label[chosen], origin="scikit-learn's digits")


def labels(*, num_classes: int) -> Labels:
    """Conditions for images yet to be generated."""
    return Labels(num_classes)
