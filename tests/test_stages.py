"""The stages of configs/digits.py:smoke, run in this process."""

import pathlib
import shutil
import signal
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import dmd_jax
from dmd_jax import generate, lookup, main, sharding
from dmd_jax.data import digits, pipeline, records
from dmd_jax.data import images as images_lib
from dmd_jax.data import labels as labels_lib
from dmd_jax.experiment import build, evaluation, made
from dmd_jax.experiment import model as model_lib
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import checkpoint, log, preemption, storage
from dmd_jax.stages import evaluate, pairs, train
from tests.helpers.runs import (
    check_of,
    nfe_of,
    params_of,
    result_of,
    scores_of,
    smoke,
    stage_of,
    values_of,
)

pytestmark = pytest.mark.usefixtures("recipes_once")


def test_a_finished_workdir_holds_everything(finished):
    assert {
        "config.json",
        "classifier.npz",
        "teacher",
        "pairs",
        "dmd",
    } <= {p.name for p in finished.iterdir()}
    assert list((finished / "dmd").glob("events.out.tfevents.*"))
    assert sorted(p.name for p in (finished / "dmd/samples").iterdir()) == [
        "0000010.png",
        "0000020.png",
    ]
    assert Image.open(finished / "evaluate/report.png").size[0] > 1000
    rows = log.read(finished / "dmd")
    assert {"matching", "regression", "fake_score", "grad_norm", "skipped"} <= rows[0].keys()
    result = result_of(finished)
    assert nfe_of(result) == {"teacher": 35, "dmd": 1}
    scores = scores_of(result)
    assert scores["real"]["agreement"] > 0.99 and result.reference["agreement"] > 0.97
    assert (
        scores["teacher"].keys()
        == scores["dmd"].keys()
        == {f"{name}-64" for name in scores["real"]}
    )


def test_finished_stages_are_skipped(finished, capsys):
    before = {
        p: p.stat().st_mtime
        for p in finished.rglob("*")
        if p.is_file() and p.name not in ("config.json", workdir_lib.LOCK)
    }
    main.run(smoke(), finished)
    assert capsys.readouterr().out.count("done already") == 4
    assert before == {p: p.stat().st_mtime for p in before}


def test_dry_run_leaves_no_trace(tmp_path, capsys):
    main.run(smoke(), tmp_path / "run", dry_run=True)
    assert "would run" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_one_stage(workdir):
    shutil.rmtree(workdir / "dmd")
    (workdir / "evaluate/evaluation.json").unlink()
    main.run(smoke(), workdir, "dmd")
    assert (workdir / "dmd/checkpoints/20").exists() and not (
        workdir / "evaluate/evaluation.json"
    ).exists()


def test_a_stage_without_a_key(tmp_path):
    config = smoke()
    config.stages = ("teacher", "nope")
    with pytest.raises(ValueError, match=r"^stage 'nope' needs a key of that name with a program"):
        main.run(config, tmp_path)


def test_unknown_stage(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"no stage 'techer' \(did you mean 'teacher'\?\); there are: "
        r"teacher, pairs, dmd, evaluate\.",
    ):
        main.run(smoke(), tmp_path, "techer")


def test_more_steps_go_on_from_the_last(workdir):
    config = smoke()
    config.teacher.num_steps = 35
    train.run(stage_of(config, "teacher"), workdir)
    assert [row["step"] for row in log.read(workdir / "teacher")] == [10, 20, 30, 35]
    with pytest.raises(
        ValueError,
        match=r"pairs was made from other things than there are now: "
        r"content of teacher is 'step 35, .*use another workdir",
    ):
        pairs.run(stage_of(config, "pairs"), workdir)


def test_another_config_is_refused(finished):
    config = smoke()
    config.teacher.batch_size = 32
    with pytest.raises(
        ValueError,
        match=r"belongs to another config: teacher.batch_size is 32, there 64; "
        r"use another --workdir",
    ):
        main.run(config, finished)


