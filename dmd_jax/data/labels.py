"""Class labels without images, as random-access sources of {"cond": int32}."""

import dataclasses

import numpy as np

CHOICES = ("every", "random")  # what a config may name


@dataclasses.dataclass(frozen=True)
class RandomLabels:
    """A source of {"cond": int32}; item i is a function of (seed, i) alone."""

    num_classes: int
    count: int
    seed: int

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        # Noise of the same seed and index begins at 0.
        bits = np.random.Philox(key=[self.seed, index], counter=[0, 0, 0, 1])
        return {"cond": np.int32(np.random.Generator(bits).integers(self.num_classes))}


@dataclasses.dataclass(frozen=True)
class Labels:
    """A source of {"cond": int32}, every class once."""

    num_classes: int

    def __len__(self):
        return self.num_classes

    def __getitem__(self, index):
        return {"cond": np.int32(index)}


def every(*, num_classes: int) -> Labels:
    """Conditions for images yet to be generated."""
    if num_classes < 1:
        raise ValueError(
            f"labels: num_classes is {num_classes}; expected at least 1, also where a network "
            "ignores them."
        )
    return Labels(num_classes)


def random(*, num_classes: int, count: int, seed: int) -> RandomLabels:
    """Conditions drawn uniformly for each image, as in EDM's evaluation.

    Args:
      num_classes: labels are 0 to num_classes - 1.
      count: how many.
      seed: item i follows from (seed, i) alone.
    """
    return RandomLabels(num_classes, count, seed)
