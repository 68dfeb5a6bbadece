"""Random-access sources of captions, with or without images.

A row is {"text": str, "image": [H, W, 3] float32 in [-1, 1]}. A source reads an image when its row
is read, crops it to the square in its middle and resizes it to `size` by Lanczos' filter; with the
size 0 images stay as they are. Several blanks in a text become one. A source that cannot be opened
raises ValueError at once; a row that cannot be read raises BadRow when it is read.
"""

import dataclasses
import errno
import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent import futures
from typing import Protocol

import numpy as np
import tensorflow_datasets

from dmd_jax.data import folder as folder_lib
from dmd_jax.data import images as images_lib
from dmd_jax.data import pixels
from dmd_jax.data import tfds as tfds_lib
from dmd_jax.runtime import storage
from dmd_jax.weights import published

CHOICES = ("coco", "tfds", "folder", "prompts", "without")  # what a config may name

LINES = ('"name, tab, caption"', '{"file_name": "9.jpg", "text": "A cat."}')
FIRST = 16  # rows; if none of them has its image, the path is wrong
# Examples of a prepared dataset in its digest: its version says the rest, and reading the captions
# of all examples takes minutes.
SAMPLED = 16
# More bad rows than both of these are no accident: COCO and LAION have a few in a thousand.
FEW = 10
SHARE = 0.05
COCO = (
    '{"images": [{"id": 9, "file_name": "9.jpg"}, ...], '
    '"annotations": [{"id": 1, "image_id": 9, "caption": "A cat."}, ...]}'
)


class BadRow(ValueError):
    """A row that cannot be read: its image is missing or damaged, or its caption is empty."""


class Rows(Protocol):
    """The rows of `Captions`, at least one, which are read one at a time."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Returns the name of the row in error messages."""

    def read(self, index: int) -> dict:
        """Returns the "text", the file "image" if the source has images, and any other fields."""

    def told(self) -> Iterable:
        """Yields what the digest covers; paths and the content of images are no part of it."""


class Captions:
    """A source of captions."""

    def __init__(self, rows: Rows, *, origin: str, size: int = 0):
        """Keeps the rows; `origin` names the source and its settings, in errors and in logs."""
        if size < 0:
            raise ValueError(
                f"{origin}: expected a size of at least 1, or 0 for images as they are, got {size}."
            )
        self._rows = rows
        self._origin = origin
        self._size = size

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"{self._origin}: no row {index} of {len(self)}")
        try:
            row = self._rows.read(int(index))
            # Files that were joined have a byte order mark in their middle.
            row["text"] = " ".join(row["text"].replace("\ufeff", "").split())
            if not row["text"]:
                raise ValueError("the caption is empty")
            if "image" in row:
                image = images_lib.cropped(row["image"], self._size)
                row = row | {"image": pixels.to_float(image)}
            return row
        except Exception as error:  # Pillow and the archives raise a dozen kinds for damaged files
            number = getattr(error, "errno", None)
            if isinstance(error, MemoryError) or number not in (None, errno.ENOENT):
                raise  # the machine is at fault, not the row
            name = self._rows.name(index)
            raise BadRow(f"{self._origin}: row {index} ({name}): {error}") from error

    @property
    def digest(self) -> str:
        """The digest of texts and names; paths and the content of images do not change it."""
        digest = hashlib.sha256(f"{len(self)} {self._size}".encode())
        for item in self._rows.told():
            digest.update(repr(item).encode())
        return digest.hexdigest()[:16]

    def __repr__(self):
        return f"Captions({self._origin}, size {self._size}, {len(self)} rows)"


@dataclasses.dataclass(frozen=True)
class Listed:
    """Rows in memory, with the names of their images in `files`, which is None without images."""

    names: list[str]
    texts: list[str]
    files: folder_lib.Directory | folder_lib.Archive | None
    categories: list[str] | None = None

    def __len__(self):
        return len(self.texts)

    def name(self, index):
        return self.names[index]

    def read(self, index):
        row = {"text": self.texts[index]}
        if self.categories:
            row["category"] = self.categories[index]
        if self.files:
            row["image"] = self.files.read(self.names[index])
        return row

    def told(self):
        return zip(self.texts, self.names, self.categories or self.names, strict=True)


@dataclasses.dataclass(frozen=True)
class Beside:
    """Images with their captions in .txt files of the same names."""

    names: list[str]
    files: folder_lib.Directory | folder_lib.Archive
    with_images: bool

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return self.names[index]

    def read(self, index):
        name = self.names[index]
        row = {"text": self.files.read(_stem(name) + ".txt").decode("utf-8-sig")}
        if self.with_images and name.endswith(".txt"):
            raise ValueError("there is no image of this name")
        if self.with_images:
            row["image"] = self.files.read(name)
        return row

    def told(self):
        there = set(self.files.names())
        for name in self.names:
            text = _stem(name) + ".txt"
            yield name, self.files.read(text) if text in there else None