def test_other_data_is_refused(workdir):
    config = smoke()
    config.teacher.update(num_steps=40, batch_size=32)
    with pytest.raises(
        ValueError,
        match=r"was made from other things than there are now: batch_size is 32, there 64",
    ):
        train.run(stage_of(config, "teacher"), workdir)


def test_a_prediction_that_the_process_does_not_define():
    config = smoke()
    config.prediction = "eps"
    with pytest.raises(ValueError, match=r"^no prediction for EDM 'eps'; there are: edm\.$"):
        build.stages(config)


def test_batch_that_the_devices_cannot_share(tmp_path):
    config = smoke()
    config.teacher.batch_size = 100
    with pytest.raises(
        ValueError, match=r"^images batch_size 100 is not divisible by 8 devices; use 96 or 104\.$"
    ):
        train.run(stage_of(config, "teacher"), tmp_path)


def test_missing_dataset_extra(monkeypatch):
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r'the digits need scikit-learn; run: pip install "dmd_jax\[digits\]"'
    ):
        digits.make(split="train")


def test_the_digits_are_scikit_learns():
    pixels, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[500:]
    source = digits.make(split="train")
    np.testing.assert_array_equal(source.image.reshape(-1, 64), np.float32(pixels[order] / 8 - 1))
    np.testing.assert_array_equal(source.cond, labels[order])


def test_not_images():
    with pytest.raises(
        ValueError,
        match=r"photos: expected images \[N, H, W, C\].*got an array of shape \(3,\) "
        "and type <U1 with 3 labels",
    ):
        images_lib.from_arrays(np.array(["a", "b", "c"]), np.arange(3), origin="photos")


def test_truncated_shard(workdir):
    path = sorted((workdir / "pairs").glob("*.arrayrecord"))[1]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"shard .*00001.* is truncated or corrupt; delete it"):
        records.read(directory=workdir / "pairs")
    path.unlink()
    with pytest.raises(ValueError, match=r"shard .*00001.* is missing"):
        records.read(directory=workdir / "pairs")


def test_missing_shards_are_made_again_the_same(workdir, finished):
    path = sorted((workdir / "pairs").glob("*.arrayrecord"))[2]
    path.unlink()
    assert not pairs.done(stage_of(smoke(), "pairs"), workdir)
    pairs.run(stage_of(smoke(), "pairs"), workdir)
    ours, theirs = (records.read(directory=d / "pairs") for d in (workdir, finished))
    assert len(ours) == len(theirs) == 64
    chex.assert_trees_all_equal([ours[i] for i in range(64)], [theirs[i] for i in range(64)])


def test_pairs_are_the_teachers_images_of_their_noise(finished):
    config, source = smoke(), records.read(directory=finished / "pairs")
    parallel = sharding.Parallel(sharding.make_mesh())
    sample = generate.make_sample(
        build.sampler_for_stage(stage_of(config, "teacher"), finished), parallel, 8
    )
    rows = [source[i] for i in (3, 17, 40)]
    seed = stage_of(config, "pairs").seed("noise")
    inputs = generate.inputs(seed, (3, 17, 40), (8, 8, 1), labels_lib.every(num_classes=10))
    np.testing.assert_array_equal(inputs["z"], np.stack([r["noise"] for r in rows]))
    np.testing.assert_array_equal(inputs["cond"], np.stack([r["cond"] for r in rows]))
    images = sample(params_of(config, finished, "teacher"), inputs)
    np.testing.assert_allclose(images, np.stack([r["image"] for r in rows]), atol=1e-4)


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_corrupt_checkpoint(workdir, finished, damage, caplog):
    step = workdir / "dmd/checkpoints/20/state"
    for path in [p for p in step.rglob("*") if p.is_file()]:
        path.unlink() if damage == "remove" else path.write_bytes(
            path.read_bytes()[: path.stat().st_size // 2]
        )
    with pytest.raises(
        ValueError,
        match=r"checkpoint 20 in .* is damaged .*move .*20 away and run the stage again",
    ):
        params_of(smoke(), workdir, "dmd")
    train.run(stage_of(smoke(), "dmd"), workdir)
    assert "checkpoint 20 is damaged" in caplog.text and (workdir / "dmd/unreadable_20").exists()
    chex.assert_trees_all_equal(
        params_of(smoke(), workdir, "dmd"), params_of(smoke(), finished, "dmd")
    )


def test_no_whole_checkpoint(workdir):
    for state in (workdir / "teacher/checkpoints").glob("*/state"):
        shutil.rmtree(state)
    config = smoke()
    config.teacher.num_steps = 40
    with pytest.raises(
        ValueError,
        match=r"all checkpoints in .* are damaged \(steps \[30, 20\]\); "
        "move the directory away to start again",
    ):
        train.run(stage_of(config, "teacher"), workdir)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="run the stage 'teacher' first"):
        pairs.run(stage_of(smoke(), "pairs"), tmp_path)


