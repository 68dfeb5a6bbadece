"""Runs of several processes: they give what one gives, and end together. These start processes."""

import pathlib
import shutil
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from dmd_jax import main
from dmd_jax.data import records
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import checkpoint, distributed, log
from dmd_jax.stages import train
from tests.helpers import processes, runs, small
from tests.helpers.runs import params_of, stage_of, values_of

ENDLESS = "--config.teacher.num_steps=1000000"


@pytest.fixture(scope="module")
def one(finished, tmp_path_factory):
    """All stages by this process, with its 8 devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    runs.put_classifier(finished, workdir)
    main.run(small.get_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def two(finished, tmp_path_factory):
    """All stages by two processes of 4 devices each."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    runs.put_classifier(finished, workdir)
    processes.run(workdir, processes=2, devices=4)
    return workdir


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run like `two` one of whose processes was killed after step 10."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    started = processes.start(workdir, "--stage=teacher", ENDLESS, processes=2, devices=4)
    processes.wait_for((workdir / "teacher/checkpoints/10").exists, started)
    started[1].kill()
    assert processes.codes(started, seconds=60)[0] in (
        distributed.LOST,
        -6,
    )  # or jax's own watch was first
    for step in checkpoint.all_steps(workdir / "teacher")[1:]:
        shutil.rmtree(workdir / f"teacher/checkpoints/{step}")
    return workdir


def losses(workdir, stage):
    return [row["loss"] for row in log.read(workdir / stage) if "loss" in row]


def params(workdir, stage):
    config = small.get_config()
    config.mesh.data = 1
    return params_of(config, workdir, stage)


def test_two_processes_give_what_one_gives(one, two):
    assert len(losses(one, "teacher")) == 20
    for stage in ("teacher", "direct"):
        np.testing.assert_allclose(losses(two, stage), losses(one, stage), rtol=1e-5)
    ours, theirs = (records.read(directory=d / "pairs") for d in (two, one))
    for i in range(len(theirs)):
        np.testing.assert_array_equal(ours[i]["noise"], theirs[i]["noise"])
        np.testing.assert_allclose(ours[i]["image"], theirs[i]["image"], atol=1e-5)
    ours, theirs = (runs.result_of(directory) for directory in (two, one))
    assert ours.asked["protocol"] == theirs.asked["protocol"]
    chex.assert_trees_all_close(ours.straightness, theirs.straightness, rtol=1e-5, atol=1e-6)
    scores = [runs.scores_of(result) for result in (ours, theirs)]
    chex.assert_trees_all_close(*scores, rtol=1e-5, atol=1e-6)


def test_a_killed_process_ends_the_others_and_the_run_goes_on_to_the_same(killed, two, tmp_path):
    workdir = pathlib.Path(shutil.copytree(killed, tmp_path / "run"))
    processes.run(workdir, "--stage=teacher", processes=2, devices=4)
    chex.assert_trees_all_equal(params(workdir, "teacher"), params(two, "teacher"))


def test_another_number_of_processes_goes_on(killed, one, tmp_path):
    workdir = pathlib.Path(shutil.copytree(killed, tmp_path / "run"))
    config = small.get_config()
    config.teacher.num_steps = 15
    train.run(stage_of(config, "teacher"), workdir)
    processes.run(workdir, "--stage=teacher", processes=2, devices=4)
    np.testing.assert_allclose(losses(workdir, "teacher"), losses(one, "teacher"), rtol=1e-5)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_others(tmp_path, stopped):
    """Also where they wait for it inside C++ code."""
    script = (
        "import sys\n"
        "from dmd_jax.runtime import distributed\n"
        "where = sys.argv[1], 2, int(sys.argv[2])\n"
        "with distributed.started(*where, heartbeat_timeout=5):\n"
        "    while True:\n"
        "        print(distributed.gather(1), flush=True)\n"
    )
    started = processes.start_script(script, tmp_path, processes=2)
    processes.wait_for(lambda: "[1 1]" in started[0].output.read_text(), started)
    started[stopped].send_signal(signal.SIGSTOP)
    try:
        assert started[1 - stopped].wait(60) == distributed.LOST
    finally:
        started[stopped].kill()
    said = started[1 - stopped].output.read_text()
    assert (
        "process 1: process 0 has not answered for 5 s"
        if stopped == 0
        else "process 1 is silent for 5 s"
    ) in said


def test_a_process_that_sees_a_directory_late_follows_process_0(one, tmp_path):
    script = (
        "import pathlib, sys\n"
        "from dmd_jax.experiment import build, workdir\n"
        "from dmd_jax.runtime import checkpoint, checksum, distributed\n"
        "from tests.helpers import small\n"
        "all_steps = checkpoint.all_steps\n"
        "late = sys.argv[2] == '1'\n"
        "checkpoint.all_steps = lambda directory: all_steps(directory)[: -1 if late else None]\n"
        "with distributed.started(sys.argv[1], 2, int(sys.argv[2])):\n"
        "    stage = build.stages(small.get_config())['teacher']\n"
        f"    run = pathlib.Path({str(one)!r})\n"
        "    print(checksum.of(workdir.load_params(stage, run)), flush=True)\n"
    )
    started = processes.start_script(script, tmp_path, processes=2)
    assert processes.codes(started) == [0, 0]
    expected = checkpoint.content(one / "teacher").split()[-1]
    assert [p.output.read_text().split()[-1] for p in started] == [expected] * 2


def test_an_error_of_one_ends_all(tmp_path):
    extra = ((), ("--config.teacher.batch_size=32",))
    started = processes.start(tmp_path / "run", "--stage=teacher", processes=2, extra=extra)
    assert processes.codes(started) == [1, 1]
    theirs, ours = (p.output.read_text() for p in started)
    line = "error: the config is not that of process 0; give all processes the same flags."
    assert (
        f"process 1: {line}" in ours and f"process 0: ends because of process 1: {line}" in theirs
    )
    assert "Traceback" not in ours + theirs


def test_a_coordinator_that_cannot_be_reached():
    script = (
        "from dmd_jax.runtime import distributed\n"
        "with distributed.started('127.0.0.1:9', 2, 1, initialization_timeout=2): pass"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=processes.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert (
        "process 1: error: 127.0.0.1:9 and all processes did not meet within 2 s" in result.stderr
        and "Check failure" not in result.stderr
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("a:1", None, None),
            "coordinator_address, num_processes, process_id belong together, "
            "but num_processes, process_id is not given",
        ),
        (("a:1", 2, 2), "process_id is 2; expected 0 to 1, as num_processes is 2"),
    ],
)
def test_flags_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message), distributed.started(*given):
        pass


def test_one_run_at_a_time(tmp_path):
    config = small.get_config()
    message = (
        r"is in use by another run, process \d+ of .* since 20.*; wait for its end, or stop it"
    )
    with workdir_lib.claimed(values_of(config), tmp_path), pytest.raises(ValueError, match=message):
        main.run(config, tmp_path)
    with workdir_lib.claimed(values_of(config), tmp_path):
        pass


def test_a_workdir_that_is_not_shared(tmp_path, monkeypatch):
    clock = iter(range(0, 100, 20))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.raises(
        ValueError,
        match="is not the one of process 0, whose files are not there; "
        "give all processes one --workdir",
    ):
        workdir_lib._check_shared(values_of(small.get_config()), tmp_path, 1)
