"""Several runs in one table and one picture, and those that do not belong there."""

import dataclasses
import pathlib
import shutil
import statistics

import numpy as np
import pytest
from PIL import Image

from dmd_jax.commands import compare
from dmd_jax.evals import report, result
from dmd_jax.experiment import build, configs
from dmd_jax.experiment import model as model_lib
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import storage
from dmd_jax.stages import embed, import_weights
from tests.helpers.runs import smoke, stage_of

PROTOCOL = {
    "name": "digits",
    "count": 64,
    "ranges": 1,
    "quantisation": "none",
    "source": "here",
}
ASKED = {
    "protocol": PROTOCOL,
    "conditions": "123",
    "versions": {"teacher": "step 30, a", "dmd": "step 20, b"},
}


def write_result(path, scores, **changes):
    """Writes an evaluation of a run; changes are of the result, or of what it asked."""
    asked = {key: changes.pop(key, value) for key, value in ASKED.items()}
    costs = {
        "teacher": dict(nfe=35, seconds_per_image=0.02, training_seconds=100.0),
        "dmd": dict(nfe=1, seconds_per_image=0.001),
    }
    found = result.Result(
        asked=asked,
        rows=tuple(result.Row(name=name, scores=scores[name], **costs[name]) for name in costs),
        real=scores.get("real", {}),
        reference={"count": 500, "digest": changes.pop("digest", "def")},
        networks=changes.pop("networks", {"mlp@8": "abc"}),
        packages={},
        device="1 x cpu",
    )
    (path / "evaluate").mkdir(parents=True)
    changed = dataclasses.replace(found, **changes)
    storage.write_json(path / "evaluate/evaluation.json", changed.to_json())


def write_run(path, *, seed=0, scores=1.0, config=(), **changes):
    """Writes a run's directory; the teacher has these scores, and the student twice as many."""
    settings = smoke()
    settings.seed = seed
    settings.update(dict(config))
    found = {
        "real": {"FD": 0.5, "recall": 1.0},
        "teacher": {"FD": scores, "recall": 0.5},
        "dmd": {"FD": 2 * scores, "recall": 0.25},
    }
    versions = {"teacher": f"step 30, of seed {seed}", "dmd": "step 20, b"}
    write_result(path, found, **{"versions": versions} | changes)
    (path / "config.json").write_text(settings.to_json_best_effort())
    return path


def cells(*arguments):
    return compare.table(compare.open_rows([str(a) for a in arguments]))


def test_one_run(tmp_path):
    assert cells(write_run(tmp_path / "a")) == [
        ("", "FD", "recall", "NFE", "ms an image", "s of training"),
        ("real images", "0.500", "1.000", "", "", ""),
        ("teacher", "1.000", "0.500", "35", "20.000", "100"),
        ("a", "2.000", "0.250", "1", "1.000", ""),
    ]


def test_means_and_standard_deviations_of_seeds(tmp_path):
    values = (1.0, 2.0, 4.5)
    for seed, value in enumerate(values):
        write_run(tmp_path / f"full-{seed}", seed=seed, scores=value)
    (tmp_path / "full-0.log").write_text("no run")
    first, _, teacher, student = cells(f"both losses={tmp_path}/full-*")
    assert first[0] == "mean (standard deviation)"
    assert teacher[:2] == (
        "teacher, 3 runs",
        f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})",
    )
    assert student[:2] == (
        "both losses, 3 runs",
        f"{2 * statistics.mean(values):.3f} ({2 * statistics.stdev(values):.3f})",
    )
    assert student[3:] == ("1", "1.000 (0.000)", "")


def test_a_teacher_stands_there_once(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"full-{seed}", seed=seed)
        write_run(tmp_path / f"less-{seed}", seed=seed, config={"dmd": {"num_steps": 7}})
    names = [row[0] for row in cells(f"full={tmp_path}/full-*", f"less={tmp_path}/less-*")]
    assert names[1:] == ["real images", "teacher, 2 runs", "full, 2 runs", "less, 2 runs"]
    names = [row[0] for row in cells(tmp_path / "full-0", tmp_path / "less-0", tmp_path / "less-1")]
    assert names[1:] == [
        "real images",
        "teacher of full-0",
        "teacher of less-1",
        "full-0",
        "less-0",
        "less-1",
    ]


