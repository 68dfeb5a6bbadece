"""Starts main in processes of its own, several of them connected where there are several."""

import os
import pathlib
import socket
import subprocess
import sys
import time

from tests.helpers import xla

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": str(ROOT),
}


def environment(devices=1):
    cache = os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/dmd_jax_tests")
    )
    flags = {"XLA_FLAGS": xla.flags(devices), "JAX_COMPILATION_CACHE_DIR": cache}
    return os.environ | SETTINGS | flags


def start(workdir, *arguments, processes=1, devices=1, heartbeat=10, extra=((),), **env):
    """Processes of main, each with `output`, a file; `extra` are arguments of single ones."""
    address = free_address()
    command = [sys.executable, "-m", "dmd_jax.main", "--config=tests/helpers/small.py"]
    command += [f"--workdir={workdir}", *arguments, f"--heartbeat_timeout={heartbeat}"]
    commands = []
    for i in range(processes):
        where = [f"--coordinator_address={address}", f"--num_processes={processes}"]
        where = [*where, f"--process_id={i}"] if processes > 1 else []
        commands.append([*command, *where, *(extra[i] if i < len(extra) else ())])
    return _start(commands, workdir, environment(devices) | env)


def start_script(script, directory, *, processes):
    """Processes of a script, which gets the address of process 0 and its own number."""
    address = free_address()
    commands = [[sys.executable, "-c", script, address, str(i)] for i in range(processes)]
    return _start(commands, directory / "script", environment())


def free_address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def _start(commands, place, env):
    place.parent.mkdir(exist_ok=True, parents=True)
    started = []
    for i, command in enumerate(commands):
        output = place.parent / f"{place.name}-{time.time_ns()}-{i}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
        process.output = output
        started.append(process)
    return started


def wait_for(condition, started, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(p.poll() is None for p in started), [
            p.output.read_text() for p in started
        ]
        time.sleep(0.05)


def codes(started, seconds=300):
    """The exit codes once all have ended."""
    deadline = time.monotonic() + seconds
    try:
        return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in started]
    finally:
        for p in started:
            p.kill()


def run(workdir, *arguments, **settings):
    """To its end, which has to be good."""
    started = start(workdir, *arguments, **settings)
    assert codes(started) == [0] * len(started), [p.output.read_text() for p in started]
