"""Directories and archives of images: what they give, and what they refuse."""

import json
import os
from concurrent import futures

import numpy as np
import pytest

from dmd_jax.data import folder
from tests.helpers.sources import (
    LABELS,
    NAMES,
    PIXELS,
    RNG,
    check,
    check_in_pipeline,
    encode,
    photos,
    write,
)


@pytest.mark.parametrize("name", ["photos", "photos.zip"])
def test_folder(tmp_path, name):
    path = write(tmp_path / name, photos())
    source = folder.read(path=str(path), size=4, num_classes=4)
    check(source, PIXELS, LABELS)
    check_in_pipeline(source)
    check(folder.read(path=str(path), size=4), PIXELS, [0] * 6)


def test_extremes_are_exact(tmp_path):
    source = folder.read(path=str(write(tmp_path / "photos", photos())), size=4)
    np.testing.assert_array_equal(source[0]["image"][0, 0, :2], [-1, 1])


@pytest.mark.parametrize("name", ["photos", "photos.zip"])
def test_grey_jpegs_without_labels(tmp_path, name):
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 8
    files = {"a.jpg": encode(grey, "a.jpg"), "dataset.json": b'{"labels": null}'}
    source = folder.read(path=str(write(tmp_path / name, files)), size=4)
    assert source[0]["image"].shape == (4, 4, 1)
    np.testing.assert_allclose(source[0]["image"][..., 0], grey / 127.5 - 1, atol=0.06)


def test_zip_is_shared_by_threads_and_reopened_after_fork(tmp_path):
    source = folder.read(path=str(write(tmp_path / "photos.zip", photos())), size=4, num_classes=4)
    with futures.ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: source[i % 6]["image"], range(300)))
    np.testing.assert_allclose(np.stack(got), np.tile(PIXELS, (50, 1, 1, 1)) / 127.5 - 1, atol=1e-6)
    archive = source._records._files
    mine = archive._handle()
    assert archive._handle() is mine
    pid, os.getpid = os.getpid, lambda: -1
    try:
        assert archive._handle() is not mine
    finally:
        os.getpid = pid


def test_reading_is_lazy(tmp_path, monkeypatch):
    path, opened = write(tmp_path / "photos", photos()), []
    monkeypatch.setattr(
        folder.Directory,
        "read",
        lambda self, name: opened.append(name) or (self._path / name).read_bytes(),
    )
    source = folder.read(path=str(path), size=4)
    assert opened == [NAMES[0]]
    assert source[4] and opened == [NAMES[0], NAMES[4]]
    for index in (6, -1):
        with pytest.raises(IndexError, match=f"photos: no image {index} of 6"):
            source[index]


def replaced(**changes):
    return photos() | changes


def labels_json(labels):
    return {"dataset.json": json.dumps({"labels": labels}).encode()}


PAIRS = [list(p) for p in zip(NAMES, LABELS, strict=True)]
FIRST = {
    "no_images": (
        {"notes.txt": b""},
        r"photos(\.zip)?: no images; expected files that end in \.png, \.jpg, .*got 1 others; "
        "check the path",
    ),
    "size_of_the_first": (
        replaced(**{NAMES[0]: encode(PIXELS[0, :3])}),
        r"image 00000/a\.png: expected 4x4 pixels, got 3x4 \(HxW\); resize",
    ),
    "mode_of_the_first": (
        replaced(**{NAMES[0]: encode(np.zeros((4, 4, 4), np.uint8))}),
        r"image 00000/a\.png: expected mode RGB or L \(8 bit grey\), got RGBA; convert",
    ),
    "no_labels": (
        {"a.png": encode(PIXELS[0])},
        r"expected labels of 3 classes, got no dataset\.json; add them, or set num_classes=0",
    ),
    "null_labels": (
        replaced(**labels_json(None)),
        r"expected labels of 3 classes, got null labels in dataset\.json",
    ),
    "missing_labels": (
        replaced(**labels_json(PAIRS[2:])),
        r"2 of 6 images have no label in dataset\.json: 00000/a\.png, 00000/b\.PNG; add them",
    ),
    "absent_images": (
        replaced(**labels_json(PAIRS + [["y.png", 1]])),
        r"has 1 images that are not there: y\.png; restore",
    ),
    "labels_out_of_range": (
        replaced(**labels_json([[n, -1 if n == "z.png" else c] for n, c in PAIRS])),
        r"expected labels 0 to 2, got 2 others in dataset\.json: 00000/a\.png \(3\), "
        r"z\.png \(-1\); set num_classes",
    ),
    "json_cut_short": (
        replaced(**{"dataset.json": b'{"labels": [["a'}),
        r"dataset\.json is damaged; expected .*with every image once",
    ),
    "json_without_key": (replaced(**{"dataset.json": b"{}"}), "dataset.json is damaged"),
    "json_of_fractions": (
        replaced(**labels_json([[n, c + 0.5] for n, c in PAIRS])),
        "dataset.json is damaged",
    ),
    "json_with_an_image_twice": (
        replaced(**labels_json(PAIRS + [[NAMES[0], 0]])),
        "dataset.json is damaged",
    ),
}