@pytest.mark.parametrize(("versions", "rows"), [(("one", "two"), 2), (("one", "one"), 1)])
def test_a_teacher_is_the_same_if_its_weights_are(tmp_path, versions, rows):
    runs = [
        write_run(tmp_path / version / str(i), seed=i, versions={"teacher": version, "dmd": "x"})
        for i, version in enumerate(versions)
    ]
    assert sum(row.role == "teacher" for row in compare.open_rows(list(map(str, runs)))) == rows


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"networks": {"mlp@8": "xyz"}}, r'networks \({"mlp@8": "abc"}, {"mlp@8": "xyz"}\)'),
        ({"digest": "other"}, r'reference digest \("def", "other"\)'),
        ({"conditions": "456"}, r'conditions \("123", "456"\)'),
        (
            {"protocol": PROTOCOL | {"count": 32, "ranges": 3}},
            r"protocol count \(64, 32\), protocol ranges \(1, 3\)",
        ),
        (
            {"protocol": PROTOCOL | {"name": "digits:train"}},
            r'protocol name \("digits", "digits:train"\)',
        ),
        (
            {"protocol": PROTOCOL | {"quantisation": "round"}},
            r'protocol quantisation \("none", "round"\)',
        ),
    ],
)
def test_scores_that_mean_something_else_are_refused(tmp_path, changes, told):
    """Each pair is named, in one line."""
    a, b, c = (write_run(tmp_path / name, **(changes if name == "c" else {})) for name in "abc")
    match = (
        rf"^scores that do not mean the same: {a} and {c} differ in {told}\. "
        r"Compare runs of one protocol, or evaluate them by one\.$"
    )
    with pytest.raises(ValueError, match=match):
        compare.open_rows([str(a), str(b), str(c)])


def test_what_does_not_change_the_meaning_is_not_asked(tmp_path):
    write_run(tmp_path / "a")
    write_run(
        tmp_path / "b",
        protocol=PROTOCOL | {"source": "elsewhere"},
        device="8 x TPU",
        packages={"jax": "9"},
    )
    assert len(cells(tmp_path / "a", tmp_path / "b")) == 5


def test_directories_that_are_no_runs(tmp_path):
    run = write_run(tmp_path / "a")
    with pytest.raises(ValueError, match="absent is no run's directory"):
        cells(tmp_path / "absent")
    with pytest.raises(
        ValueError, match=r"no run's directory matches .*/z-\*; quote the pattern, and check it"
    ):
        cells(f"z={tmp_path}/z-*")
    with pytest.raises(ValueError, match="two rows are named a; name them, such as other="):
        cells(run, f"a={run}")
    file = run / "evaluate/evaluation.json"
    values = storage.read_json(file)
    storage.write_json(file, values | {"rows": values["rows"][:1]})
    with pytest.raises(ValueError, match=r"has no dmd, which the config asks for; evaluate the"):
        cells(run)
    for changes in ({"nfe": None}, {"seconds_per_image": None}, {"scores": {}}):
        teacher, student = values["rows"]
        rows = [teacher, student | changes]
        storage.write_json(file, values | {"rows": rows})
        with pytest.raises(ValueError, match=r"has no dmd, which the config asks for"):
            cells(run)
    storage.write_json(file, values | {"asked": {}})
    with pytest.raises(ValueError, match=r"has no versions, which the config asks for"):
        cells(run)
    for key in ("asked", "real", "reference"):
        storage.write_json(file, values | {key: "x"})
        with pytest.raises(ValueError, match=rf"json: this is no result .*{key} is 'x'"):
            cells(run)
    storage.write_json(file, {"protocol": {}, "nfe": {}})
    with pytest.raises(
        ValueError, match=r"json: this is no result of an evaluation by this version"
    ):
        cells(run)
    (run / "evaluate/evaluation.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"evaluation\.json does not exist; let the run come to its evaluation first",
    ):
        cells(run)


def test_patterns(tmp_path, monkeypatch):
    for name in ("x/run-1", "x/run-2", "y/run-1"):
        write_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for pattern, expected in (
        ("*/run-1", ["x/run-1", "y/run-1"]),
        ("x/run-[12]", ["x/run-1", "x/run-2"]),
        ("x/run-1", ["x/run-1"]),
    ):
        for start in ("", f"{tmp_path}/"):
            assert compare.matching(start + pattern) == [tmp_path / name for name in expected]


def test_runs_in_a_bucket(bucket, tmp_path, capsys):
    for seed in (0, 1):
        with storage.writing(f"gs://bucket/runs/full-{seed}") as new:
            shutil.copytree(write_run(tmp_path / f"full-{seed}", seed=seed), new)
    compare.run(
        compare.parse(["full=gs://bucket/runs/full-*", "one=gs://bucket/runs/full-1", "--out="])
    )
    printed = capsys.readouterr().out
    assert "full, 2 runs" in printed and "\none " in printed


def test_tables():
    rows = [("", "FD", "NFE"), ("a long name", "1.0", "35"), ("b", "12.0", "")]
    assert (
        report.aligned(rows) == "               FD  NFE\na long name   1.0   35\nb            12.0"
    )
    assert (
        report.markdown(rows)
        == "|  | FD | NFE |\n| --- | --- | --- |\n| a long name | 1.0 | 35 |\n| b | 12.0 |  |"
    )