def test_disk_full(workdir, monkeypatch):
    monkeypatch.setattr(
        checkpoint.storage.shutil,
        "disk_usage",
        lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000),
    )
    config = smoke()
    config.teacher.num_steps = 40
    with pytest.raises(
        ValueError,
        match=r"the checkpoint of step 40 needs .* MB, but .* has 0.0 MB free; "
        r"make room and run the same command again",
    ):
        train.run(stage_of(config, "teacher"), workdir)


def test_too_many_skipped_updates(tmp_path):
    config = smoke()
    config.teacher.max_skipped_updates = 5
    config.teacher.recipe.optimizer.update(learning_rate=float("inf"), warmup_steps=1)
    with pytest.raises(
        FloatingPointError,
        match="updates up to step 10 had gradients that were not finite, "
        "more than max_skipped_updates = 5",
    ):
        train.run(stage_of(config, "teacher"), tmp_path)


def test_a_checkpoint_of_one_mesh_goes_on_on_another(finished, tmp_path, capsys):
    """Twenty teacher steps give the same parameters if other devices make the last ten.

    They are equal up to the order of float32 sums.
    """
    reference = params_of(smoke(), finished, "teacher")
    for data, fsdp in ((2, 4), (1, 1)):
        workdir = pathlib.Path(shutil.copytree(finished, tmp_path / f"{data}x{fsdp}"))
        shutil.rmtree(workdir / "teacher/checkpoints/30")
        config = smoke()
        config.mesh.update(data=data, fsdp=fsdp)
        train.run(stage_of(config, "teacher"), workdir)
        assert "starts at step 20" in capsys.readouterr().err
        chex.assert_trees_all_close(
            params_of(config, workdir, "teacher"), reference, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("sampler", ["one_step", "stochastic_heun"])
def test_images_do_not_depend_on_the_batch(finished, sampler):
    config = smoke()
    if sampler == "stochastic_heun":
        config.dmd.sampler = dict(
            name=sampler, num_steps=3, churn=2.0, s_min=0.05, s_max=50.0, s_noise=1.003
        )
    params, labels = params_of(config, finished, "dmd"), labels_lib.every(num_classes=10)
    eight, one = (
        sharding.Parallel(sharding.make_mesh()),
        sharding.Parallel(sharding.make_mesh(data=1)),
    )
    sampler = build.sampler_for_stage(stage_of(config, "dmd"), finished)
    images = generate.make_sample(sampler, eight, 8)(
        params, build.inputs(stage_of(config, "teacher"), range(20), labels)
    )
    assert images.shape == (20, 8, 8, 1) and images.dtype == np.float32
    some = generate.make_sample(sampler, one, 7)(
        params, build.inputs(stage_of(config, "teacher"), range(5, 14), labels)
    )
    np.testing.assert_allclose(images[5:14], some, rtol=1e-5, atol=1e-5)


def test_lookup_names_what_exists():
    with pytest.raises(
        ValueError,
        match=r"dmd_jax/recipes has no file 'dmb' \(did you mean 'dmd'\?\); there are: "
        r"distil, dmd, reflow, teacher\.",
    ):
        lookup.find("recipes", "dmb")
    with pytest.raises(
        ValueError, match=r"dmd_jax/data/labels.py has no 'evry' \(did you mean 'every'\?\)"
    ):
        lookup.find("data", "labels.evry")


def test_a_result_of_another_version_is_made_again(workdir):
    path = workdir / "evaluate/evaluation.json"
    values = storage.read_json(path)
    del values["networks"]
    assert evaluate.done(stage_of(smoke(), "evaluate"), workdir)
    storage.write_json(path, values)
    assert not evaluate.done(stage_of(smoke(), "evaluate"), workdir)


def test_an_evaluation_of_older_checkpoints_is_made_again(workdir):
    assert evaluate.done(stage_of(smoke(), "evaluate"), workdir)
    config = smoke()
    config.dmd.num_steps = 25
    train.run(stage_of(config, "dmd"), workdir)
    assert not evaluate.done(stage_of(config, "evaluate"), workdir)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("teacher.keep_checkpoints", 0, r"^teacher\.keep_checkpoints is 0; expected at least 1\.$"),
        ("mesh.fsdp", 0, r"^mesh\.fsdp is 0; expected at least 1\.$"),
        ("seed", -1, r"^seed is -1; expected at least 0\.$"),
        (
            "dmd.program",
            "trian",
            "^stage 'dmd' needs a key of that name with a program, one of "
            "import_weights, embed, pairs, train, evaluate; its",
        ),
        ("network.name", "unet", r"^dmd_jax/models has no file 'unet'"),
        (
            "teacher.sampler.name",
            "huen",
            r"dmd_jax/samplers.py has no 'huen' \(did you mean 'heun'\?\); there are: "
            "one_step, euler, heun, st",
        ),
        (
            "dmd.recipe.distance.name",
            "l2",
            r"dmd_jax/losses.py has no 'l2'; there are: squared_error\. Or use lpips\.",
        ),
        (
            "features.name",
            "clasifier",
            r"^features\.name is 'clasifier', but the protocol has 'classifier'; leave it out, "
            "or choose",
        ),
        (
            "teacher.best_metric",
            "FID",
            r"^teacher\.best_metric 'FID' needs scores; name a protocol, or leave it out",
        ),
    ],
)
def test_a_config_that_cannot_work_claims_no_workdir(tmp_path, key, value, message):
    config = smoke()
    config.update_from_flattened_dict({key: value})
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=message):
            main.run(config, tmp_path / "run", dry_run=dry_run)
    assert not (tmp_path / "run").exists()


