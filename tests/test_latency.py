"""The latency protocol: what is timed, in which order, how far, and what is reported of it."""

import json
import types

import jax
import numpy as np
import pytest

from dmd_jax import generate
from dmd_jax.commands import latency
from dmd_jax.experiment import model as model_lib
from dmd_jax.runtime import timing

pytest.importorskip("diffusers")
from tests.helpers import sd


def test_functions_are_called_in_turn_and_the_median_counts(monkeypatch):
    called, clock = [], iter(np.cumsum([0, 1, 0, 2, 0, 9, 0, 4, 0, 2, 0, 6]))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.in_turn([lambda: called.append("a"), lambda: called.append("b")], 3) == [
        [1, 9, 2],
        [2, 4, 6],
    ]
    assert called == ["a", "b"] * 3
    clock = iter(np.cumsum([0, 1, 0, 9, 0, 2]))
    assert timing.median_seconds(lambda: None, 3) == 2


def row(model, batch_size, ms, network=None):
    """Of a batch that takes so many ms an image together, and the network of it."""
    together = {} if network is None else {latency.TOGETHER: [ms * batch_size / 1e3] * 3}
    return latency.Row(
        model, batch_size, {latency.NETWORK: [(network or ms) * batch_size / 1e3] * 3} | together
    )


def found_by(monkeypatch, took, sizes, ready=lambda name, batch_size: None):
    """Returns what `search` finds, and its calls.

    `took` says how many ms an image takes in a model's batches: {name: {batch size: ms}}.
    """
    calls = []

    def measure(ready, batch_size, repeats):
        calls.append((batch_size, list(ready)))
        return [row(name, batch_size, took[name][batch_size]) for name in ready]

    def builder(name):
        return lambda batch_size: {latency.NETWORK: lambda: ready(name, batch_size)}

    monkeypatch.setattr(latency, "measure", measure)
    return *latency.search({name: builder(name) for name in took}, sizes, 3), calls


def test_batches_grow_until_two_bring_nothing(monkeypatch):
    took = {
        "t": {1: 5, 2: 6, 4: 4, 8: 4, 16: 4.5, 32: 1},
        "s": {1: 5, 2: 4, 4: 3, 8: 2, 16: 1, 32: 0.5},
    }
    rows, ends, calls = found_by(monkeypatch, took, [1, 2, 4, 8, 16, 32])
    assert [(r.model, r.batch_size) for r in rows if r.model == "t"] == [
        ("t", n) for n in (1, 2, 4, 8, 16)
    ]
    assert calls == [(n, ["t", "s"]) for n in (1, 2, 4, 8, 16)] + [(32, ["s"])]
    assert ends == {
        "t": "up to batch 16 it gets no faster",
        "s": "batch 32 is the last that was asked for",
    }
    best = latency.summary(rows, "t", "s")["best"]
    assert best["batch_size"] == {"t": 4, "s": 32} and best["ratio"]["together"] == pytest.approx(8)


def short(of, at, error):
    def ready(name, batch_size):
        if name == of and batch_size >= at:
            raise error

    return ready


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
        MemoryError(),
    ],
)
def test_a_model_ends_where_memory_is_short(monkeypatch, error):
    took = {name: {1: 4, 2: 3, 4: 2} for name in "ts"}
    rows, ends, _ = found_by(monkeypatch, took, [1, 2, 4], short("t", 4, error))
    assert [(r.model, r.batch_size) for r in rows] == [
        ("t", 1),
        ("s", 1),
        ("t", 2),
        ("s", 2),
        ("s", 4),
    ]
    assert ends["t"] == "memory is short at batch 4"
    with pytest.raises(
        ValueError,
        match=r"^t: memory is short at batch 1; give --dtype=bfloat16, or a larger device\.$",
    ):
        found_by(monkeypatch, took, [1, 2, 4], short("t", 1, error))


