"""The statistics on features agree with formulas, SciPy and pytorch-fid, on any devices."""

import functools

import numpy as np
import pytest
from PIL import Image

from dmd_jax import sharding
from dmd_jax.evals import frechet, kid, pairwise, precision_recall
from dmd_jax.features import inception
from dmd_jax.models import inception as network
from dmd_jax.weights import published

RNG = np.random.default_rng(0)
A = RNG.standard_normal((600, 24)).astype(np.float32) + 3
B = (RNG.standard_normal((520, 24)) * 1.1 + 3.1).astype(np.float32)


@functools.cache
def devices(count):
    return sharding.Parallel(sharding.make_mesh(data=count))


def moments(features):
    return frechet.moments(frechet.sums(features))


def few_of_many(seed, count=60, dimensions=200):
    """Features of fewer images than there are dimensions, on very different scales."""
    rng = np.random.default_rng(seed)
    return (0.5 + rng.standard_normal((count, dimensions)) * np.logspace(0, -4, dimensions)).astype(
        np.float32
    )


def test_frechet_distance():
    cov_a, cov_b = np.cov(A.T.astype(np.float64)), np.cov(B.T.astype(np.float64))
    root = pytest.importorskip("scipy.linalg").sqrtm(cov_a @ cov_b)
    mean = A.mean(0, dtype=np.float64) - B.mean(0, dtype=np.float64)
    expected = mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root.real)
    assert frechet.frechet_distance(moments(A), moments(B)) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_scaled_features():
    """Covariances that commute have a root by hand: |mu|^2 + tr((C^(1/2) - (4 C)^(1/2))^2)."""
    a = moments(few_of_many(0))
    b = frechet.Moments(a.mean + 0.1, 4 * a.covariance)
    assert frechet.frechet_distance(a, b) == pytest.approx(
        0.01 * 200 + np.trace(a.covariance), rel=1e-12
    )


@pytest.mark.parametrize(
    "features", [A, few_of_many(0), few_of_many(0, 2), np.ones((9, 24), np.float32)]
)
def test_frechet_distance_to_itself_is_zero(features):
    whole = moments(features)
    assert frechet.frechet_distance(whole, whole) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(
    "features",
    [(A, B), (few_of_many(0), few_of_many(1)), (A[:20], B), (A, np.ones((9, 24), np.float32))],
)
def test_frechet_distance_is_that_of_any_batches(features):
    """This also holds if rounding turns eigenvalues 0 into 1e-16, whose roots are not small."""
    first, second = features
    expected = frechet.frechet_distance(moments(first), moments(second))
    batches = frechet.moments(frechet.sums(first[:7]) + frechet.sums(first[7:]))
    assert frechet.frechet_distance(batches, moments(first)) == pytest.approx(0, abs=1e-10)
    assert frechet.frechet_distance(batches, moments(second)) == pytest.approx(expected, rel=1e-12)
    assert frechet.frechet_distance(moments(second), batches) == pytest.approx(expected, rel=1e-12)


def test_a_covariance_needs_two_images():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments(A[:1])


def test_sums_add_up():
    whole, parts = frechet.sums(A), frechet.sums(A[:7]) + frechet.sums(A[7:])
    assert whole.count == parts.count == 600
    np.testing.assert_allclose(parts.sum, whole.sum, rtol=1e-12)
    np.testing.assert_allclose(parts.outer, whole.outer, rtol=1e-12)
    assert whole.outer.dtype == np.float64


def test_kernel_distance():
    a, b = np.float64(A), np.float64(B)
    kernel = lambda x, y: (x @ y.T / 24 + 1) ** 3
    mean_off_diagonal = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    expected = (
        mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean()
    )
    assert kid.kernel_distance(A, B, devices(8)) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased():
    """As the mean over subsets is that clean-fid and torch-fidelity give."""
    whole = kid.kernel_distance(A, B, devices(1))
    rng = np.random.default_rng(0)
    parts = [
        kid.kernel_distance(
            A[rng.permutation(600)[:100]], B[rng.permutation(520)[:100]], devices(1)
        )
        for _ in range(40)
    ]
    assert abs(np.mean(parts) - whole) < 4 * np.std(parts) / np.sqrt(40) < whole


def brute_force(real, fake):
    """By the definitions, a pair at a time at most."""
    real, fake = np.float64(real), np.float64(fake)
    distance = lambda a, b: np.stack([np.linalg.norm(x - b, axis=1) for x in a])
    radius = lambda a, k: np.sort(distance(a, a), axis=1)[:, k, None]
    across = distance(real, fake)
    return {
        "precision": (across <= radius(real, 3)).any(axis=0).mean(),
        "recall": (radius(fake, 3) >= across.T).any(axis=0).mean(),
        "density": (across < radius(real, 5)).sum(axis=0).mean() / 5,
        "coverage": (across < radius(real, 5)).any(axis=1).mean(),
    }


def test_precision_recall():
    expected = brute_force(A, B)
    assert precision_recall.precision_recall(A, B, devices(8)) == pytest.approx(expected, rel=1e-12)
    assert (
        all(0.02 < value < 0.98 for value in expected.values()) and len(set(expected.values())) == 4
    )