def test_another_teacher_is_refused(workdir):
    config = smoke()
    config.teacher.num_steps = 35
    train.run(stage_of(config, "teacher"), workdir)
    config.dmd.num_steps = 30
    with pytest.raises(
        ValueError,
        match=r"dmd was made from other things than there are now: content of teacher is 'step 35",
    ):
        train.run(stage_of(config, "dmd"), workdir)


@pytest.mark.parametrize(
    "name", ["config.json", "evaluate/evaluation.json", "classifier.npz", "pairs/manifest.json"]
)
def test_damaged_files_are_named(workdir, name):
    (workdir / name).write_text("{")
    if name == "classifier.npz":
        (workdir / "evaluate/evaluation.json").unlink()
    with pytest.raises(ValueError, match=rf"{name} is damaged.*delete"):
        main.run(smoke(), workdir)


def test_a_best_metric_that_is_not_measured(workdir):
    shutil.rmtree(workdir / "dmd")
    config = smoke()
    config.dmd.update(best_metric="FD-mlp@8", num_steps=30)
    with pytest.raises(
        ValueError,
        match=r"^no distance 'FD-mlp@8' for best_metric, which keeps the lowest "
        r"\(did you mean 'FD-mlp@8-64'\?\); there are",
    ):
        train.run(stage_of(config, "dmd"), workdir)


