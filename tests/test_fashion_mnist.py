"""Fashion-MNIST's files: what they give, and what they refuse."""

import gzip
import pathlib

import numpy as np
import pytest

from dmd_jax.data import fashion_mnist
from tests.helpers.sources import RNG, check, check_in_pipeline

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