def test_precision_recall_against_itself_and_against_something_far():
    names = ("precision", "recall", "density", "coverage")
    assert precision_recall.precision_recall(A, A, devices(8)) == pytest.approx(
        dict.fromkeys(names, 1)
    )
    assert precision_recall.precision_recall(A, A + 100, devices(8)) == dict.fromkeys(names, 0)


def test_precision_recall_of_copies():
    """If only rounding keeps all radii from 0, copies are in the manifold and in no open ball."""
    images = np.repeat(1000 + RNG.standard_normal((50, 24)).astype(np.float32), 6, axis=0)
    found = precision_recall.precision_recall(images, images[:150][::-1], devices(8))
    assert found == {"precision": 1, "recall": 0.5, "density": 0, "coverage": 0}


def test_statistics_do_not_depend_on_the_devices_or_the_blocks(monkeypatch):
    results = []
    for count, rows in ((8, 512), (1, 512), (4, 512), (1, 37), (8, 5)):
        monkeypatch.setattr(pairwise, "ROWS", rows)
        found = precision_recall.precision_recall(A, B, devices(count))
        results.append([kid.kernel_distance(A, B, devices(count)), *found.values()])
    np.testing.assert_allclose(results, results[:1] * len(results), rtol=1e-9)


def test_too_few_images():
    with pytest.raises(ValueError, match="at least 2 images of each set, got 1 and 520"):
        kid.kernel_distance(A[:1], B, devices(1))
    with pytest.raises(ValueError, match="more than 5 images of each set, got 600 and 5"):
        precision_recall.precision_recall(A, B[:5], devices(1))


def test_fid_is_pytorch_fids(tmp_path, monkeypatch):
    """Compares features of PNG files, and the distance of more images, with regular covariances."""
    torch = pytest.importorskip("torch")
    from tests import test_features

    test_features.import_torchvision()
    package, score = (
        pytest.importorskip(f"pytorch_fid.{name}") for name in ("inception", "fid_score")
    )
    state = test_features.to_torch(test_features.random_params(network.make().abstract))
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    monkeypatch.setattr(package, "load_state_dict_from_url", lambda *_, **__: state)
    torch.save(state, tmp_path / "inception.pth")
    images = RNG.integers(0, 256, (8, 6, 8, 3)).astype(np.uint8)
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    expected = score.get_activations(
        files, package.InceptionV3(), batch_size=8, dims=2048, num_workers=0
    )
    found = inception.make(
        devices(8), batch_size=8, weights=tmp_path / "inception.pth", resize="pytorch_fid"
    ).extract(images)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    statistics = [(features.mean(axis=0), np.cov(features, rowvar=False)) for features in (A, B)]
    expected = score.calculate_frechet_distance(*statistics[0], *statistics[1])
    assert frechet.frechet_distance(moments(A), moments(B)) == pytest.approx(
        expected, rel=1e-6
    )  # float32 means


@pytest.fixture
def pixels(tmp_path, monkeypatch):
    """File of the weights of a network that gives back pixels; `inception.make` makes it."""
    torch = pytest.importorskip("torch")
    made = network.make()._replace(
        apply=lambda params, x: x.mean(axis=-1)[:, 140:143, 8:40], abstract={}
    )
    monkeypatch.setattr(network, "make", lambda: made)
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


def test_fids_digest_is_of_the_whole_chain(pixels, monkeypatch):
    """And FID is what is in the one network's features."""
    assert inception.make(devices(8), batch_size=8, weights=pixels).frechet.startswith(
        "FD-inception-"
    )
    monkeypatch.setitem(published.SHA256, published.INCEPTION, published.sha256(pixels))
    settings = [
        {},
        {"resize": "pytorch_fid"},
        {"resize": "clean"},
        {"resize": "clean", "crop_to": 256},
        {"crop_to": 256},
    ]
    made = [inception.make(devices(8), batch_size=8, weights=pixels, **chain) for chain in settings]
    assert len({features.digest for features in made}) == 5 and {
        features.frechet for features in made
    } == {"FID"}
    with pytest.raises(
        ValueError, match="no resize 'cubic' for inception; there are: edm, pytorch_fid, clean"
    ):
        inception.make(devices(8), batch_size=8, weights=pixels, resize="cubic")


def test_coco_images_are_cropped_and_resized_twice(pixels):
    """To 256 by Lanczos in bytes, then to 299 in floats, whatever size they had."""
    images = RNG.integers(0, 256, (8, 320, 400, 3)).astype(np.uint8)
    small = [
        Image.fromarray(image).crop((40, 0, 360, 320)).resize((256, 256), Image.Resampling.LANCZOS)
        for image in images
    ]
    planes = [
        [
            Image.fromarray(np.float32(image)[..., c]).resize((299, 299), Image.Resampling.BICUBIC)
            for c in range(3)
        ]
        for image in small
    ]
    expected = (
        np.float32([[np.asarray(plane) for plane in image] for image in planes])
        .clip(0, 255)
        .mean(axis=1)
        - 128
    ) / 128
    found = inception.make(
        devices(8), batch_size=8, weights=pixels, resize="clean", crop_to=256
    ).extract(images)
    np.testing.assert_allclose(found, expected[:, 140:143, 8:40], atol=2e-6)