def test_without_a_running_mean(workdir):
    config = smoke()
    config.dmd.recipe.ema_decay = 0.0
    config.dmd.update(num_steps=2, preview_every=0, best_metric="")
    del config.dmd.scores
    shutil.rmtree(workdir / "dmd")
    train.run(stage_of(config, "dmd"), workdir)
    recipe = build.recipe(stage_of(config, "dmd"), sharding.Parallel(sharding.make_mesh()), workdir)
    assert (
        jax.eval_shape(recipe.init, params_of(config, workdir, "teacher"), None).generator.ema
        is None
    )
    params = params_of(config, workdir, "dmd")
    assert np.isfinite(params["map_layer0"]["kernel"]).all()
    evaluate.run(stage_of(config, "evaluate"), workdir)


def test_data_that_the_network_does_not_take(tmp_path):
    config = smoke()
    conditions = dict(source="labels.every", num_classes=50)
    with pytest.raises(
        ValueError,
        match=r"^labels\.every: label 1\d of item 1\d is not below network\.num_classes = 10",
    ):
        build.checked_source(stage_of(config, "teacher"), conditions, tmp_path)
    config.network.size = 16
    with pytest.raises(
        ValueError,
        match=r"^digits: image \d+ has shape \(8, 8, 1\), the network makes "
        r"\(16, 16, 1\); change one",
    ):
        train.run(stage_of(config, "teacher"), tmp_path)


def test_a_workdir_does_not_change_hands(workdir):
    """Neither by naming other stages nor by settings that only look like lengths."""
    for key, value in (
        ("stages", ("evaluate",)),
        ("teacher.sampler.num_steps", 9),
        ("network.width", 16),
    ):
        config = smoke()
        config.update_from_flattened_dict({key: value})
        with pytest.raises(ValueError, match=rf"belongs to another config: {key} is "):
            main.run(config, workdir)
    workdir_lib.claim(values_of(smoke()), workdir)


def test_a_stage_that_continues_another(workdir):
    """Optimizers, fake score and steps go on."""
    config = smoke()
    with config.unlocked():
        config.more = config.dmd.copy_and_resolve_references()
        config.more.continues = "dmd"
    config.more.num_steps = config.dmd.num_steps + 1
    train.run(stage_of(config, "more"), workdir)
    assert {row["step"] for row in log.read(workdir / "more")} == {config.more.num_steps}
    shutil.rmtree(workdir / "more")
    shutil.rmtree(workdir / "dmd")
    with pytest.raises(ValueError, match=r"no checkpoint in .*dmd; run the stage 'dmd' first"):
        train.run(stage_of(config, "more"), workdir)


def test_images_of_labels(finished):
    model = model_lib.load(finished, batch_size=8)
    images = model([3, 4], seed=1)
    assert images.shape == (2, 8, 8, 1) and model.sampler.nfe == 1
    np.testing.assert_allclose(model([3], seed=1)[0], images[0], atol=1e-5)
    with pytest.raises(ValueError, match="expected labels from 0 to 9"):
        model(["three"])


def test_load_is_on_the_packages_face(finished):
    images = dmd_jax.load(finished, stage="teacher", sampler=dict(num_steps=2))([3])
    assert images.shape == (1, 8, 8, 1)
    assert dmd_jax.__all__ == ["__version__", "load"]
    with pytest.raises(ValueError, match="absent"):
        dmd_jax.load(str(finished / "absent"))


def test_importing_the_package_imports_nothing_else():
    code = "import sys, dmd_jax; print('jax' in sys.modules, 'numpy' in sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout == "False False\n"


def as_flow(config, workdir):
    """Adds a stage `flow`: the teacher as a rectified flow."""
    shutil.copytree(workdir / "teacher", workdir / "flow")
    (workdir / "config.json").unlink()
    config.flow = dict(
        config.teacher,
        process=dict(name="RectifiedFlow"),
        prediction="rectified",
        sampler=dict(name="euler", num_steps=4),
    )
    config.stages = ("teacher", "pairs", "flow", "dmd", "evaluate")