def test_the_picture_of_a_run(finished, tmp_path, capsys, monkeypatch):
    """By the noise and the labels of the evaluation, whose first images they are."""
    other = shutil.copytree(finished, tmp_path / "other")
    rows = compare.open_rows([str(finished), f"other={other}"])
    conditions, images = compare.sampled(rows, 3, 2)
    assert [row.name for row in rows] == ["teacher", finished.name, "other"] and conditions == [
        0,
        1,
        2,
    ]
    np.testing.assert_array_equal(images[1], images[2])
    config = smoke()
    inputs = build.inputs(
        stage_of(config, "teacher"), range(3), [{"cond": np.int32(i)} for i in range(3)]
    )
    for image, stage in zip(images, ("teacher", "dmd"), strict=False):
        model = model_lib.load(str(finished), stage=stage)
        np.testing.assert_allclose(image, model([0, 1, 2], noise=inputs["z"]), atol=1e-5)
    assert abs(images[0] - images[1]).max() > 0.01

    shown = []
    monkeypatch.setattr(
        compare,
        "draw",
        lambda *arguments, draw=compare.draw: shown.append(arguments[2]) or draw(*arguments),
    )
    compare.run(compare.parse([str(finished), "--count=2", f"--out={tmp_path / 'picture.png'}"]))
    assert shown == [[0, 1]] and Image.open(tmp_path / "picture.png").width > 2 * 96
    printed = capsys.readouterr().out
    assert "Students are" in printed and str(tmp_path / "picture.png") in printed
    assert compare._label(rows[1]).startswith(f"{finished.name}\nNFE 1\nFD-mlp@8")


def test_weights_that_are_not_those_of_the_scores(workdir):
    values = storage.read_json(workdir / "evaluate/evaluation.json")
    values["asked"]["versions"]["dmd"] = "step 10, a"
    storage.write_json(workdir / "evaluate/evaluation.json", values)
    with pytest.raises(
        ValueError,
        match=r"evaluation of .* is of dmd at step 10, a, which is now at step 20, .*; evaluate",
    ):
        compare.sampled(compare.open_rows([str(workdir)]), 1, 1)


def test_models_of_other_shapes_are_not_in_one_picture(tmp_path):
    versions = {"versions": {"teacher": None, "dmd": None}}
    a = write_run(tmp_path / "a", **versions)
    b = write_run(tmp_path / "b", config={"network": {"size": 16}}, **versions)
    match = (
        r"^teacher of a and teacher of b cannot stand in one picture: shapes \(8, 8, 1\) of noise, "
        r".* and \(16, 16, 1\) of noise"
    )
    with pytest.raises(ValueError, match=match):
        compare.sampled(compare.open_rows([str(a), str(b)]), 1, 1)


def test_the_prompts_of_a_run_stand_above(tmp_path):
    """Those with which its evaluation begins, gone through again and again."""
    pytest.importorskip("diffusers")
    from tests.helpers import sd

    config, workdir = configs.load("coco:tiny"), tmp_path / "run"
    sd.build(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a red flower\nblue sky\n")
    config.variables.update(
        checkpoint=str(tmp_path / "sd"), prompts_file=str(tmp_path / "prompts.txt")
    )
    config.mesh.data = 1
    stages = {stage: config[stage].program for stage in config.stages}
    import_weights.run(stage_of(config, "teacher"), workdir)
    name = next(stage for stage, program in stages.items() if program == "embed")
    embed.run(stage_of(config, name), workdir)
    shutil.copytree(workdir / "teacher", workdir / "dmd")  # a student with the teacher's weights
    config.evaluate.conditions = dict(source="records.read", directory="{workdir}/prompts")
    (workdir / "config.json").write_text(config.to_json_best_effort())
    versions = {stage: workdir_lib.content(workdir / stage) for stage in ("teacher", "dmd")}
    scores = {"teacher": {"FD": 1.0}, "dmd": {"FD": 2.0}}
    write_result(workdir, scores, versions=versions)
    rows = compare.open_rows([str(workdir)])
    conditions, images = compare.sampled(rows, 3, 1)
    assert (
        conditions == ["a red flower", "blue sky", "a red flower"]
        and [i.shape for i in images] == [(3, 16, 16, 3)] * 2
    )
    compare.draw(pathlib.Path(tmp_path / "picture.png"), rows, conditions, images)
    assert Image.open(tmp_path / "picture.png").width > 3 * 96


@pytest.mark.parametrize(
    "argument", ["--count=0", "--batch_size=0", "--out=absent/a.png", "--out=a.txt"]
)
def test_bad_arguments(tmp_path, argument):
    with pytest.raises(ValueError, match="expected"):
        compare.run(compare.parse([str(write_run(tmp_path / "a")), argument]))
