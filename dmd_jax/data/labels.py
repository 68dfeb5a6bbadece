"""Random-access sources of class labels without images: {"cond": int32}."""

import dataclasses

import numpy as np

CHOICES = ("every", "random")  # what a config may name


@dataclasses.dataclass(frozen=True)
class RandomLabels:
    """A source of random labels {"cond": int32}; item i depends on (seed, i) alone."""

    num_classes: int
    count: int
    seed: int

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        # The counter of the noise with the same seed and index starts at 0.
        bits = np.random.Philox(key=[self.seed, index], counter=[0, 0, 0, 1])
        return {"cond": np.int32(np.random.Generator(bits).integers(self.num_classes))}


@dataclasses.dataclass(frozen=True)
class Labels:
    """A source of {"cond": int32} with every class once."""

    num_classes: int

    def __len__(self):
        return self.num_classes

    def __getitem__(self, index):
        return {"cond": np.int32(index)}


def every(*, num_classes: int) -> Labels:
    """Returns every class once, as conditions for images that are to be generated.

    Raises:
      ValueError: `num_classes` is less than 1.
    """
    if num_classes < 1:
        raise ValueError(
            f"labels: num_classes is {num_classes}; expected at least 1, even if the network "
            "ignores labels."
        )
    return Labels(num_classes)


def random(*, num_classes: int, count: int, seed: int) -> RandomLabels:
    """Returns labels that are drawn uniformly for each image, as in EDM's evaluation.

    Args:
      num_classes: labels are 0 to num_classes - 1.
      count: how many labels.
      seed: item i depends on (seed, i) alone.
    """
    return RandomLabels(num_classes, count, seed)