@dataclasses.dataclass(frozen=True)
class Examples:
    """The first `per_image` captions of each example of a prepared dataset."""

    examples: Sequence
    per_image: int
    with_images: bool
    name_and_split: str

    def __len__(self):
        return len(self.examples) * self.per_image

    def name(self, index):
        return f"caption {index % self.per_image} of example {index // self.per_image}"

    def read(self, index):
        example = self.examples[index // self.per_image]
        texts = example["captions"]["text"]
        if index % self.per_image >= len(texts):
            raise ValueError(f"the image has {len(texts)} captions")
        row = {"text": texts[index % self.per_image].decode()}
        if self.with_images:
            row["image"] = example["image"]
        return row

    def told(self):
        yield self.name_and_split, self.per_image
        for i in np.linspace(0, len(self.examples) - 1, SAMPLED).astype(int).tolist():
            yield list(self.examples[i]["captions"]["text"])


def readable(source: Captions, indices: Iterable[int]) -> tuple[dict[int, dict], list[str]]:
    """Reads rows in threads, since Pillow decodes without Python's lock.

    Returns:
      The rows that can be read, by their indices; and for each other row, why it cannot.
    """

    def read(i):
        try:
            return source[i]
        except BadRow as error:
            return f"row {i}: {error}"

    indices = list(indices)
    with futures.ThreadPoolExecutor() as pool:
        found = list(zip(indices, pool.map(read, indices), strict=True))
    rows = {i: row for i, row in found if isinstance(row, dict)}
    reasons = [why for _, why in found if isinstance(why, str)]
    return rows, reasons


def refuse_if_many(skipped: Sequence[str], count: int):
    """Raises ValueError if all of `count` rows, or too many of them, were `skipped`."""
    if len(skipped) == count or len(skipped) > max(FEW, SHARE * count):
        raise ValueError(
            f"{len(skipped)} of {count} rows of the captions cannot be read, expected at most "
            f"{SHARE:.0%}; repair or remove them. The first: {'; '.join(skipped[:3])}."
        )


def coco(
    *,
    annotations: str,
    images: str = "",
    size: int = 0,
    limit: int = 0,
    one_per_image: bool = False,
) -> Captions:
    """Returns COCO's captions, in the order of their ids.

    Args:
      annotations: captions_train2017.json, or another file in the layout of COCO's captions.
      images: the directory of the images; "" = texts only.
      size: height and width of the images.
      limit: how many captions to keep, the first ones; 0 = all.
      one_per_image: whether to keep only the first caption of each image.

    Raises:
      ValueError: the file is missing, damaged or of another layout; the images are not there.
    """
    path = storage.path(annotations)
    files = _open_both(path, images)
    try:
        listed = json.loads(storage.local(path).read_bytes())
        # + "" raises TypeError for a name that is no string.
        names = {image["id"]: image["file_name"] + "" for image in listed["images"]}
        rows = sorted((a["id"], a["image_id"], a["caption"]) for a in listed["annotations"])
        rows = [
            (names.get(image, f"image {image}, which is not listed"), image, text)
            for _, image, text in rows
        ]
        whole = all(isinstance(text, str) for *_, text in rows)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected {COCO}, got something else ({error!r}); use captions_*.json, or "
            "copy it again."
        ) from error
    if not rows or not whole:
        got = "captions that are no text" if rows else "no captions"
        raise ValueError(f"{path}: expected {COCO}, got {got}; use captions_*.json.")
    if one_per_image:
        first = {}
        for row in rows:
            first.setdefault(row[1], row)
        rows = list(first.values())
    rows = _first(rows, limit, path)
    origin = f"coco {path}, images {images or 'none'}" + ", one per image" * one_per_image
    rows = Listed([name for name, *_ in rows], [text for *_, text in rows], files)
    return _checked(rows, origin, size)


def tfds(
    *,
    split: str,
    data_dir: str,
    name: str = "coco_captions",
    size: int = 0,
    per_image: int = 5,
    with_images: bool = True,
) -> Captions:
    """Returns the captions of a dataset that tensorflow-datasets has prepared as ArrayRecord files.

    The dataset needs the features "image" and "captions". TensorFlow is not needed.

    Args:
      split: as tensorflow-datasets writes it, such as "train" or "train[:1000]".
      data_dir: the directory in which the dataset was prepared.
      name: such as "coco_captions"; ":1.1.0" at the end chooses among several versions.
      size: height and width of the images.
      per_image: how many captions of each image to read; COCO's images have 5 to 7, and counting
        them would mean reading all images.
      with_images: False = texts only.

    Raises:
      ValueError: the dataset is not there as ArrayRecord files, or has no such split or features.
    """
    examples, features, origin = tfds_lib.open_split(name, split, data_dir)
    kind = getattr(features.get("captions"), "feature", None)
    if not isinstance(kind, tensorflow_datasets.features.FeaturesDict) or "text" not in kind:
        raise ValueError(
            f'{origin}: expected a feature "captions", a sequence of "text", '
            f"got {', '.join(features)}; use coco_captions."
        )
    if per_image < 1:
        raise ValueError(f"{origin}: expected a per_image of at least 1, got {per_image}; use 5.")
    rows = Examples(examples, per_image, with_images, f"{name} {split}")
    origin = f"{origin}, {per_image} per image{without(with_images)}"
    return Captions(rows, origin=origin, size=size)


