"""Image files in a directory or a .zip, with labels as EDM's dataset.json has them."""

import errno
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable

import numpy as np

from dmd_jax.data import images
from dmd_jax.runtime import storage

CHOICES = ("read", "cropped")  # what a config may name

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LABELS = "dataset.json"
EXPECTED = (
    'expected {"labels": [["00000/img00000000.png", 6], ...]} with every image once, '
    'or {"labels": null}'
)


class Directory:
    """The files below a directory."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def names(self) -> list[str]:
        found = []
        for folder, _, files in os.walk(self._path):
            found += [pathlib.Path(folder, file) for file in files]
        return [path.relative_to(self._path).as_posix() for path in found]

    def read(self, name: str) -> bytes:
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError as error:
            if self._path.is_dir() and any(self._path.iterdir()):
                raise  # this file alone is missing
            raise OSError(errno.ENODEV, f"{self._path} is gone or empty; is it mounted?") from error


class Archive:
    """The files of a .zip. Every process opens its own handle, which threads may share."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._opened = (None, None)
        self._handle()

    def names(self) -> list[str]:
        return self._handle().namelist()

    def read(self, name: str) -> bytes:
        return self._handle().read(name)

    def __getstate__(self):
        return {"_path": self._path, "_opened": (None, None)}

    def _handle(self):
        pid, handle = self._opened
        if pid != os.getpid():  # a forked process would share the parent's position in the file
            handle = zipfile.ZipFile(self._path)
            self._opened = os.getpid(), handle
        return handle


class Labelled:
    """The records of `images.Files`."""

    def __init__(self, files: Directory | Archive, names: list[str], cond: np.ndarray):
        self._files = files
        self._names = names
        self._cond = cond

    def __len__(self):
        return len(self._names)

    def name(self, index):
        return self._names[index]

    def read(self, index):
        return self._files.read(self._names[index]), self._cond[index]


def read(*, path: str, size: int | None, num_classes: int = 0, x_flips: bool = False):
    """Returns the PNG, JPEG and WebP images of a directory or a .zip, in the order of their names.

    Images may be in folders at any depth. Other files are ignored.

    Args:
      path: the directory or the .zip.
      size: height and width of the images; None = those of the first image.
      num_classes: dataset.json has labels from 0 to num_classes - 1; 0 = labels are not read, and
        every cond is 0.
      x_flips: whether to append the mirror images.

    Raises:
      ValueError: there are no images; labels are missing, out of range or damaged; or an image is
        unlike the others or corrupt (when it is read).
    """
    files, names, everything = _listed(path)
    cond = np.zeros(len(names), np.int32)
    if num_classes:
        text = files.read(LABELS) if LABELS in everything else None
        cond = _labels(text, names, num_classes, path)
    source = images.Files(Labelled(files, names, cond), origin=str(path), size=size)
    return images.Flipped(source) if x_flips else source


def cropped(*, path: str, size: int):
    """Returns the PNG, JPEG and WebP images of a directory or a .zip, in the order of their names.

    They may have any sizes; each is cropped and resized by `images.cropped`.

    Args:
      path: the directory or the .zip.
      size: height and width of the result, in pixels.

    Raises:
      ValueError: there are no images, or an image is corrupt (when it is read).
    """
    files, names, _ = _listed(path)
    records = Labelled(files, names, np.zeros(len(names), np.int32))
    return images.Cropped(records, origin=str(path), size=size)


def _listed(path):
    """Returns the files, the names of the images, and all names; there is at least one image."""
    files = open_files(path)
    everything = set(files.names())
    names = image_names(everything)
    if not names:
        raise ValueError(
            f"{path}: no images; expected files that end in {', '.join(SUFFIXES)}, got "
            f"{len(everything)} others; check the path."
        )
    return files, names, everything


def open_files(path: str | os.PathLike) -> Directory | Archive:
    """Opens a directory or a .zip.

    Raises:
      ValueError: `path` is neither, or it is damaged.
    """
    path = storage.local(path)
    if path.is_dir():
        return Directory(path)
    if path.suffix.lower() == ".zip" and path.exists():
        try:
            return Archive(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is a damaged .zip ({error}); copy it again.") from error
    what = "another file" if path.exists() else "nothing there"
    raise ValueError(
        f"{path}: expected a directory or a .zip of images, got {what}; check the path."
    )


def check_inside(names: Iterable[str], origin: str):
    """Checks that the names of files, which others have written, lead nowhere else.

    Raises:
      ValueError: some do.
    """
    outside = [
        name
        for name in names
        if pathlib.PureWindowsPath(name).anchor or ".." in pathlib.PureWindowsPath(name).parts
    ]
    if outside:
        raise ValueError(
            f"{origin}: {len(outside)} names lead out of the directory of the images: "
            f"{_some(outside)}; expected names below it, such as folder/9.jpg."
        )


def image_names(names: Iterable[str]) -> list[str]:
    """Returns those of `names` that are names of images, sorted."""
    return sorted(
        name
        for name in names
        if name.lower().endswith(SUFFIXES) and not pathlib.PurePath(name).name.startswith("._")
    )


def _labels(text, names, num_classes, origin):
    """Returns the label of every name, [N] int32."""
    entries = None if text is None else _entries(text, origin)
    if entries is None:
        where = f"no {LABELS}" if text is None else f"null labels in {LABELS}"
        raise ValueError(
            f"{origin}: expected labels of {num_classes} classes, got {where}; add them, or set "
            "num_classes=0."
        )
    labels = dict(entries)
    missing = [name for name in names if name not in labels]
    if missing:
        raise ValueError(
            f"{origin}: {len(missing)} of {len(names)} images have no label in {LABELS}: "
            f"{_some(missing)}; add them."
        )
    absent = sorted(labels.keys() - set(names))
    if absent:
        raise ValueError(
            f"{origin}: {LABELS} has {len(absent)} images that are not there: {_some(absent)}; "
            "restore them, or remove them."
        )
    outside = [f"{name} ({labels[name]})" for name in names if not 0 <= labels[name] < num_classes]
    if outside:
        raise ValueError(
            f"{origin}: expected labels 0 to {num_classes - 1}, got {len(outside)} others in "
            f"{LABELS}: {_some(outside)}; set num_classes."
        )
    return np.array([labels[name] for name in names], np.int32)


def _entries(text, origin):
    """Reads the pairs of name and label in dataset.json, or None."""
    try:
        entries = json.loads(text)["labels"]
        whole = entries is None or (
            all(isinstance(name, str) and type(label) is int for name, label in entries)
            and len(dict(entries)) == len(entries)
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{origin}: {LABELS} is damaged; {EXPECTED}. Restore it.")
    return entries


def _some(items, n=5):
    return ", ".join(items[:n]) + (", ..." if len(items) > n else "")
