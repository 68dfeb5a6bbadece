"""What a stage was made from is written beside it, and compared before it is used."""

import json
import shutil

import numpy as np
import pytest

from dmd_jax import main
from dmd_jax.data import digits, records
from dmd_jax.data import images as images_lib
from dmd_jax.experiment import build, made
from dmd_jax.runtime import checkpoint, storage
from dmd_jax.stages import evaluate, pairs, train
from tests.helpers.runs import smoke, stage_of

pytestmark = pytest.mark.usefixtures("recipes_once")


def test_every_stage_says_what_it_was_made_from(finished):
    teacher, of_pairs, dmd = (
        storage.read_json(finished / name / made.FILE) for name in ("teacher", "pairs", "dmd")
    )
    assert of_pairs["content of teacher"] == checkpoint.content(finished / "teacher")
    assert dmd["content of teacher"] == of_pairs["content of teacher"]
    digest = made.digest(of_pairs)
    assert storage.read_json(finished / "pairs" / records.MANIFEST)["made"] == digest
    assert teacher["content of data.images"] == digits.make(split="train").digest
    assert "num_steps" not in teacher and teacher["batch_size"] == 64


def test_pairs_of_other_conditions_are_not_done(tmp_path):
    """Also where the conditions were embedded again while pairs were made."""
    config = smoke()
    config.pairs.conditions = dict(source="records.read", directory="{workdir}/prompts")
    config.pairs.teacher = "teacher"
    stage = stage_of(config, "pairs")
    manifest = {"count": 10, "shards": 1, "features": {"cond": {"shape": [], "dtype": "int32"}}}
    directory = tmp_path / "prompts"
    records.write_manifest(directory, manifest | {"made": "first"})
    path = records.shard_paths(directory, manifest)[0]
    records.write_shard(path, {"cond": np.arange(10, dtype=np.int32)})
    made.claim(stage, tmp_path, made.of(stage, tmp_path), begun=False)
    records.write_manifest(tmp_path / "pairs", {"shards": 0})
    assert pairs.done(stage, tmp_path)
    storage.write_json(directory / records.MANIFEST, manifest | {"made": "second"})
    with pytest.raises(ValueError, match=r"made from other things .*content of conditions is"):
        pairs.done(stage, tmp_path)
    with pytest.raises(ValueError, match=r"content of conditions is .*move it and what was made"):
        pairs.run(stage, tmp_path)


def test_an_evaluation_of_other_weights_at_the_same_step_is_made_again(workdir):
    stage = stage_of(smoke(), "evaluate")
    assert evaluate.done(stage, workdir)
    meta = workdir / "dmd/checkpoints/20/meta/metadata"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"content": "another"}))
    assert not evaluate.done(stage, workdir)


def test_an_evaluation_asks_for_its_floor_and_for_the_order_of_its_models(workdir):
    config = smoke()
    config.evaluate.teacher, config.evaluate.student = "dmd", "teacher"
    assert not evaluate.done(stage_of(config, "evaluate"), workdir)
    config = smoke()
    assert evaluate.done(stage_of(config, "evaluate"), workdir)
    other = images_lib.from_arrays(np.zeros((9, 8, 8, 1)), np.zeros(9, int), origin="x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_content", lambda *_: other.digest)
        assert not evaluate.done(stage_of(config, "evaluate"), workdir)


def test_a_stage_by_name_does_not_take_what_is_of_another_teacher(workdir):
    config = smoke()
    config.teacher.num_steps = 35
    main.run(config, workdir, "teacher")
    shutil.rmtree(workdir / "dmd")
    with pytest.raises(ValueError, match=r"pairs was made from other things .*content of teacher"):
        main.run(config, workdir, "dmd")


@pytest.mark.parametrize("stage", ["pairs", "dmd", "evaluate"])
def test_a_stage_by_name_does_not_take_what_is_not_finished(workdir, stage):
    shutil.rmtree(workdir / "teacher/checkpoints/30")
    shutil.rmtree(workdir / "pairs")
    shutil.rmtree(workdir / "dmd")
    shutil.rmtree(workdir / "evaluate")
    reads = {"pairs": "teacher", "dmd": "(teacher|pairs)", "evaluate": "(teacher|dmd)"}[stage]
    message = rf"{stage} reads what {reads} makes, which is not done: run .* --stage={reads}"
    with pytest.raises(ValueError, match=message):
        main.run(smoke(), workdir, stage)


def test_data_that_differ_where_no_sample_looks(workdir, monkeypatch):
    source = digits.make(split="train")
    labels = source.cond.copy()
    sampled = np.linspace(0, len(labels) - 1, 16).astype(int)
    changed = np.setdiff1d(np.arange(len(labels)), sampled)
    labels[changed] = (labels[changed] + 1) % 10
    other = images_lib.from_arrays(source.image, labels, origin="other digits")
    stage = stage_of(smoke(), "teacher")
    assert train.done(stage, workdir)
    monkeypatch.setattr(build, "open_source", lambda *_: other)
    with pytest.raises(ValueError, match=r"made from other things .*content of data.images is"):
        train.done(stage, workdir)


def test_data_that_are_gone_hide_nothing(workdir):
    shutil.rmtree(workdir / "pairs")
    assert train.done(stage_of(smoke(), "dmd"), workdir)


def test_a_directory_that_does_not_say_what_it_was_made_from(workdir):
    (workdir / "dmd" / made.FILE).unlink()
    with pytest.raises(ValueError, match=r"dmd has no made.json, which says from what it was made"):
        train.done(stage_of(smoke(), "dmd"), workdir)
