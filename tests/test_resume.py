"""A run that is killed goes on to the very same result; bad flags give one line."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import chex
import pytest

from dmd_jax import main
from dmd_jax.data import records
from tests.helpers import runs, xla
from tests.test_stages import params_of, smoke

ROOT = pathlib.Path(__file__).parent.parent
SIGNS = {  # what is there once a stage has begun
    "teacher": "teacher/metrics.jsonl",
    "pairs": "pairs/manifest.json",
    "dmd": "dmd/metrics.jsonl",
    "evaluate": "dmd/checkpoints/20",
}
KILLS = int(os.environ.get("DMD_TEST_KILLS", "1"))  # per stage


def command(workdir, *arguments):
    return [
        sys.executable,
        "-m",
        "dmd_jax.main",
        "--config=configs/digits.py:smoke",
        f"--workdir={workdir}",
        *arguments,
    ]


def environment():
    return os.environ | {
        "XLA_FLAGS": xla.flags(devices=8),
        "PYTHONPATH": str(ROOT),
    }


def run(*arguments, workdir):
    return subprocess.run(
        command(workdir, *arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )


def content(workdir):
    """Reads what must be equal: the parameters of all checkpoints, and the pairs."""
    source = records.read(directory=workdir / "pairs")
    params = [params_of(smoke(), workdir, stage) for stage in ("teacher", "dmd")]
    return params, [source[i] for i in range(len(source))]


@pytest.mark.timeout(600 * KILLS)
def test_killed_at_any_moment(finished, tmp_path):
    broken = tmp_path / "broken"
    runs.put_classifier(finished, broken)
    rng = random.Random(time.time_ns())
    for sign in SIGNS.values():
        for _ in range(KILLS):
            process = subprocess.Popen(
                command(broken), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
            )
            while process.poll() is None and not (broken / sign).exists():
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 3))
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert run(workdir=broken).returncode == 0
    chex.assert_trees_all_equal(content(broken), content(finished))


def test_a_bad_flag(tmp_path):
    result = run("--config.dmd.batchsize=64", workdir=tmp_path / "run")
    assert result.returncode != 0
    assert 'Did you mean "batch_size"' in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--config.dmd.batch_size=many",
            r"^error: .*invalid literal for int\(\) with base 10: 'many'",
        ),
        (
            "--config=configs/digits.py:fast",
            "^error: configs/digits.py has no variant 'fast'; there are: "
            "no_matching, no_regression, ",
        ),
        (
            "--config=configs/digit.py",
            r"^error: no config configs/digit.py \(did you mean 'digits'\?\); there are: cifar10, ",
        ),
    ],
)
def test_flags_that_cannot_be_read(monkeypatch, tmp_path, argument, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        sys, "argv", [*command(tmp_path)[2:], argument]
    )  # overrides are found there
    with pytest.raises(SystemExit, match=message):
        main.parse(sys.argv)