def folder(*, path: str, size: int = 0, limit: int = 0, with_images: bool = True) -> Captions:
    """Returns the images of a directory or a .zip with their captions.

    The captions are in one file at the top, or in a .txt beside each image. The file is
    captions.txt or captions.tsv with lines "name, tab, caption", or metadata.jsonl with lines
    {"file_name": ..., "text": ...} as Hugging Face's imagefolder has it. Rows are in the order of
    that file; without such a file they are in the order of the images' names.

    Args:
      path: the directory or the .zip.
      size: height and width of the images.
      limit: how many rows to keep, the first ones; 0 = all.
      with_images: False = texts only.

    Raises:
      ValueError: there are no captions, a line is damaged, or the images are not there.
    """
    files = folder_lib.open_files(path)
    everything = set(files.names())
    lists = sorted(everything & PARSERS.keys())
    if len(lists) > 1:
        raise ValueError(
            f"{path}: expected captions in one file, got {', '.join(lists)}; remove all but one."
        )
    origin = f"{path}{without(with_images)}"
    if lists:
        rows = _lines(files.read(lists[0]), PARSERS[lists[0]], f"{path}: {lists[0]}")
        rows = _first(rows, limit, path)
        names = [name for name, _ in rows]
        texts = [text for _, text in rows]
        return _checked(Listed(names, texts, files if with_images else None), origin, size)
    names = folder_lib.image_names(everything)
    texts = {name for name in everything if name.endswith(".txt")}
    if not texts & {_stem(name) + ".txt" for name in names}:
        raise ValueError(
            f"{path}: no captions among {len(everything)} files, {len(names)} of them images; "
            f"expected {', '.join(sorted(PARSERS))}, or a .txt beside each image."
        )
    alone = texts - {_stem(name) + ".txt" for name in names}  # rows without an image
    rows = _first(sorted([*names, *alone]), limit, path)
    return Captions(Beside(rows, files, with_images), origin=origin, size=size)


def prompts(*, path: str, limit: int = 0) -> Captions:
    """Returns the prompts of a text file, one a line; an empty line is a bad row.

    Args:
      path: the file, in UTF-8.
      limit: how many lines to keep, the first ones; 0 = all.

    Raises:
      ValueError: the file is missing or empty, or it is no text.
    """
    try:
        texts = storage.local(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected a text file in UTF-8 with a prompt a line ({error}); check the path."
        ) from error
    if not texts[-1]:  # what follows the last line's end
        texts = texts[:-1]
    texts = _first(texts, limit, path)
    if not texts:
        raise ValueError(f"{path}: expected a prompt a line, got an empty file; write some.")
    names = [f"line {i + 1}" for i in range(len(texts))]
    return Captions(Listed(names, texts, None), origin=f"prompts {path}")


def _open_both(path, images):
    """Opens the images, or returns None for none; one error names all files that are missing."""
    problems = []
    opened = None
    if not path.is_file():
        problems.append(
            f"{path} does not exist; expected COCO's captions_*.json{published.published(path)}."
        )
    try:
        opened = folder_lib.open_files(images) if images else None
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(" ".join(problems))
    return opened


def _first(rows, limit, origin):
    """Returns the first `limit` rows, or all of them for the limit 0."""
    if limit < 0:
        raise ValueError(
            f"{origin}: expected a limit of at least 1, or 0 for all rows, got {limit}."
        )
    return rows[: limit or None]


def _checked(rows, origin, size):
    """Returns the source if its images are where they should be, and one of the first is there."""
    folder_lib.check_inside(rows.names if rows.files else (), origin)
    first = range(min(FIRST, len(rows)))
    problems = []
    for index in first:
        try:
            rows.read(index)
            break
        except (OSError, KeyError) as error:
            problems.append(str(error))
    if len(problems) == len(first):
        raise ValueError(
            f"{origin}: expected the images of its captions, got none of the first {len(first)} "
            f"({problems[0]}); check the path."
        )
    return Captions(rows, origin=origin, size=size)


def _lines(data, parse, origin):
    """Returns the pairs of name and caption; skips empty lines."""
    rows = []
    number = 1
    try:
        for line in data.decode("utf-8-sig").split("\n"):
            if line.strip():
                rows.append(parse(line))
            number += 1
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{origin}: expected lines {' or '.join(LINES)}, got something else in line {number} "
            f"({error!r})."
        ) from error
    if not rows:
        raise ValueError(f"{origin}: expected lines {' or '.join(LINES)}, got an empty file.")
    return rows


def _tabbed(line):
    name, text = line.split("\t", 1)
    return name, text


def _json_line(line):
    row = json.loads(line)
    return row["file_name"] + "", row["text"] + ""


PARSERS = {"captions.txt": _tabbed, "captions.tsv": _tabbed, "metadata.jsonl": _json_line}


def _stem(name):
    return name.rpartition(".")[0]


def without(with_images: bool) -> str:
    """Returns what the name of a source adds if it has no images."""
    return "" if with_images else ", texts only"