def test_further_rows_of_an_evaluation(workdir, capsys):
    """Rows of another sampler, eight bits or free steps are in the order of stages and steps."""
    config = smoke()
    as_flow(config, workdir)
    flow = stage_of(config, "flow")
    made.claim(flow, workdir, made.of(flow, workdir), begun=False)
    rows = {
        "adaptive": dict(name="rk45", rtol=1e-2, atol=1e-2),
        "eight": dict(name="euler", num_steps=8),
        "two": dict(name="euler", num_steps=2),
    }
    config.evaluate.others = {
        name: dict(stage="flow", sampler=sampler) for name, sampler in rows.items()
    }
    config.evaluate.others.int8 = dict(stage="dmd", sampler=dict(name="one_step"), quantize="int8")
    config.evaluate.straightness = dict(stages=("teacher", "flow"), num_steps=10, count=32)
    main.run(config, workdir, "evaluate")
    result = result_of(workdir)
    nfe = nfe_of(result)
    assert list(nfe) == ["teacher", "dmd", "adaptive", "two", "eight", "int8"]
    assert (nfe["two"], nfe["eight"]) == (2, 8) and 8 < nfe["adaptive"] < 200
    scores = scores_of(result)
    assert scores["int8"] != scores["dmd"] and scores["int8"].keys() == scores["dmd"].keys()
    assert result.straightness["teacher"] == pytest.approx(result.straightness["flow"])
    assert result.straightness["flow"] > 0 and result.row("teacher").training_seconds > 0
    text = capsys.readouterr().out
    assert "straightness of flow: 0." in text and text.index("adaptive ") < text.index(
        "two "
    ) < text.index("eight ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(others=dict(row=dict(stage="floww", sampler=dict(name="one_step")))),
            "evaluate.others.row.stage is 'floww', which is no stage",
        ),
        (
            dict(others=dict(row=dict(stage="dmd", sampler=dict(name="eulerr", num_steps=1)))),
            r"has no 'eulerr' .did you mean 'euler'",
        ),
        (
            dict(others=dict(row=dict(stage="dmd", sampler=dict(name="euler")))),
            "evaluate.others.row.sampler does not fit: .*num_steps",
        ),
        (
            dict(others=dict(row=dict(stage="dmd", sampler=dict(name="rk45")))),
            "rk45 needs the process RectifiedFlow, got EDM",
        ),
        (
            dict(
                others=dict(row=dict(stage="dmd", sampler=dict(name="one_step"), quantize="int4"))
            ),
            "quantize is 'int4'; expected 'int8'",
        ),
        (
            dict(straightness=dict(stages=("pairs",), num_steps=10, count=8)),
            "evaluate.straightness.stages: pairs is 'pairs', which is no stage",
        ),
    ],
)
def test_rows_that_cannot_be(changes, message):
    config = smoke()
    config.evaluate.update(changes)
    with pytest.raises(ValueError, match=message):
        check_of(config)


def test_a_flow_is_named_where_it_is_needed():
    config = smoke()
    config.dmd.recipe = dict(name="reflow", optimizer=config.dmd.recipe.optimizer, ema_decay=0.0)
    with pytest.raises(
        ValueError, match="reflow needs the process RectifiedFlow, got EDM; give it to the stage"
    ):
        build.recipe(
            stage_of(config, "dmd"),
            sharding.Parallel(sharding.make_mesh(1)),
            pathlib.Path("nowhere"),
        )
    config.prediction = "rectified"  # of the teacher: of what?
    with pytest.raises(ValueError, match="no prediction for EDM 'rectified'"):
        check_of(config)


def test_a_stage_trained_on_other_pairs_is_not_done(workdir):
    """The pairs were deleted, and made again by a teacher that has learnt on."""
    config = smoke()
    assert train.done(stage_of(config, "dmd"), workdir)
    shutil.rmtree(workdir / "pairs")
    assert train.done(stage_of(config, "dmd"), workdir)  # to make room
    config.teacher.num_steps = 35
    main.run(config, workdir, "teacher")
    main.run(config, workdir, "pairs")
    with pytest.raises(
        ValueError,
        match=r"dmd was made from other things .*content of data.pairs is .*use another workdir",
    ):
        main.run(config, workdir, "dmd")