def test_other_errors_are_told(monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        found_by(
            monkeypatch,
            {"t": {1: 1}},
            [1],
            short("t", 1, jax.errors.JaxRuntimeError("INTERNAL: bad")),
        )


def test_the_host_is_not_filled(monkeypatch):
    """Linux would end the process: another batch of twice the size is not tried."""
    page = latency.os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(latency.os, "sysconf", lambda name: page if name == "SC_PAGE_SIZE" else 10)
    rows, ends, _ = found_by(monkeypatch, {"t": {1: 4, 2: 3}}, [1, 2])
    assert [r.batch_size for r in rows] == [1] and ends == {"t": "memory is short at batch 2"}


def test_the_summary_of_known_times():
    rows = [
        row("t", 1, 100, 90),
        row("s", 1, 20, 3),
        row("t", 2, 80, 76),
        row("s", 2, 12, 2),
        row("s", 4, 10, 4),
    ]
    found = latency.summary(rows, "t", "s")
    assert found["batch 1"]["ratio"] == {"together": pytest.approx(5), "network": pytest.approx(30)}
    assert found["best"]["batch_size"] == {"t": 2, "s": 4}
    assert found["best"]["ratio"] == {"together": pytest.approx(8), "network": pytest.approx(19)}
    assert found["best"]["images_per_second"] == {"t": pytest.approx(12.5), "s": pytest.approx(100)}
    assert found["batch 1"]["ms"]["t"] == {
        "together": pytest.approx(100),
        "network": pytest.approx(90),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A teacher of 50 guided steps, and an InstaFlow."""
    path = tmp_path_factory.mktemp("files")
    sd.build(path / "teacher")
    index = json.loads((sd.build(path / "student", seed=1) / "model_index.json").read_text())
    (path / "student/model_index.json").write_text(
        json.dumps(index | {"_class_name": "RectifiedFlowPipeline"})
    )
    return path


def test_the_parts_together_are_the_model(files):
    found = model_lib.find(str(files / "student"))
    model = model_lib.make_model(found, 2)
    parts = latency.parts(model, 2, decodes=found.image_shape != found.stage.image_shape)
    assert list(parts) == ["text", "network", "decoder", "together"] and found.image_shape == (
        16,
        16,
        3,
    )
    noise = generate.inputs(0, range(2), found.stage.image_shape, [{"cond": 0}])["z"]
    expected = model([latency.PROMPT] * 2, noise=noise)
    for part in ("decoder", "together"):
        np.testing.assert_allclose(np.clip(parts[part](), -1, 1), expected, atol=1e-5)
    assert parts["text"]().shape == (2, 77, 32) and parts["network"]().shape == (2, 8, 8, 4)


def test_directories_by_command(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "latency.json"
    arguments = [
        "--model",
        str(files / "student"),
        "--teacher_model",
        str(files / "teacher"),
        "--repeats=2",
        "--batch_sizes=1,2",
    ]
    monkeypatch.setattr(model_lib, "PIPELINE", model_lib.PIPELINE | {"num_steps": 2})
    latency.run(latency.parse([*arguments, f"--out={out}"]))
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert {name: model["nfe"] for name, model in found["models"].items()} == {
        "teacher": 3,
        "student": 1,
    }
    assert (
        found["models"]["teacher"]["sampler"]["guidance_scale"] == 7.5
        and found["models"]["student"]["dtype"] == "float32"
    )
    assert (
        found["device"] == {"count": 8, "kind": "cpu"}
        and found["resolution"] == [16, 16]
        and found["jax"] == jax.__version__
    )
    assert [(r["model"], r["batch_size"]) for r in found["rows"]] == [
        (m, n) for n in (1, 2) for m in ("teacher", "student")
    ]
    assert all(
        len(seconds) == 2 and min(seconds) > 0
        for r in found["rows"]
        for seconds in r["seconds"].values()
    )
    assert all(
        word in printed
        for word in (
            "text",
            "decoder",
            "together",
            "the network alone",
            "16x16 pixels, float32",
            "best batches",
        )
    )


def test_a_run_without_texts_and_decoder(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    latency.run(latency.parse([f"--workdir={finished}", "--repeats=1", "--batch_sizes=1,2"]))
    printed = capsys.readouterr().out
    assert "teacher       35      1" in printed and "dmd is" in printed and "8x8 pixels" in printed
    assert not any(
        word in printed for word in ("text", "decoder", "together", "alone")
    ) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "expected either --workdir"),
        (["--workdir=x", "--model=y"], "expected either --workdir"),
        (["--model=x"], "expected either --workdir"),
        (["--model=x", "--teacher_model=y", "--teacher=z"], "expected either --workdir"),
        (["--workdir=absent"], "absent is no run's directory"),
        (
            ["--workdir=x", "--batch_sizes=2,4"],
            r"--batch_sizes is 2,4; expected growing numbers from 1 on",
        ),
        (["--workdir=x", "--batch_sizes=1,a"], "--batch_sizes is 1,a; expected growing"),
        (["--workdir=x", "--batch_sizes=1,4,2"], "--batch_sizes is 1,4,2; expected growing"),
        (["--workdir=x", "--repeats=0"], "--repeats is 0; expected at least 1"),
        (
            ["--workdir=x", "--out=absent/a.json"],
            "--out is absent/a.json; expected a file in a directory that exists",
        ),
    ],
)
def test_bad_arguments(arguments, match, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=match):
        latency.run(latency.parse(arguments))


def test_two_stages_of_a_run(finished):
    with pytest.raises(ValueError, match="teacher and student are both dmd; expected two stages"):
        latency.find(latency.parse([f"--workdir={finished}", "--teacher=dmd"]))
    with pytest.raises(ValueError, match="'dme' is no stage with a sampler"):
        latency.find(latency.parse([f"--workdir={finished}", "--student=dme"]))


def test_images_of_other_sizes_are_refused():
    found = {
        name: types.SimpleNamespace(image_shape=(n, n, 3), shape=(8, 8, 4))
        for name, n in (("t", 64), ("s", 32))
    }
    with pytest.raises(
        ValueError,
        match=r"the images have the shapes \(64, 64, 3\) \(t\), \(32, 32, 3\) \(s\); "
        "expected the same",
    ):
        latency.compare(found, [1], 1)
