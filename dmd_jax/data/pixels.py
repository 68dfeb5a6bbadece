"""Conversions between pixels as bytes and as floats, and grids of images."""

import numpy as np


def check_finite(images: np.ndarray):
    """Checks that images have no number that is none.

    Raises:
      FloatingPointError: they have.
    """
    if images.dtype != np.uint8:
        finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
        if not finite.all():
            raise FloatingPointError(
                f"{(~finite).sum()} of {len(images)} images have pixels that are not finite; the "
                "weights are broken, or their type is too small: try float32."
            )


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Converts [-1, 1] to 0..255, as EDM's evaluation does: trunc(127.5 x + 128).

    Bytes stay as they are.

    Raises:
      FloatingPointError: some images are not finite.
    """
    if images.dtype == np.uint8:
        return images
    check_finite(images)
    return np.clip(127.5 * np.asarray(images, np.float32) + 128, 0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int = 10, height: int = 32) -> np.ndarray:
    """Puts images [N, H, W, C] side by side in rows of `columns`.

    Images of less than `height` pixels are enlarged to at least that.

    Returns:
      [., ., 3] uint8.
    """
    images = to_uint8(images)
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    scale = -(-height // images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    images = np.pad(
        images, ((0, -len(images) % columns), (1, 1), (1, 1), (0, 0)), constant_values=255
    )
    _, h, w, c = images.shape
    return images.reshape(-1, columns, h, w, c).swapaxes(1, 2).reshape(-1, columns * w, c)


def to_float(pixels: np.ndarray) -> np.ndarray:
    """Converts 0..255 to float32 in [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1
