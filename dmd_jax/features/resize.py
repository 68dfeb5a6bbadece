"""Pillow's resizing on the devices, since the papers' scores are of images that Pillow resized:
weighted means of the pixels around,

    y_i = sum_j k_ij x_j,   k_ij = w((j + 1/2 - c_i) / s) / sum_j w(...),   c_i = (i + 1/2) scale,   s = max(scale, 1),

first along rows, then along columns. Of bytes, Pillow rounds k to 22 bits after the point and each
of the two results to a byte; of floating-point numbers it rounds nothing. Where a side has the size
already, it stays as it is.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

PRECISION = 22  # bits after the point
# Bits; three of them hold a weight, and every device multiplies two such numbers without rounding.
DIGIT = 8


def bytes_resize(images: jax.Array, size: int, filter: str) -> jax.Array:
    """As `Image.resize` of 8-bit images, to the last bit, on every device.

    Args:
      images: [B, H, W, C], float32 of whole numbers 0..255.
      size: height and width, pixels.
      filter: "lanczos" or "bicubic".

    Returns:
      [B, size, size, C], float32 of whole numbers 0..255.

    Raises:
      ValueError: there is no such filter, or the images are more than some hundred times as large
        as `size`.

    Source: Pillow, src/libImaging/Resample.c.
    """
    return _both_ways(images, size, filter, _bytes_along)


def float_resize(images: jax.Array, size: int, filter: str) -> jax.Array:
    """As `Image.resize` of each channel in mode "F", up to float32's rounding: bicubic results
    overshoot and are not clipped.

    Args:
      images: [B, H, W, C], float32.
      size: height and width, pixels.
      filter: "lanczos" or "bicubic".

    Returns:
      [B, size, size, C], float32.

    Raises:
      ValueError: there is no such filter.

    Source: Pillow, src/libImaging/Resample.c.
    """
    return _both_ways(images, size, filter, _floats_along)


def center_crop(images: jax.Array) -> jax.Array:
    """[B, H, W, C] to the square of the shorter side in their middle, where torchvision sees it: an
    odd half is rounded to even.
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
    """In floating-point numbers, since no device multiplies matrices of int32 well."""
    whole = np.trunc(weights * 2**PRECISION + np.copysign(0.5, weights)).astype(np.int64)
    total = jnp.int32(2 ** (PRECISION - 1))  # a half, to round
    for place in range(0, 3 * DIGIT, DIGIT):
        digit = (
            (whole + 2 ** (DIGIT - 1)) % 2**DIGIT - 2 ** (DIGIT - 1) if place < 2 * DIGIT else whole
        )
        whole = (whole - digit) >> DIGIT
        if (
            255 * np.abs(digit).sum(1).max() >= 2**24
        ):  # beyond that float32 has not all whole numbers
            raise ValueError(
                f"cannot resize {weights.shape[1]} pixels to {len(weights)} at once; resize the "
                "images to a size between first."
            )
        total += (
            jnp.einsum(axis, digit.astype(np.float32), images, precision="highest").astype(
                jnp.int32
            )
            << place
        )
    return jnp.clip(total >> PRECISION, 0, 255).astype(jnp.float32)


@functools.lru_cache
def _weights(size, target, filter):
    """[target, size], float64; sums in Pillow's order, since bytes need the same last bit."""
    weight, radius = FILTERS[filter]
    scale = size / target
    stretch = max(scale, 1.0)
    weights = np.zeros((target, size))
    for i in range(target):
        center = (i + 0.5) * scale
        # Int() rounds towards 0, as in C.
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


# And their radii, pixels.
FILTERS: dict[str, tuple[Callable, float]] = {
    "lanczos": (_lanczos, 3.0),
    "bicubic": (_bicubic, 2.0),
}
