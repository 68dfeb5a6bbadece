"""The differences of generated images from real ones in brightness, saturation and contrast.

Guidance raises all three. For one image they are

    brightness = mean Y,
    saturation = mean (max - min) / max of (R, G, B), 0 for black,
    contrast   = sqrt(mean Y^2 - brightness^2),

with the luma Y = 0.2126 R + 0.7152 G + 0.0722 B (ITU-R BT.709) of R, G, B in [0, 1] as they are in
a file; the saturation is that of HSV.
"""

from typing import NamedTuple

import numpy as np

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)


class Sums(NamedTuple):
    """Sums over a set of images; the sums of two sets can be added."""

    count: int
    brightness: float
    saturation: float
    contrast: float

    def __add__(self, other):
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))


def sums(images: np.ndarray) -> Sums:
    """Sums over a set of images.

    Args:
      images: bytes [N, H, W, C], C = 1 or 3.

    Raises:
      ValueError: the images are no bytes, or have other channels.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"expected images as uint8 [N, H, W, 1 or 3], got {images.dtype} {list(images.shape)}."
        )
    # One image at a time needs less memory.
    return sum((_of_one(image) for image in images), start=Sums(0, 0.0, 0.0, 0.0))


def _of_one(image):
    channels = [image[..., c] for c in range(image.shape[-1])]
    if len(channels) == 1:
        channels *= 3
    high = np.maximum.reduce(channels)
    low = np.minimum.reduce(channels)
    saturation = (high - low) / np.maximum(high, 1).astype(np.float32)
    luma = sum(weight * channel for weight, channel in zip(LUMA, channels, strict=True))
    luma = luma / np.float32(255)
    return Sums(
        count=1,
        brightness=float(luma.mean(dtype=np.float64)),
        saturation=float(saturation.mean(dtype=np.float64)),
        contrast=float(luma.std(dtype=np.float64)),
    )


def drift(real: Sums, fake: Sums) -> dict[str, float]:
    """Returns the means of generated images minus those of real ones, on the scale from 0 to 1.

    If all images are grey, there is no drift of the saturation.

    Args:
      real: sums over the real images.
      fake: sums over the generated images.

    Raises:
      ValueError: a set is empty.
    """
    if min(real.count, fake.count) < 1:
        raise ValueError(f"a drift needs images of both sets, got {real.count} and {fake.count}.")
    names = [
        name
        for name in Sums._fields[1:]
        if name != "saturation" or real.saturation or fake.saturation
    ]
    return {
        f"{name} drift": float(getattr(fake, name) / fake.count - getattr(real, name) / real.count)
        for name in names
    }
