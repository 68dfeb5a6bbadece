"""Captions, with images or without, as random-access sources of {"text": str, "image": [H, W, 3]
float32 in [-1, 1]}.

Images are read when they are asked for, cropped to the square in their middle and resized by
Lanczos' filter to `size`; 0 = they stay as they are. Runs of blanks in a text become one. A row
that cannot be given raises BadRow, and only then; a source that cannot be given raises ValueError
at once.
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
FIRST = 16  # rows; if the images of none of them are there, the path is wrong
# Examples of a prepared dataset, which has a version; to read the captions of all takes minutes.
SAMPLED = 16
# Bad rows beyond both are no accident: COCO and LAION as downloaded have a few in a thousand.
FEW, SHARE = (
    10,
    0.05,
)
COCO = '{"images": [{"id": 9, "file_name": "9.jpg"}, ...], "annotations": [{"id": 1, "image_id": 9, "caption": "A cat."}, ...]}'


class BadRow(ValueError):
    """A row that cannot be given: its image is missing or damaged, or its caption is empty."""


class Rows(Protocol):
    """What `Captions` reads, one row at a time; at least one."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What errors call the row."""

    def read(self, index: int) -> dict:
        """The "text", the file "image" if it is asked for, and whatever else the row says."""

    def told(self) -> Iterable:
        """What the rows follow from, wherever it lies; without opening every image."""


class Captions:
    """A source of captions."""

    def __init__(self, rows: Rows, *, origin: str, size: int = 0):
        """`origin` names the source, with all that it depends on."""
        if size < 0:
            raise ValueError(
                f"{origin}: expected a size of at least 1, or 0 for images as they are, got {size}."
            )
        self._rows, self._origin, self._size = rows, origin, size

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"{self._origin}: no row {index} of {len(self)}")
        try:
            row = self._rows.read(int(index))
            # A byte order mark, also of files put together.
            row["text"] = " ".join(row["text"].replace("\ufeff", "").split())
            if not row["text"]:
                raise ValueError("the caption is empty")
            return row | (
                {"image": pixels.to_float(images_lib.cropped(row["image"], self._size))}
                if "image" in row
                else {}
            )
        except Exception as error:  # Pillow and the archives raise a dozen kinds for damaged files
            if isinstance(error, MemoryError) or getattr(error, "errno", None) not in (
                None,
                errno.ENOENT,
            ):
                raise  # the machine's fault
            raise BadRow(
                f"{self._origin}: row {index} ({self._rows.name(index)}): {error}"
            ) from error

    @property
    def digest(self) -> str:
        """Of texts and names, not of where they lie, nor of the images' content."""
        digest = hashlib.sha256(f"{len(self)} {self._size}".encode())
        for item in self._rows.told():
            digest.update(repr(item).encode())
        return digest.hexdigest()[:16]

    def __repr__(self):
        return f"Captions({self._origin}, size {self._size}, {len(self)} rows)"


@dataclasses.dataclass(frozen=True)
class Listed:
    """Rows in memory; their images, if asked for, are `files` of these names."""

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
        return row | ({"image": self.files.read(self.names[index])} if self.files else {})

    def told(self):
        return zip(self.texts, self.names, self.categories or self.names, strict=True)


@dataclasses.dataclass(frozen=True)
class Beside:
    """Images, each with a .txt of its name beside it."""

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
        return row | ({"image": self.files.read(name)} if self.with_images else {})

    def told(self):
        there = set(self.files.names())
        for name in self.names:
            text = _stem(name) + ".txt"
            yield name, self.files.read(text) if text in there else None


@dataclasses.dataclass(frozen=True)
class Examples:
    """The first captions of each example of a prepared dataset."""

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
        return row | ({"image": example["image"]} if self.with_images else {})

    def told(self):
        yield self.name_and_split, self.per_image
        for i in np.linspace(0, len(self.examples) - 1, SAMPLED).astype(int).tolist():
            yield list(self.examples[i]["captions"]["text"])


def readable(source: Captions, indices: Iterable[int]) -> tuple[dict[int, dict], list[str]]:
    """The rows that can be given, by their indices, and why the others cannot.

    Threads read them: Pillow decodes without Python's lock.
    """

    def read(i):
        try:
            return source[i]
        except BadRow as error:
            return f"row {i}: {error}"

    indices = list(indices)
    with futures.ThreadPoolExecutor() as pool:
        found = list(zip(indices, pool.map(read, indices), strict=True))
    return {i: row for i, row in found if isinstance(row, dict)}, [
        why for _, why in found if isinstance(why, str)
    ]


def refuse_if_many(skipped: Sequence[str], count: int):
    """Raises ValueError if of `count` rows too many, or all, were `skipped`."""
    if len(skipped) == count or len(skipped) > max(FEW, SHARE * count):
        raise ValueError(
            f"{len(skipped)} of {count} rows of the captions cannot be read, expected at most "
            f"{SHARE:.0%}; mend or remove them. "
            f"The first: {'; '.join(skipped[:3])}."
        )


