"""Random-access sources of labelled images.

A row is {"image": [H, W, C] float32 in [-1, 1], "cond": int32}.
"""

import dataclasses
import hashlib
import io
from typing import Protocol

import numpy as np
from PIL import Image

from dmd_jax import data
from dmd_jax.data import pixels as pixels_lib


@dataclasses.dataclass(frozen=True)
class Images:
    """A source in memory: images [N, H, W, C], float32 in [-1, 1] or bytes, and labels [N]."""

    image: np.ndarray
    cond: np.ndarray

    def __len__(self):
        return len(self.cond)

    def __getitem__(self, index):
        image = self.image[index]
        return {
            "image": pixels_lib.to_float(image) if image.dtype == np.uint8 else image,
            "cond": self.cond[index],
        }

    @property
    def digest(self) -> str:
        """The digest of the content."""
        return hashlib.sha256(self.image.tobytes() + self.cond.tobytes()).hexdigest()[:16]


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of 8 bits or fewer


class Records(Protocol):
    """Image files with labels, at least one, which are read one at a time."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Returns the name of the image in error messages."""

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the file and the label."""


class Files:
    """A source of image files, which are read and decoded when their rows are read.

    All must have one size and one mode. The first is read at once.
    """

    def __init__(self, records: Records, *, origin: str, size: int | None = None):
        """Reads the first image.

        Args:
          records: the files and their labels.
          origin: the name of the source in errors.
          size: height and width of every image; None = those of the first.

        Raises:
          ValueError: the first image is corrupt, of another size or not square.
        """
        self._records = records
        self._origin = origin
        self._size = size
        self._first = None  # the mode of the first image
        height, width, _ = self._decode(0)[0].shape
        if size is None and height != width:
            raise ValueError(
                f"{origin}: image {records.name(0)}: expected a square, got {height}x{width}; crop "
                "the images first."
            )
        self._size = size or height

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"{self._origin}: no image {index} of {len(self)}")
        pixels, cond = self._decode(int(index))
        return {"image": pixels_lib.to_float(pixels), "cond": np.int32(cond)}

    @property
    def digest(self) -> str:
        """The digest of names, labels and files."""
        return _digest(self._records)

    def __repr__(self):
        return f"Files({self._origin}, {len(self)} images)"

    def _decode(self, index):
        where = f"{self._origin}: image {self._records.name(index)}"
        try:
            data, cond = self._records.read(index)
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()
                pixels = np.asarray(picture)
                mode = picture.mode
        except Exception as error:  # Pillow and the archives raise a dozen kinds for damaged files
            raise ValueError(
                f"{where} cannot be read ({error}); replace it, or remove it and its label."
            ) from error
        if mode not in ("L", "RGB"):
            raise ValueError(
                f"{where}: expected mode RGB or L (8 bit grey), got {mode}; "
                "convert the images first."
            )
        self._first = self._first or mode
        if mode != self._first:
            first = self._records.name(0)
            raise ValueError(
                f"{where}: mixed modes: expected {self._first} as in {first}, got {mode}; convert "
                "the images first."
            )
        if self._size and pixels.shape[:2] != (self._size, self._size):
            height, width = pixels.shape[:2]
            raise ValueError(
                f"{where}: expected {self._size}x{self._size} pixels, got {height}x{width} (HxW); "
                "resize the images first."
            )
        if cond < 0:
            raise ValueError(
                f"{where}: expected a label of 0 or more, got {cond}; use a split that has labels."
            )
        return pixels.reshape(*pixels.shape[:2], -1), cond


class Cropped:
    """A source of image files of any sizes and modes; `cropped` reads each of them."""

    def __init__(self, records: Records, *, origin: str, size: int):
        self._records = records
        self._origin = origin
        self._size = size

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        try:
            data, cond = self._records.read(int(index))
            return {"image": pixels_lib.to_float(cropped(data, self._size)), "cond": np.int32(cond)}
        except Exception as error:  # Pillow and the archives raise a dozen kinds for damaged files
            name = self._records.name(int(index))
            raise ValueError(
                f"{self._origin}: image {name} cannot be read ({error}); replace it, or remove it."
            ) from error

    @property
    def digest(self) -> str:
        """The digest of names, labels, files and size."""
        return _digest(self._records, self._size)


def _digest(records, *settings):
    total = hashlib.sha256(repr(settings).encode())
    for i in range(len(records)):
        data, cond = records.read(i)
        total.update(f"{records.name(i)} {cond} {len(data)} ".encode() + data)
    return total.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Flipped:
    """A source of twice the length: item i + N is item i with a mirrored image, as in EDM."""

    source: data.Source

    def __len__(self):
        return 2 * len(self.source)

    def __getitem__(self, index):
        n = len(self.source)
        if index < n:
            return self.source[index]
        item = self.source[index - n]
        return {**item, "image": np.ascontiguousarray(item["image"][:, ::-1])}

    @property
    def digest(self) -> str | None:
        """The digest of the content; None if `source` has none."""
        found = data.digest(self.source)
        return found and f"{found} flipped"


def cropped(data: bytes, size: int) -> np.ndarray:
    """Decodes an image file, and crops and resizes it.

    Transparent areas become white, and grey images get three channels.

    Args:
      data: the file.
      size: height and width, in pixels, to which Lanczos' filter resizes the square in the middle
        (the one of torchvision's center_crop); 0 = the image stays as it is.

    Returns:
      Bytes [H, W, 3].

    Raises:
      ValueError: the image has more than 8 bits.
    """
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        if picture.mode not in MODES:
            raise ValueError(f"expected one of the modes {', '.join(MODES)}, got {picture.mode}")
        if "A" in picture.mode or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
    if size:
        short = min(picture.size)
        left, top = (round((n - short) / 2) for n in picture.size)
        picture = picture.crop((left, top, left + short, top + short))
        # This changes nothing if the picture has the size already.
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def from_arrays(image: np.ndarray, cond: np.ndarray, *, origin: str) -> Images:
    """Makes a source from arrays.

    Args:
      image: [N, H, W, C], floats in [-1, 1].
      cond: labels [N].
      origin: the name of the arrays in errors.

    Raises:
      ValueError: the arrays are something else.
    """
    image = np.asarray(image)
    if (
        image.ndim != 4
        or image.dtype.kind != "f"
        or len(image) != len(cond)
        or not np.isfinite(image).all()
        or abs(image).max() > 1
    ):
        raise ValueError(
            f"{origin}: expected images [N, H, W, C] of finite floats in [-1, 1] and N labels, "
            f"got an array of shape {image.shape} and type {image.dtype} with {len(cond)} labels; "
            "convert the images first."
        )
    return Images(image.astype(np.float32), np.asarray(cond, np.int32))
