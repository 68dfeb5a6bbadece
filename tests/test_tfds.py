"""Datasets of tensorflow-datasets: what they give, and what they refuse."""

import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets

from dmd_jax.data import tfds
from tests.helpers.sources import LABELS, PIXELS, check, check_in_pipeline, encode


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
