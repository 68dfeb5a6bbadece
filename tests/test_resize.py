"""Resizing on the devices against Pillow, clean-fid's chain and torchvision's crop."""

import importlib
import io

import jax
import numpy as np
import pytest
from PIL import Image

from dmd_jax import sharding
from dmd_jax.data import images as images_lib
from dmd_jax.features import inception, resize

PILLOW = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


def pillow(images, size, filter):
    return np.stack(
        [
            np.asarray(Image.fromarray(image).resize((size, size), PILLOW[filter]))
            for image in images
        ]
    )


def pillow_floats(images, size, filter):
    planes = np.moveaxis(images, -1, 1).reshape(-1, *images.shape[1:3]).astype(np.float32)
    planes = pillow(planes, size, filter).reshape(len(images), images.shape[-1], size, size)
    return np.moveaxis(planes, 1, -1)


def extremes(height, width):
    """Returns noise, the two extremes at random, a checkerboard, ramps and a white image.

    Filters overshoot on some of them, and round at a half on others.
    """
    rng = np.random.default_rng(height)
    down, right = np.indices((height, width))
    ramps = np.stack([down * 255 // height, right * 255 // width, (down + right) % 256], axis=-1)
    board = np.repeat((down + right)[..., None] % 2 * 255, 3, axis=-1)
    noise, two = (
        rng.integers(0, 256, (height, width, 3)),
        rng.integers(0, 2, (height, width, 3)) * 255,
    )
    return np.stack([noise, two, board, ramps, np.full((height, width, 3), 255)]).astype(np.uint8)


SIZES = [
    (1, 7),
    (2, 1),
    (8, 3),
    (31, 32),
    (64, 299),
    (13, 97),
    (97, 13),
    (200, 7),
    (256, 224),
    (299, 256),
    (333, 333),
]


@pytest.mark.parametrize("filter", PILLOW)
@pytest.mark.parametrize("size, target", SIZES)
def test_bytes_are_pillows(size, target, filter):
    images = extremes(size, size)
    found = resize.bytes_resize(images.astype(np.float32), target, filter)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, pillow(images, target, filter))


@pytest.mark.parametrize("filter", PILLOW)
@pytest.mark.parametrize("size, target", SIZES)
def test_floats_are_pillows(size, target, filter):
    images = extremes(size, size)
    expected = pillow_floats(images, target, filter)
    np.testing.assert_allclose(
        resize.float_resize(images.astype(np.float32), target, filter), expected, atol=1e-4
    )
    if 2 < size < target:
        assert expected.min() < -1 or expected.max() > 256  # the overshoot is there


@pytest.mark.parametrize("height, width, target", [(20, 32, 24), (24, 40, 24), (40, 24, 24)])
def test_sides_of_their_own(height, width, target):
    images = extremes(height, width)
    np.testing.assert_array_equal(
        resize.bytes_resize(images.astype(np.float32), target, "lanczos"),
        pillow(images, target, "lanczos"),
    )


@pytest.mark.parametrize("height, width", [(512, 512), (480, 640)])
def test_the_chain_of_coco(height, width):
    """Images of 512 x 512 or 640 x 480 become 256 by Lanczos in bytes, then 299 bicubically.

    As in clean-fid, the second step is in float and the overshoot is clipped.
    """
    images = extremes(height, width)
    left = (width - height) // 2
    small = np.stack(
        [
            np.asarray(
                Image.fromarray(image)
                .crop((left, 0, left + height, height))
                .resize((256, 256), Image.Resampling.LANCZOS)
            )
            for image in images
        ]
    )
    found = jax.jit(lambda x: resize.bytes_resize(resize.center_crop(x), 256, "lanczos"))(
        images.astype(np.float32)
    )
    np.testing.assert_array_equal(found, small)
    expected = (pillow_floats(small, 299, "bicubic").clip(0, 255) - 128) / 128
    np.testing.assert_allclose(jax.jit(inception.clean_input)(found), expected, atol=1e-6)


def test_clean_fids_own_resizer():
    cleanfid = pytest.importorskip("cleanfid.resize")
    images = extremes(64, 64)
    expected = np.stack([cleanfid.build_resizer("clean")(image) for image in images])
    np.testing.assert_allclose(
        128 * inception.clean_input(images.astype(np.float32)) + 128, expected, atol=1e-4
    )


@pytest.mark.parametrize("height, width", [(5, 8), (8, 5), (8, 11), (11, 8), (6, 6), (7, 10)])
def test_crop_is_torchvisions(height, width):
    from tests import test_features

    test_features.import_torchvision()
    functional = importlib.import_module("torchvision.transforms.functional")
    images = extremes(height, width)
    expected = [
        np.asarray(functional.center_crop(Image.fromarray(image), min(height, width)))
        for image in images
    ]
    np.testing.assert_array_equal(resize.center_crop(images), expected)


def test_an_odd_half_is_rounded_to_even():
    rows = np.arange(9).reshape(1, 9, 1, 1)
    offsets = [
        int(resize.center_crop(np.broadcast_to(rows[:, : 4 + odd], (1, 4 + odd, 4, 1)))[0, 0, 0, 0])
        for odd in (1, 3, 5)
    ]
    assert offsets == [0, 2, 2]


@pytest.mark.parametrize("shape", [(37, 50, 3), (50, 37, 1), (24, 24, 3), (24, 31, 1)])
def test_the_host_and_the_devices_agree_to_the_last_bit(shape):
    image = extremes(*shape[:2])[1, :, :, : shape[2]]
    file = io.BytesIO()
    Image.fromarray(image if shape[2] == 3 else image[..., 0]).save(file, "PNG")
    found = images_lib.cropped(file.getvalue(), 24)
    ours = resize.bytes_resize(resize.center_crop(image[None].astype(np.float32)), 24, "lanczos")[0]
    np.testing.assert_array_equal(np.broadcast_to(ours, found.shape), found)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_same_on_any_devices(devices, optimisations):
    images = np.concatenate([extremes(61, 61)] * 4)[:16]
    parallel = sharding.Parallel(sharding.make_mesh(data=devices))
    run = parallel.in_batches("batch_size", lambda _, x: resize.bytes_resize(x, 24, "lanczos"), 8)
    np.testing.assert_array_equal(run({}, images.astype(np.float32)), pillow(images, 24, "lanczos"))


def test_what_is_refused():
    images = np.zeros((1, 4, 4, 3), np.float32)
    with pytest.raises(ValueError, match="no filter 'box'; there are: lanczos, bicubic"):
        resize.bytes_resize(images, 2, "box")
    with pytest.raises(ValueError, match="cannot resize 3000 pixels to 4 at once"):
        resize.bytes_resize(np.zeros((1, 4, 3000, 1), np.float32), 4, "lanczos")