def coco(
    *,
    annotations: str,
    images: str = "",
    size: int = 0,
    limit: int = 0,
    one_per_image: bool = False,
) -> Captions:
    """COCO's captions, in the order of their ids.

    Args:
      annotations: captions_train2017.json, or another file in the layout of COCO's captions.
      images: the directory of the images; "" = texts only.
      size: height and width of the images.
      limit: only the first captions; 0 = all.
      one_per_image: only the first caption of each image.

    Raises:
      ValueError: the file is missing, damaged or of another layout; the images are not there.
    """
    path = storage.path(annotations)
    files = _open_both(path, images)
    try:
        listed = json.loads(storage.local(path).read_bytes())
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
        raise ValueError(
            f"{path}: expected {COCO}, got "
            f"{'captions that are no text' if rows else 'no captions'}; use captions_*.json."
        )
    if one_per_image:
        first = {}
        for row in rows:
            first.setdefault(row[1], row)
        rows = list(first.values())
    rows = _first(rows, limit, path)
    origin = f"coco {path}, images {images or 'none'}" + ", one per image" * one_per_image
    return _checked(
        Listed([name for name, *_ in rows], [text for *_, text in rows], files), origin, size
    )


def tfds(
    *,
    split: str,
    data_dir: str,
    name: str = "coco_captions",
    size: int = 0,
    per_image: int = 5,
    with_images: bool = True,
) -> Captions:
    """A dataset of images with "captions" that tensorflow-datasets has prepared as ArrayRecord
    files.

    TensorFlow is not needed.

    Args:
      split: as tensorflow-datasets writes it, "train[:1000]" too.
      data_dir: where it was prepared.
      name: "coco_captions"; ":1.1.0" at the end chooses among several versions.
      size: height and width of the images.
      per_image: how many captions of each image; COCO's have 5 to 7, which only a pass over all
        images could count.
      with_images: False = texts only.

    Raises:
      ValueError: the dataset is not there as ArrayRecord files, or has no such split or features.
    """
    examples, features, origin = tfds_lib.open_split(name, split, data_dir)
    kind = getattr(features.get("captions"), "feature", None)
    if not isinstance(kind, tensorflow_datasets.features.FeaturesDict) or "text" not in kind:
        raise ValueError(
            f'{origin}: expected a feature "captions", a sequence of "text", got {", ".join(features)}; use coco_captions.'
        )
    if per_image < 1:
        raise ValueError(f"{origin}: expected a per_image of at least 1, got {per_image}; use 5.")
    rows = Examples(examples, per_image, with_images, f"{name} {split}")
    return Captions(
        rows, origin=f"{origin}, {per_image} per image{without(with_images)}", size=size
    )


def folder(*, path: str, size: int = 0, limit: int = 0, with_images: bool = True) -> Captions:
    """The images of a directory or a .zip, with captions in one file at its top or in a .txt beside
    each image.

    The file is captions.txt or captions.tsv with lines "name, tab, caption", in its order; or
    metadata.jsonl with lines {"file_name": ..., "text": ...} as Hugging Face's imagefolder has it.
    Without one, rows are in the order of the images' names.

    Args:
      path: of the directory or the .zip.
      size: height and width of the images.
      limit: only the first rows; 0 = all.
      with_images: False = texts only.

    Raises:
      ValueError: there is nothing of the kind, a line is damaged, or the images are not there.
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
        rows = _first(
            _lines(files.read(lists[0]), PARSERS[lists[0]], f"{path}: {lists[0]}"), limit, path
        )
        return _checked(
            Listed(
                [name for name, _ in rows],
                [text for _, text in rows],
                files if with_images else None,
            ),
            origin,
            size,
        )
    names = folder_lib.image_names(everything)
    texts = {name for name in everything if name.endswith(".txt")}
    if not texts & {_stem(name) + ".txt" for name in names}:
        raise ValueError(
            f"{path}: no captions among {len(everything)} files, {len(names)} of them images; "
            f"expected {', '.join(sorted(PARSERS))}, or "
            "a .txt beside each image."
        )
    alone = texts - {_stem(name) + ".txt" for name in names}
    return Captions(
        Beside(_first(sorted([*names, *alone]), limit, path), files, with_images),
        origin=origin,
        size=size,
    )


def prompts(*, path: str, limit: int = 0) -> Captions:
    """A text file with a prompt a line; an empty line is a bad row.

    Args:
      path: of the file, UTF-8.
      limit: only the first lines; 0 = all.

    Raises:
      ValueError: the file is missing, empty or no text.
    """
    try:
        texts = storage.local(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected a text file in UTF-8 with a prompt a line ({error}); check the path."
        ) from error
    texts = _first(texts[: -1 if not texts[-1] else None], limit, path)
    if not texts:
        raise ValueError(f"{path}: expected a prompt a line, got an empty file; write some.")
    return Captions(
        Listed([f"line {i + 1}" for i in range(len(texts))], texts, None), origin=f"prompts {path}"
    )


def _open_both(path, images):
    """The images, or None; says at once if annotations and images are missing."""
    problems, opened = [], None
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
    """The first `limit` rows, or all."""
    if limit < 0:
        raise ValueError(
            f"{origin}: expected a limit of at least 1, or 0 for all rows, got {limit}."
        )
    return rows[: limit or None]


def _checked(rows, origin, size):
    """The source, if any of its first images can be read."""
    first, problems = range(min(FIRST, len(rows))), []
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
    """The pairs of name and caption; empty lines are passed over."""
    rows, number = [], 1
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
    """What the origin of a source says where images are left out."""
    return "" if with_images else ", texts only"
