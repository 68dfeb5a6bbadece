import colorsys

import numpy as np
import pytest
from PIL import Image

from dmd_jax.evals import drift

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 5, 7, 3)).astype(np.uint8)
IMAGES[0, 0] = 0  # black has no saturation


def test_sums():
    pixels = IMAGES.reshape(6, -1, 3) / 255
    saturation = [np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in image]) for image in pixels]
    luma = pixels @ [0.2126, 0.7152, 0.0722]
    expected = (6, luma.mean(1).sum(), np.sum(saturation), luma.std(1).sum())
    np.testing.assert_allclose(drift.sums(IMAGES), expected, rtol=1e-6)


def test_saturation_is_pillows():
    expected = sum(
        np.asarray(Image.fromarray(image).convert("HSV"))[..., 1].mean() / 255 for image in IMAGES
    )
    assert drift.sums(IMAGES).saturation == pytest.approx(
        expected, abs=6 / 255
    )  # Pillow cuts to bytes


def test_sums_add_up():
    whole, parts = drift.sums(IMAGES), drift.sums(IMAGES[:1]) + drift.sums(IMAGES[1:])
    assert isinstance(parts, drift.Sums) and whole.count == parts.count == 6
    np.testing.assert_allclose(whole, parts, rtol=1e-12)


def test_drift():
    half = IMAGES // 2
    found = drift.drift(drift.sums(IMAGES), drift.sums(half[:3]))
    real, fake = drift.sums(IMAGES), drift.sums(half[:3])
    assert found.keys() == {"brightness drift", "saturation drift", "contrast drift"}
    assert (
        found["brightness drift"] == pytest.approx(fake.brightness / 3 - real.brightness / 6)
        and found["brightness drift"] < 0
    )
    assert found["contrast drift"] < 0
    assert drift.drift(real, real) == {
        "brightness drift": 0,
        "saturation drift": 0,
        "contrast drift": 0,
    }


def test_each_drift_is_of_its_own():
    grey = np.full((1, 4, 4, 3), 100, np.uint8)
    board = grey + np.where(np.indices((4, 4)).sum(0) % 2, 50, -50).astype(np.int8)[
        None, ..., None
    ].view(np.uint8)
    found = drift.drift(drift.sums(grey), drift.sums(board))
    assert found == pytest.approx({"brightness drift": 0, "contrast drift": 50 / 255}, abs=1e-6)
    found = drift.drift(drift.sums(grey), drift.sums(grey + np.uint8(51)))
    assert found == pytest.approx({"brightness drift": 0.2, "contrast drift": 0}, abs=1e-6)
    red = grey * np.uint8([2, 1, 1])
    assert drift.drift(drift.sums(grey), drift.sums(red))["saturation drift"] == pytest.approx(0.5)


def test_grey_images_of_one_channel():
    grey = IMAGES[..., :1]
    np.testing.assert_allclose(drift.sums(grey), drift.sums(grey.repeat(3, axis=-1)))
    assert drift.sums(grey).saturation == 0


def test_what_is_refused():
    with pytest.raises(
        ValueError,
        match=r"expected images as uint8 \[N, H, W, 1 or 3\], got float32 \[6, 5, 7, 3\]",
    ):
        drift.sums(IMAGES.astype(np.float32))
    with pytest.raises(ValueError, match="needs images of both sets, got 6 and 0"):
        drift.drift(drift.sums(IMAGES), drift.sums(IMAGES[:0]))
