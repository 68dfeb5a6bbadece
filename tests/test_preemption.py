"""SIGTERM and notices of Google Cloud. These start processes."""

import http.server
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import chex
import pytest

from dmd_jax import main
from dmd_jax.runtime import checkpoint, log, preemption
from tests.helpers import processes, small
from tests.helpers.runs import params_of

pytestmark = pytest.mark.usefixtures("recipes_once")

ENDLESS = "--config.teacher.num_steps=1000000"
LONG = (
    "--config.pairs.count=1000000",
    "--config.evaluate.count=1000000",
    "--config.evaluate.student=teacher",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a teacher, whose other stages are LONG."""
    workdir, config = tmp_path_factory.mktemp("trained") / "run", small.get_config()
    config.pairs.count = config.evaluate.count = 1000000
    config.evaluate.student = "teacher"
    main.run(config, workdir, "teacher")
    return workdir


def test_a_stopped_training_goes_on_to_the_same(trained, tmp_path, monkeypatch):
    advance = log.Writer.advance

    def advance_and_stop(self, step):
        advance(self, step)
        if step == 6:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(log.Writer, "advance", advance_and_stop)
    with pytest.raises(
        preemption.Preempted,
        match=r"^teacher was stopped at step 7, which is saved; run the same command again\.$",
    ):
        main.run(small.get_config(), tmp_path, "teacher")
    assert checkpoint.all_steps(tmp_path / "teacher") == [7]
    monkeypatch.undo()
    main.run(small.get_config(), tmp_path, "teacher")
    chex.assert_trees_all_equal(
        *(params_of(small.get_config(), d, "teacher") for d in (tmp_path, trained))
    )
    assert [row["loss"] for row in log.read(tmp_path / "teacher")] == [
        row["loss"] for row in log.read(trained / "teacher")
    ]


def test_a_notice_that_comes_too_late_is_not_lost():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("taken"))
    try:
        with preemption.deferred() as notice:
            signal.raise_signal(signal.SIGTERM)
            assert notice.is_set() and not seen
        assert seen == ["taken"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_processes_agree_on_a_step(tmp_path):
    workdir = tmp_path / "run"
    started = processes.start(workdir, "--stage=teacher", ENDLESS, processes=2)
    processes.wait_for((workdir / "teacher/checkpoints/10").exists, started)
    started[1].terminate()
    assert processes.codes(started, 60) == [preemption.EXIT_CODE] * 2, [
        p.output.read_text() for p in started
    ]
    step = max(checkpoint.all_steps(workdir / "teacher"))
    assert (
        f"teacher was stopped at step {step}, which is saved; run the same command again."
        in started[0].output.read_text()
    )
    assert len(log.read(workdir / "teacher")) in (step, step - 1)


def test_a_process_that_waits_for_ever_ends_after_its_deadline(monkeypatch):
    left = threading.Event()
    monkeypatch.setattr(preemption.distributed, "leave", lambda code, line: left.set())
    monkeypatch.setattr(preemption, "DEADLINE", 0.1)
    with pytest.raises(preemption.Preempted), preemption.deferred():
        time.sleep(0.3)
        assert not left.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert left.wait(5)
        raise preemption.Preempted


def test_ctrl_c_saves_and_a_second_one_ends_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(preemption.distributed, "leave", lambda code, line: left.append(code))
    with pytest.raises(preemption.Preempted) as raised, preemption.deferred() as notice:
        signal.raise_signal(signal.SIGINT)
        assert notice.is_set() and not left
        signal.raise_signal(signal.SIGTERM)  # as launch/gpu_local.sh sends it besides
        assert not left
        signal.raise_signal(signal.SIGINT)
        assert left == [130]
        raise preemption.Preempted("saved")
    assert raised.value.code == 130


def test_ctrl_c_saves_also_where_nobody_reads_the_output(tmp_path):
    command = [sys.executable, "-m", "dmd_jax.main", "--config=tests/helpers/small.py"]
    command += [f"--workdir={tmp_path / 'run'}", "--stage=teacher", ENDLESS]
    process = subprocess.Popen(
        command,
        cwd=processes.ROOT,
        env=processes.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    process.stdout.close()  # nobody reads any more
    process.output = pathlib.Path(os.devnull)
    processes.wait_for((tmp_path / "run/teacher/checkpoints/10").exists, [process])
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == preemption.INTERRUPTED
    step = max(checkpoint.all_steps(tmp_path / "run/teacher"))
    assert step > 10 and log.read(tmp_path / "run/teacher")[-1]["step"] in (step, step - 1)


@pytest.mark.parametrize(
    ("stage", "sign"), [("pairs", "pairs/manifest.json"), ("evaluate", "classifier.npz")]
)
def test_other_stages_end_at_once(trained, stage, sign):
    started = processes.start(trained, *LONG, f"--stage={stage}")
    processes.wait_for((trained / sign).exists, started)
    started[0].terminate()
    assert processes.codes(started, 10) == [preemption.EXIT_CODE]
    assert "stopped by SIGTERM; run the same command again." in started[0].output.read_text()


def test_at_once_even_inside_a_program():
    """A Python handler alone would wait until the main thread is back from C++."""
    script = """
import jax
from dmd_jax.runtime import preemption
preemption.watch()
print(1, flush=True)
endless = jax.jit(lambda: jax.lax.while_loop(lambda x: x < 1, lambda x: x * 2, 0.0))
jax.block_until_ready(endless())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=processes.environment(), stdout=subprocess.PIPE
    )
    process.stdout.readline()
    time.sleep(3)
    process.terminate()
    try:
        assert process.wait(10) == preemption.EXIT_CODE
    finally:
        process.kill()


def test_a_notice_of_google_cloud(trained, tmp_path):
    answers = {"maintenance-event": "NONE", "preempted": "FALSE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.send_header("Metadata-Flavor", "Google")
            self.end_headers()
            self.wfile.write(answers[self.path.rsplit("/", 1)[1]].encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started = processes.start(
            tmp_path / "run",
            "--stage=teacher",
            ENDLESS,
            GCE_METADATA_HOST=f"127.0.0.1:{server.server_port}",
        )
        processes.wait_for((tmp_path / "run/teacher/checkpoints/10").exists, started)
        answers["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        assert processes.codes(started, 30) == [preemption.EXIT_CODE]
        server.shutdown()
    said = started[0].output.read_text()
    assert (
        "Google Cloud announces maintenance-event TERMINATE_ON_HOST_MAINTENANCE." in said
        and "teacher was stopped at step" in said
    )
