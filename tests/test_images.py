"""Sources of images: what they give, and what they refuse."""

import gzip
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile
from concurrent import futures

import grain
import jax
import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from dmd_jax.data import fashion_mnist, folder, pipeline, tfds
from dmd_jax.data import labels as labels_lib

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 4, 4, 3), np.uint8)
PIXELS[0, 0, 0] = (0, 255, 128)
LABELS = [3, 0, 1, 2, 2, 1]
NAMES = ["00000/a.png", "00000/b.PNG", "00001/c.webp", "00001/deep/er/d.png", "z.png", "zz.png"]


def encode(pixels, name="x.png"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file,
        {"webp": "webp", "jpg": "jpeg"}.get(name[-4:].strip("."), "png"),
        **{"lossless": True} if "webp" in name else {},
    )
    return file.getvalue()


def photos():
    """{name: content} of a folder."""
    files = {name: encode(p, name) for name, p in zip(NAMES, PIXELS, strict=True)}
    files["dataset.json"] = json.dumps(
        {"labels": [*zip(NAMES, LABELS, strict=True)][::-1]}
    ).encode()
    return files | {"notes.txt": b"no image"}


def write(path, files):
    """A directory, or a .zip."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in reversed(files.items()):
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


def check(source, pixels, labels):
    """Content, types and length."""
    items = [source[i] for i in range(len(source))]
    assert len(items) == len(labels)
    for item in items:
        assert (
            item["image"].dtype == np.float32
            and item["cond"].dtype == np.int32
            and item["cond"].shape == ()
        )
    np.testing.assert_allclose(
        np.stack([item["image"] for item in items]), pixels / 127.5 - 1, atol=1e-6
    )
    assert [int(item["cond"]) for item in items] == list(labels)
    assert abs(items[0]["image"]).max() <= 1


def check_in_pipeline(source):
    """Batches, the fingerprint, and reading by threads and by another process."""
    stream = {"images": pipeline.Stream(source, 4)}
    assert pipeline.fingerprint(stream, seed=0) == pipeline.fingerprint(stream, seed=0)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batch = next(pipeline.batches(stream, seed=0, start=3, sharding=sharding))["images"]
    assert batch["cond"].shape == (4,)
    rows = list(
        grain.MapDataset.source(source).to_iter_dataset(
            grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
        )
    )
    assert [r["cond"] for r in rows] == [source[i]["cond"] for i in range(len(source))]
    copy = pickle.loads(pickle.dumps(source))
    jax.tree.map(np.testing.assert_array_equal, copy[len(source) - 1], source[len(source) - 1])


# folder


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


# flips and labels


def test_flips_double_the_source(tmp_path):
    source = folder.read(
        path=str(write(tmp_path / "photos.zip", photos())), size=4, num_classes=4, x_flips=True
    )
    check(source, np.concatenate([PIXELS, PIXELS[:, :, ::-1]]), LABELS * 2)
    check_in_pipeline(source)
    with pytest.raises(IndexError):
        source[12]


def test_random_labels():
    source = labels_lib.random(num_classes=10, count=5000, seed=1)
    cond = np.array([source[i]["cond"] for i in range(len(source))])
    assert len(cond) == 5000 and cond.dtype == np.int32
    assert np.bincount(cond, minlength=10).min() > 400 and np.bincount(cond).shape == (10,)
    shorter, other = (
        labels_lib.random(num_classes=10, count=9, seed=1),
        labels_lib.random(num_classes=10, count=5000, seed=2),
    )
    assert [shorter[i]["cond"] for i in range(9)] == list(cond[:9])
    assert np.mean([other[i]["cond"] == cond[i] for i in range(5000)]) < 0.15
    check_in_pipeline(shorter)


def test_random_labels_are_independent_of_the_noise():
    """sampling.noise has the same key."""
    source = labels_lib.random(num_classes=10, count=2000, seed=1)
    noise = [
        np.random.Generator(np.random.Philox(key=[1, i])).standard_normal(4, np.float32)
        for i in range(2000)
    ]
    correlation = np.corrcoef(np.array(noise).T, [source[i]["cond"] for i in range(2000)])[-1, :-1]
    words = [np.random.Generator(np.random.Philox(key=[1, i])).integers(10) for i in range(2000)]
    assert abs(correlation).max() < 0.1
    assert np.mean([source[i]["cond"] == words[i] for i in range(2000)]) < 0.15


# Fashion-MNIST

GREY = RNG.integers(0, 256, (7, 28, 28), np.uint8)
CLASSES = np.array([9, 0, 1, 2, 3, 4, 5], np.uint8)


def to_idx(array):
    return (
        bytes([0, 0, 8, array.ndim])
        + b"".join(n.to_bytes(4, "big") for n in array.shape)
        + array.tobytes()
    )


def write_idx(path, pixels=GREY, labels=CLASSES, split="t10k", compress=True):
    for name, array in {"images-idx3": pixels, "labels-idx1": labels}.items():
        content = to_idx(array)
        (path / f"{split}-{name}-ubyte{'.gz' * compress}").write_bytes(
            gzip.compress(content) if compress else content
        )
    return str(path)


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist(tmp_path, compress):
    source = fashion_mnist.make(split="test", path=write_idx(tmp_path, compress=compress))
    expected = np.zeros((7, 32, 32, 1))
    expected[:, 2:30, 2:30, 0] = GREY
    check(source, expected, CLASSES)
    check_in_pipeline(source)
    assert source.image.dtype == np.uint8
    np.testing.assert_array_equal(source[3]["image"][[0, 1, 30, 31]], -1)
    check(fashion_mnist.make(split="test", path=str(tmp_path), size=28), GREY[..., None], CLASSES)
    check(
        fashion_mnist.make(split="test", path=str(tmp_path), size=28, limit=3),
        GREY[:3, ..., None],
        CLASSES[:3],
    )
    framed = np.pad(GREY, ((0, 0), (2, 2), (2, 2))).astype(np.float64)
    halved = (
        framed[:, ::2, ::2] + framed[:, 1::2, ::2] + framed[:, ::2, 1::2] + framed[:, 1::2, 1::2]
    ) / 4
    small = fashion_mnist.make(split="test", path=str(tmp_path), size=16)
    assert np.abs((small[5]["image"][..., 0] + 1) * 127.5 - halved[5]).max() <= 0.5 + 1e-4
    both = np.concatenate([GREY, GREY[:, :, ::-1]])[..., None]
    check(
        fashion_mnist.make(split="test", path=str(tmp_path), size=28, x_flips=True),
        both,
        [*CLASSES, *CLASSES],
    )


def test_fashion_mnist_of_debian():
    paths = [p for p in (fashion_mnist.FASHION_MNIST,) if pathlib.Path(p).exists()]
    if not paths:
        pytest.skip("the package dataset-fashion-mnist is not installed")
    source = fashion_mnist.make(split="test", path=paths[0])
    assert len(source) == 10000 and source[0]["image"].shape == (32, 32, 1)
    np.testing.assert_array_equal(np.bincount(source.cond), 1000)
    assert source[0]["cond"] == 9  # an ankle boot
    assert len(fashion_mnist.make(split="train", path=paths[0], x_flips=True)) == 120000


def test_fashion_mnist_is_missing(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"no Fashion-MNIST in .*train-images-idx3-ubyte\.gz does not exist\. "
        "Run: apt-get install dataset-fashion-mnist; "
        "or without root: apt-get download dataset-fashion-mnist && dpkg-deb -x .* "
        "and set path='DIR/usr/share/datasets/fashion-mnist'",
    ):
        fashion_mnist.make(split="train", path=write_idx(tmp_path))


def test_fashion_mnist_arguments(tmp_path):
    with pytest.raises(
        ValueError, match=r"Fashion-MNIST has no split 'held_out'; use one of train, test\."
    ):
        fashion_mnist.make(split="held_out", path=str(tmp_path))
    for size in (26, 31):
        with pytest.raises(
            ValueError,
            match=rf"expected 16 or an even size of at least 28, got {size}; use 16, 28 or 32",
        ):
            fashion_mnist.make(split="test", path=str(tmp_path), size=size)


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [(GREY, CLASSES[:6]), (GREY[:, :27], CLASSES), (GREY, CLASSES + 1)],
    ids=["count", "size", "class"],
)
def test_another_mnist(tmp_path, pixels, labels):
    with pytest.raises(
        ValueError,
        match=r"expected images \[N, 28, 28\] and N labels 0 to 9, "
        r"got \[7, 2.*is this Fashion-MNIST\?",
    ):
        fashion_mnist.make(split="test", path=write_idx(tmp_path, pixels, labels))


WHOLE = to_idx(GREY)
DAMAGED = {
    "magic": (
        gzip.compress(b"\0\0\x0d" + WHOLE[3:]),
        r"expected an IDX file that begins with 00000803, got 00000d03; install",
    ),
    "dimensions": (
        gzip.compress(to_idx(GREY[0])),
        r"expected an IDX file that begins with 00000803, got 00000802",
    ),
    "empty": (b"", r"begins with 00000803, got ; install|is damaged"),
    "short": (
        gzip.compress(WHOLE[:-1]),
        rf"expected {len(WHOLE)} bytes for \[7, 28, 28\], got {len(WHOLE) - 1}; install",
    ),
    "long": (
        gzip.compress(WHOLE + b"x"),
        rf"expected {len(WHOLE)} bytes for \[7, 28, 28\], got {len(WHOLE) + 1}; install",
    ),
    "header": (gzip.compress(WHOLE[:6]), r"expected \d+ bytes for .*, got 6; install"),
    "gz_short": (
        gzip.compress(WHOLE)[:-99],
        r"images-idx3-ubyte\.gz is damaged \(.*\); install it again",
    ),
    "gz_garbage": (b"garbage", r"images-idx3-ubyte\.gz is damaged \(Not a gzipped file"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_idx(tmp_path, case):
    content, message = DAMAGED[case]
    path = write_idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        fashion_mnist.make(split="test", path=path)


# tensorflow-datasets


class TinyCifar(tensorflow_datasets.core.GeneratorBasedBuilder):
    """Like cifar10. `labels` None = none; `pixels` may be of several shapes, or bytes."""

    __module__ = "tiny_cifar"  # in a package, tensorflow-datasets would need importlib_resources
    VERSION = tensorflow_datasets.core.Version("3.0.2")

    def __init__(self, pixels=PIXELS, labels=LABELS, kind=None, image="image", **settings):
        self._pixels, self._labels, self._image = pixels, labels, image
        self._kind = kind or tensorflow_datasets.features.ClassLabel(num_classes=4)
        super().__init__(**settings)

    def _info(self):
        features = {
            "id": tensorflow_datasets.features.Text(),
            self._image: tensorflow_datasets.features.Image(shape=(None, None, 3)),
        }
        if self._labels is not None:
            features["label"] = self._kind
        features = tensorflow_datasets.features.FeaturesDict(features)
        return tensorflow_datasets.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, pixels in enumerate(self._pixels):
            content = pixels if isinstance(pixels, bytes) else encode(pixels)
            row = {"id": str(i), self._image: io.BytesIO(content)}
            yield i, row | ({} if self._labels is None else {"label": self._labels[i]})


def prepare(path, file_format="array_record", **settings):
    TinyCifar(data_dir=path, file_format=file_format, **settings).download_and_prepare()
    return str(path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"))


def read(data_dir, split="train", **settings):
    return tfds.read(name="tiny_cifar", split=split, data_dir=data_dir, **settings)


def test_tfds(prepared):
    source = read(prepared, size=4)
    check(source, PIXELS, LABELS)
    check_in_pipeline(source)
    check(read(prepared, "train[2:4]"), PIXELS[2:4], LABELS[2:4])
    check(read(prepared, x_flips=True), np.concatenate([PIXELS, PIXELS[:, :, ::-1]]), LABELS * 2)


def test_tfds_without_labels(tmp_path):
    check(read(prepare(tmp_path, labels=None)), PIXELS, [0] * 6)


def test_tfds_needs_no_tensorflow(prepared, tmp_path):
    """Even where it is installed."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("")
    code = f"""
import sys
from dmd_jax.data import tfds
source = tfds.read(name="tiny_cifar", split="train", data_dir={prepared!r}, size=4)
assert source[5]["image"].shape == (4, 4, 3)
assert "tensorflow" not in sys.modules
import tensorflow
print(tensorflow.__file__)
"""
    root = str(pathlib.Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_tfds_is_not_prepared(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("downloads")

    monkeypatch.setattr(tensorflow_datasets.core.DatasetBuilder, "download_and_prepare", refuse)
    with pytest.raises(ValueError) as error:
        tfds.read(name="cifar10", split="train", data_dir=str(tmp_path))
    command = (
        f"tfds.builder('cifar10', data_dir='{tmp_path}', file_format='array_record')"
        ".download_and_prepare()"
    )
    assert f'prepare it: python -c "import tensorflow_datasets as tfds; {command}"' in str(
        error.value
    )
    assert f"no cifar10 in {tmp_path}: expected {tmp_path}/cifar10/<version>/features.json" in str(
        error.value
    )
    with pytest.raises(
        ValueError,
        match=r"no downsampled_imagenet/64x64 in .*tfds\.builder\('downsampled_imagenet/64x64', ",
    ):
        tfds.read(name="downsampled_imagenet/64x64", split="train", data_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_tfds_in_another_format(tmp_path):
    path = prepare(tmp_path)
    info = tmp_path / "tiny_cifar" / "3.0.2" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(
        ValueError,
        match=r"tiny_cifar in .*: expected array_record files, got tfrecord; prepare it: python -c",
    ):
        read(path)


def test_tfds_split(prepared):
    with pytest.raises(
        ValueError, match=r"tiny_cifar in .* has no split 'test' \((.|\n)*\); there are: train\."
    ):
        read(prepared, "test")
    with pytest.raises(
        ValueError, match=r"has no split 'train\[:0\]' \((.|\n)*\); there are: train"
    ):
        read(prepared, "train[:0]")


def test_tfds_versions(prepared, tmp_path):
    path = prepare(tmp_path)
    (tmp_path / "tiny_cifar" / "3.0.2").rename(tmp_path / "tiny_cifar" / "3.0.1")
    prepare(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"several versions of tiny_cifar in .*: 3\.0\.1, 3\.0\.2; "
        "choose one with name='tiny_cifar:<version>'",
    ):
        read(path)
    check(tfds.read(name="tiny_cifar:3.0.2", split="train", data_dir=path), PIXELS, LABELS)


def test_tfds_of_another_size(prepared):
    with pytest.raises(
        ValueError,
        match=r"tiny_cifar in .*, train: image 0: expected 8x8 pixels, got 4x4 \(HxW\); resize",
    ):
        read(prepared, size=8)


def test_tfds_images_are_refused_when_they_are_reached(tmp_path):
    pixels = [
        PIXELS[0],
        np.zeros((5, 5, 3), np.uint8),
        PIXELS[0, ..., 0],
        encode(PIXELS[0])[:40],
        PIXELS[1],
    ]
    source = read(prepare(tmp_path, pixels=pixels, labels=[0, 1, 2, 3, -1]))
    messages = [
        r"image 1: expected 4x4 pixels, got 5x5",
        r"image 2: mixed modes: expected RGB as in 0, got L",
        r"image 3 cannot be read",
        r"image 4: expected a label of 0 or more, got -1; use a split that has labels",
    ]
    for i, message in enumerate(messages, start=1):
        with pytest.raises(ValueError, match=message):
            source[i]


def test_tfds_oblong(tmp_path):
    with pytest.raises(
        ValueError, match=r"image 0: expected a square, got 3x4; crop the images first"
    ):
        read(prepare(tmp_path, pixels=PIXELS[:, :3]))


def test_tfds_of_other_features(tmp_path):
    with pytest.raises(
        ValueError, match=r'expected a feature "image", got .*picture.*; use a dataset of images'
    ):
        read(prepare(tmp_path / "a", image="picture"))
    with pytest.raises(
        ValueError,
        match=r'expected a whole number as "label", got .*; prepare it with class labels',
    ):
        read(prepare(tmp_path / "b", kind=tensorflow_datasets.features.Scalar(np.float32)))


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_tfds_damaged_shard(tmp_path, damage):
    path = prepare(tmp_path)
    (shard,) = tmp_path.rglob("*.array_record*")
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"tiny_cifar in .*, train: image 0 cannot be read \("):
        read(path)