def test_a_network_that_does_not_fit_where_it_starts_from(workdir):
    config = smoke()
    config.dmd.network = dict(config.network, width=16)
    with pytest.raises(
        ValueError,
        match=r"the network of dmd does not fit what teacher has.*\d+ parameters differ, such as",
    ):
        train.run(stage_of(config, "dmd"), workdir)


def test_a_checkpoint_has_all_rows_of_metrics_up_to_it(tmp_path, monkeypatch):
    """A process that is killed right after a checkpoint was written loses none of them."""
    config = smoke()
    last_rows = []
    save = checkpoint.save

    def saving(manager, train_state, step, **arguments):
        last_rows.append((step, log.read(tmp_path / "teacher")[-1]["step"]))
        save(manager, train_state, step, **arguments)

    monkeypatch.setattr(checkpoint, "save", saving)
    train.run(stage_of(config, "teacher"), tmp_path)
    assert last_rows == [(10, 10), (20, 20), (30, 30)]


def test_the_speed_of_a_row_is_that_of_its_interval_wherever_rows_are_flushed(
    tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    writer = log.Writer(tmp_path, name="teacher", start=0, num_steps=60)
    watch = train._Watch(0, writer, operations=1.0)
    for step in range(10, 70, 10):
        now[0] += 2.0
        watch.log(step, {"skipped": 0.0})
        now[0] += 1e-3
        if step in (30, 60):  # a checkpoint
            watch.flush()
    writer.close()
    first, *speeds = [row.get("steps_per_second") for row in log.read(tmp_path)]
    assert first is None and speeds == pytest.approx([10 / 2.001] * 5)


def test_no_row_is_read_that_no_step_needs(tmp_path, monkeypatch):
    """Such a row could be damaged, and the stage would never end."""
    batches = pipeline.batches

    def only(streams, **arguments):
        for i, batch in enumerate(batches(streams, **arguments), 1):
            assert i <= 30
            yield batch

    monkeypatch.setattr(pipeline, "batches", only)
    train.run(stage_of(smoke(), "teacher"), tmp_path)
    assert checkpoint.all_steps(tmp_path / "teacher")[-1] == 30


def test_images_that_are_not_finite_are_named_and_cost_no_checkpoint(workdir, monkeypatch, capsys):
    """The best checkpoint stays where a later score is no number."""
    shutil.rmtree(workdir / "dmd")
    make = generate.make_sample
    made = []

    def make_sample(*arguments):
        sample = make(*arguments)

        def broken(params, inputs):
            made.append(1)
            return sample(params, inputs) * (np.nan if len(made) > 3 else 1)

        return broken

    monkeypatch.setattr(generate, "make_sample", make_sample)
    train.run(stage_of(smoke(), "dmd"), workdir)
    said = capsys.readouterr().err
    assert "step 20: 64 of 64 images have pixels that are not finite" in said
    assert [row["step"] for row in log.read(workdir / "dmd") if "FD-mlp@8-64" in row] == [10]
    assert checkpoint.all_steps(workdir / "dmd") == [10, 20]
    with pytest.raises(FloatingPointError, match=r"^teacher: 32 of 32 images have pixels that are"):
        evaluate.run(stage_of(smoke(), "evaluate"), workdir)


def test_a_stage_that_is_to_stop_leaves_its_scores(workdir, monkeypatch):
    shutil.rmtree(workdir / "dmd")
    batches = evaluation.batches

    def stopped(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return batches(*arguments)

    monkeypatch.setattr(evaluation, "batches", stopped)
    with pytest.raises(preemption.Preempted, match="dmd was stopped at step 10, which is saved"):
        train.run(stage_of(smoke(), "dmd"), workdir)
    assert checkpoint.all_steps(workdir / "dmd") == [10]
    assert not [row for row in log.read(workdir / "dmd") if "FD-mlp@8-64" in row]
