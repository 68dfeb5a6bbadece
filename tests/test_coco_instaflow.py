"""Runs configs/coco.py:tiny_instaflow.

It goes from a Stable Diffusion directory to one step of two UNets in series.
"""

import jax
import numpy as np
import pytest

from dmd_jax import main
from dmd_jax.commands import export
from dmd_jax.data import records
from dmd_jax.experiment import model
from dmd_jax.runtime import checkpoint, log
from tests.helpers import runs

pytest.importorskip("diffusers")
from tests.test_coco import files, protocol, tiny  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):  # noqa: F811
    workdir = tmp_path_factory.mktemp("instaflow")
    config = tiny(files, "tiny_instaflow", "one_level")
    with pytest.warns(UserWarning):
        main.run(config, workdir)
    return config, workdir


def test_every_stage_leaves_what_the_next_one_reads(run):
    config, workdir = run
    steps = {
        stage: checkpoint.all_steps(workdir / stage)[-1]
        for stage in config.stages
        if config[stage].program == "train"
    }
    assert steps == {"reflow_1": 4, "reflow_2": 6, "distil_1": 4, "distil_2": 6}
    assert (
        len(records.read(directory=workdir / "pairs"))
        == len(records.read(directory=workdir / "flow_pairs"))
        == 16
    )
    result = runs.result_of(workdir)
    assert result.row("distil_2").nfe == 1 and result.row("reflow_2_euler_2").nfe == 2
    assert result.straightness.keys() == {"teacher", "reflow_2"}
    assert all(np.isfinite(list(result.straightness.values())))
    rows = runs.scores_of(result)
    assert rows["distil_2"].keys() == rows["teacher"].keys() == rows["reflow_2_euler_2"].keys()


def test_both_units_of_the_stack_start_from_the_flow_and_are_trained(run):
    config, workdir = run
    flow, first, last = (
        runs.params_of(config, workdir, stage) for stage in ("reflow_2", "distil_1", "distil_2")
    )
    one, two = first["units"]["0"], first["units"]["1"]
    assert "conv_out" not in one and "conv_in" not in two
    for unit in (one, two):
        for before, after in zip(
            jax.tree.leaves(flow["mid_block"]), jax.tree.leaves(unit["mid_block"]), strict=True
        ):
            np.testing.assert_allclose(before, after, atol=1e-3)  # four steps
    moved = [
        np.abs(a - b).max()
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True)
    ]
    assert np.mean(np.array(moved) > 0) > 0.9


def test_a_phase_goes_on_from_the_optimizer_of_the_one_before(run):
    _, workdir = run
    assert [row["step"] for row in log.read(workdir / "reflow_2")] == [5, 6]
    assert (
        log.read(workdir / "distil_1")[0]["loss"] > 0
        and log.read(workdir / "distil_2")[0]["loss"] > 0
    )


def test_a_second_run_does_nothing(run, capsys):
    config, workdir = run
    main.run(config, workdir)
    assert capsys.readouterr().out.count("done already") == len(config.stages)


def test_samples_of_the_flow_and_of_one_step(run):
    _, workdir = run
    one = model.load(workdir, batch_size=8)
    many = model.load(workdir, stage="reflow_2", batch_size=8, sampler=dict(num_steps=2))
    assert one.sampler.nfe == 1 and many.sampler.nfe == 2
    assert np.isfinite(one(["blue sky"])).all() and np.isfinite(many(["blue sky"])).all()


def test_a_stack_has_no_public_format(run, tmp_path):
    _, workdir = run
    with pytest.raises(ValueError, match="stack"):
        export.export(workdir, "distil_2", tmp_path / "student")
