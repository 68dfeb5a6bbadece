"""Resizes images on the devices as Pillow does, because Pillow resized the images of the papers.

A pixel of the result is a weighted mean of the pixels around it,

    y_i = sum_j k_ij x_j,
    k_ij = w((j + 1/2 - c_i) / s) / sum_j w((j + 1/2 - c_i) / s),
    c_i = (i + 1/2) scale,   s = max(scale, 1),

first along rows, then along columns. For bytes, Pillow rounds k to 22 bits after the point, and
each of the two results to a byte; for floating-point numbers it rounds nothing. A side that has the
right size already stays as it is.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

PRECISION = 22  # bits after the point
# Bits. Three digits hold a weight, and every device multiplies two digits without rounding.
DIGIT = 8


def bytes_resize(images: jax.Array, size: int, filter: str) -> jax.Array:
    """Resizes as `Image.resize` does 8-bit images: every bit is equal, on every device.

    Args:
      images: [B, H, W, C], float32 of whole numbers 0..255.
      size: height and width, in pixels.
      filter: "lanczos" or "bicubic".

    Returns:
      [B, size, size, C], float32 of whole numbers 0..255.

    Raises:
      ValueError: there is no such filter, or the images are several hundred times as large as
        `size`.

    Source: Pillow, src/libImaging/Resample.c.
    """
    return _both_ways(images, size, filter, _bytes_along)


def float_resize(images: jax.Array, size: int, filter: str) -> jax.Array:
    """Resizes as `Image.resize` does each channel in mode "F", up to float32's rounding.

    The bicubic filter overshoots, and the result is not clipped.

    Args:
      images: [B, H, W, C], float32.
      size: height and width, in pixels.
      filter: "lanczos" or "bicubic".

    Returns:
      [B, size, size, C], float32.

    Raises:
      ValueError: there is no such filter.

    Source: Pillow, src/libImaging/Resample.c.
    """
    return _both_ways(images, size, filter, _floats_along)


def center_crop(images: jax.Array) -> jax.Array:
    """Crops images [B, H, W, C] to the square in their middle, as torchvision does.

    If the square cannot be exactly in the middle, its offset is rounded to the even number.
    """
    top, left, short = _middle(*images.shape[1:3])
    return images[:, top : top + short, left : left + short]


def _middle(height, width):
    short = min(height, width)
    return round((height - short) / 2), round((width - short) / 2), short


def _both_ways(images, size, filter, along):
    if filter not in FILTERS:
        raise ValueError(f"no filter {filter!r}; there are: {', '.join(FILTERS)}.")
    _, height, width, _ = images.shape
    if width != size:
        images = along("ow,bhwc->bhoc", _weights(width, size, filter), images)
    if height != size:
        images = along("oh,bhwc->bowc", _weights(height, size, filter), images)
    return images


def _floats_along(axis, weights, images):
    return jnp.einsum(axis, weights.astype(np.float32), images, precision="highest")


def _bytes_along(axis, weights, images):
    """Multiplies whole numbers as floats, since no device multiplies matrices of int32 well."""
    whole = np.trunc(weights * 2**PRECISION + np.copysign(0.5, weights)).astype(np.int64)
    total = jnp.int32(2 ** (PRECISION - 1))  # a half, to round
    for place in range(0, 3 * DIGIT, DIGIT):
        digit = whole
        if place < 2 * DIGIT:
            digit = (whole + 2 ** (DIGIT - 1)) % 2**DIGIT - 2 ** (DIGIT - 1)
        whole = (whole - digit) >> DIGIT
        # From 2**24 on, float32 cannot hold every whole number.
        if 255 * np.abs(digit).sum(1).max() >= 2**24:
            raise ValueError(
                f"cannot resize {weights.shape[1]} pixels to {len(weights)} at once; resize the "
                "images to a size in between first."
            )
        part = jnp.einsum(axis, digit.astype(np.float32), images, precision="highest")
        total += part.astype(jnp.int32) << place
    return jnp.clip(total >> PRECISION, 0, 255).astype(jnp.float32)


@functools.lru_cache
def _weights(size, target, filter):
    """Returns [target, size], float64, summed in Pillow's order to get the same last bit."""
    weight, radius = FILTERS[filter]
    scale = size / target
    stretch = max(scale, 1.0)
    weights = np.zeros((target, size))
    for i in range(target):
        center = (i + 0.5) * scale
        # int() rounds towards 0, as in C.
        first, last = (int(center + side * radius * stretch + 0.5) for side in (-1, 1))
        first, last = max(first, 0), min(last, size)
        row = [weight((j - center + 0.5) * (1.0 / stretch)) for j in range(first, last)]
        total = functools.reduce(float.__add__, row, 0.0)  # sum() would compensate for rounding
        weights[i, first:last] = [w / total for w in row]
    return weights


def _lanczos(x):
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


def _sinc(x):
    x *= math.pi
    return math.sin(x) / x if x else 1.0


def _bicubic(x, a=-0.5):
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0


# The functions w and their radii, in pixels.
FILTERS: dict[str, tuple[Callable, float]] = {
    "lanczos": (_lanczos, 3.0),
    "bicubic": (_bicubic, 2.0),
}
