"""Fashion-MNIST, a dataset in the IDX format of MNIST."""

import gzip
import math
import pathlib
import zlib

import numpy as np

from dmd_jax.data import images
from dmd_jax.runtime import storage

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
PREFIXES = {"train": "train", "test": "t10k"}


def make(
    *, split: str, path: str = FASHION_MNIST, size: int = 32, limit: int = 0, x_flips: bool = False
):
    """Returns Fashion-MNIST: grey images of 28x28 pixels in a black frame, 10 classes.

    Args:
      split: "train" (60,000 images) or "test" (10,000).
      path: the directory of the four files, with or without .gz.
      size: height and width with the frame, in pixels; 16 averages each 2x2 pixels of size 32.
      limit: how many images to keep, the first ones; 0 = all.
      x_flips: whether to append the mirror images.

    Raises:
      ValueError: there is no such split or size; the files are missing, damaged or something else.
    """
    if split not in PREFIXES:
        raise ValueError(f"Fashion-MNIST has no split {split!r}; use one of {', '.join(PREFIXES)}.")
    if size != 16 and (size < 28 or size % 2):
        raise ValueError(
            f"Fashion-MNIST: expected 16 or an even size of at least 28, got {size}; "
            "use 16, 28 or 32."
        )
    directory = storage.local(path)
    pixels = read(_find(directory, f"{PREFIXES[split]}-images-idx3-ubyte"), ndim=3)
    labels = read(_find(directory, f"{PREFIXES[split]}-labels-idx1-ubyte"), ndim=1)
    if pixels.shape != (len(labels), 28, 28) or labels.max(initial=0) > 9:
        raise ValueError(
            f"{path}: expected images [N, 28, 28] and N labels 0 to 9, got {list(pixels.shape)} "
            f"and {len(labels)} labels up to {labels.max(initial=0)}; is this Fashion-MNIST? "
            "Install it again."
        )
    pixels = pixels[: limit or None]
    labels = labels[: limit or None]
    frame = 2 if size == 16 else (size - 28) // 2
    pixels = np.pad(pixels, ((0, 0), (frame, frame), (frame, frame)))
    if size == 16:
        pixels = np.rint(pixels.reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4))).astype(np.uint8)
    source = images.Images(pixels[..., None], labels.astype(np.int32))
    return images.Flipped(source) if x_flips else source


def read(path: pathlib.Path, *, ndim: int) -> np.ndarray:
    """Reads an array of bytes with `ndim` dimensions from an IDX file.

    Raises:
      ValueError: the file is damaged or something else.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); install it again.") from error
    magic = bytes([0, 0, 8, ndim])  # 8 = uint8
    if data[:4] != magic:
        raise ValueError(
            f"{path}: expected an IDX file that begins with {magic.hex()}, got {data[:4].hex()}; "
            "install it again."
        )
    start = 4 + 4 * ndim
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if len(data) != start + math.prod(shape):
        raise ValueError(
            f"{path}: expected {start + math.prod(shape)} bytes for {shape}, got {len(data)}; "
            "install it again."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _find(path, name):
    for file in (path / f"{name}.gz", path / name):
        if file.exists():
            return file
    raise ValueError(
        f"no Fashion-MNIST in {path}: {name}.gz does not exist. "
        "Run: apt-get install dataset-fashion-mnist; or without root: "
        "apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DIR, "
        f"and set path='DIR{FASHION_MNIST}'."
    )