@pytest.mark.parametrize("name", ["photos", "photos.zip"])
@pytest.mark.parametrize("case", FIRST)
def test_folder_is_refused_at_once(tmp_path, name, case):
    files, message = FIRST[case]
    with pytest.raises(ValueError, match=message):
        folder.read(
            path=str(write(tmp_path / name, files)),
            size=4,
            num_classes=4 if case.endswith("the_first") else 3,
        )


LATER = {
    "size": (
        encode(RNG.integers(0, 9, (5, 4, 3), np.uint8)),
        r"image z\.png: expected 4x4 pixels, got 5x4 \(HxW\); resize",
    ),
    "mode": (
        encode(PIXELS[0, ..., 0]),
        r"image z\.png: mixed modes: expected RGB as in 00000/a\.png, got L; convert",
    ),
    "garbage": (b"garbage", r"image z\.png cannot be read \(cannot identify image.*replace it"),
    "cut_short": (encode(PIXELS[0])[:-30], r"image z\.png cannot be read \(.*; replace it"),
    "empty": (b"", r"image z\.png cannot be read"),
}


@pytest.mark.parametrize("name", ["photos", "photos.zip"])
@pytest.mark.parametrize("case", LATER)
def test_image_is_refused_when_it_is_reached(tmp_path, name, case):
    content, message = LATER[case]
    source = folder.read(path=str(write(tmp_path / name, replaced(**{"z.png": content}))), size=4)
    assert source[3] and source[5]
    with pytest.raises(ValueError, match=message):
        source[4]


def test_flipped_byte_in_a_zip(tmp_path):
    path = write(tmp_path / "photos.zip", photos())
    content = bytearray(path.read_bytes())
    content[content.index(photos()["z.png"]) + 60] ^= 1
    path.write_bytes(content)
    source = folder.read(path=str(path), size=4)
    with pytest.raises(ValueError, match=r"image z\.png cannot be read \(Bad CRC-32"):
        source[4]


def test_paths_that_hold_no_folder(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"tar")
    (tmp_path / "a.zip").write_bytes(b"garbage")
    with pytest.raises(
        ValueError,
        match=r"nowhere: expected a directory or a \.zip of images, got nothing there; "
        "check the path",
    ):
        folder.read(path=str(tmp_path / "nowhere"), size=4)
    with pytest.raises(
        ValueError, match=r"a\.tar: expected a directory or a \.zip of images, got another file"
    ):
        folder.read(path=str(tmp_path / "a.tar"), size=4)
    with pytest.raises(ValueError, match=r"a\.zip is a damaged \.zip \(.*\); copy it again"):
        folder.read(path=str(tmp_path / "a.zip"), size=4)


def test_flips_double_the_source(tmp_path):
    source = folder.read(
        path=str(write(tmp_path / "photos.zip", photos())), size=4, num_classes=4, x_flips=True
    )
    check(source, np.concatenate([PIXELS, PIXELS[:, :, ::-1]]), LABELS * 2)
    check_in_pipeline(source)
    with pytest.raises(IndexError):
        source[12]
