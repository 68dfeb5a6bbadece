"""Several processes that run one program find one another, wait for one another, and end together.

A process that fails ends all others, and each prints whose error it was. The others also end if a
process is killed, stopped or cut off: process 0 knows which processes are alive. If process 0 hangs
as well, jax's own watch ends the run.
"""

import contextlib
import json
import os
import sys
import threading
import time
import warnings

import jax
import numpy as np
from absl import logging

# jax has no public access to the service behind jax.distributed.
from jax._src import distributed as coordination
from jax.experimental import multihost_utils

from dmd_jax import sharding

PERIOD = 1.0  # seconds between two looks at the other processes
MARGIN = 10  # seconds by which jax's own watch is slower, because it prints no reason
LOST = 134  # the exit code if another process is lost; that of jax's own watch, which aborts
ALIVE = "dmd_jax/alive/"
FAILED = "dmd_jax/failed"
BUSY = "its machine is overloaded, for which there is --heartbeat_timeout"
FOREVER = 10**9  # milliseconds

_ENDING = threading.Lock()


@contextlib.contextmanager
def started(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: float = 30,
    initialization_timeout: float = 300,
):
    """Connects the processes of a run within this context, whose end they reach together.

    No computation of jax may have run before.

    Args:
      coordinator_address: host:port of process 0. If this and the next two are None, they come from
        Cloud TPU, SLURM (inside srun), Open MPI or Kubernetes; without any of these there is one
        process.
      num_processes: of the run.
      process_id: of this process, from 0.
      heartbeat_timeout: seconds after which a silent process counts as lost, and the run ends.
      initialization_timeout: seconds to wait for the other processes at the start.

    Raises:
      ValueError: only some of the first three are not None, or they do not fit.
    """
    address = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in address.items() if value is None]
    if 0 < len(missing) < len(address):
        raise ValueError(
            f"{', '.join(address)} belong together, but {', '.join(missing)} is not given; "
            "give all of them, or none."
        )
    if not missing and not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id is {process_id}; expected 0 to {num_processes - 1}, "
            f"as num_processes is {num_processes}."
        )
    # The service would take SIGTERM away from runtime/preemption.py.
    jax.config.update("jax_enable_preemption_service", False)
    line = (
        f"error: {coordinator_address or 'process 0'} and all processes did not meet within "
        f"{initialization_timeout} s; check that it can be reached, and that each process was "
        "started with an id of its own."
    )
    with _at_most(initialization_timeout, 1, line):
        _initialize(address, int(heartbeat_timeout) + MARGIN, int(initialization_timeout) + MARGIN)
    if jax.process_count() == 1:
        yield
        return
    if jax.process_index() > 0:  # process 0 prints for all
        warnings.simplefilter("ignore")
        logging.set_verbosity(logging.ERROR)
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended, heartbeat_timeout), daemon=True)
    watch.start()
    yield
    barrier("end")
    ended.set()
    watch.join()
    jax.distributed.shutdown()


def barrier(name: str):
    """Waits without a time limit until all processes are here."""
    if jax.process_count() > 1:
        coordination.global_state.client.wait_at_barrier(f"dmd_jax/{name}", FOREVER)


def gather(value) -> np.ndarray:
    """Returns the number `value` of every process, [P], to every process."""
    barrier("gather")  # the collective that follows may have a time limit
    return np.reshape(multihost_utils.process_allgather(np.asarray(value)), [jax.process_count()])


def first(value: int) -> int:
    """Returns the number `value` of process 0 to every process: it decides, the others follow."""
    return int(gather(np.int32(value))[0])


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Makes a mesh of the devices of `mesh` that belong to this process."""
    index = jax.process_index()
    return sharding.make_mesh(devices=[d for d in mesh.devices.flat if d.process_index == index])


def leave(code: int, line: str):
    """Ends this process with `code`, and all others too; every process prints `line`.

    It does not wait for the others.
    """
    client = coordination.global_state.client
    failure = {"code": code, "line": line, "process": coordination.global_state.process_id}
    # It raises an error if another process was first, or process 0 has ended.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if client:
            client.key_value_set(FAILED, json.dumps(failure))
    _end(code, line)


def _initialize(address, heartbeat_timeout, initialization_timeout):
    timeouts = dict(
        heartbeat_timeout_seconds=heartbeat_timeout, initialization_timeout=initialization_timeout
    )
    if address["coordinator_address"] is not None:
        jax.distributed.initialize(**address, **timeouts, cluster_detection_method="deactivate")
        return
    try:
        jax.distributed.initialize(**timeouts)
    except ValueError as error:
        # jax's error on a machine that belongs to no cluster
        if str(error) != "coordinator_address should be defined.":
            raise


def _watch(ended, timeout):
    """Reports to process 0 that this process lives; ends it if another fails, ends or is silent."""
    client = coordination.global_state.client
    index = jax.process_index()
    beats = {}
    silence = (
        f"process 0 has not answered for {timeout} s: it was stopped or cut off, or {BUSY}; "
        "run the same command again."
    )
    while not ended.wait(PERIOD):
        try:
            with _at_most(timeout, LOST, silence):
                now = str(time.monotonic())
                client.key_value_set(f"{ALIVE}{index}", now, allow_overwrite=True)
                values = dict(client.key_value_dir_get("dmd_jax/"))
        except jax.errors.JaxRuntimeError:
            _end(LOST, "process 0 has ended, and this one with it; run the same command again.")
        if FAILED in values:
            failure = json.loads(values[FAILED])
            _end(
                failure["code"], f"ends because of process {failure['process']}: {failure['line']}"
            )
        if index == 0:
            _check_beats(values, beats, timeout)


def _check_beats(values, beats, timeout):
    """Ends the run if a process is silent; `beats` has each one's last heartbeat and its time."""
    now = time.monotonic()
    for process in range(jax.process_count()):
        beat = values.get(f"{ALIVE}{process}")
        last_beat, since = beats.get(process, (None, now))
        if beat != last_beat:
            since = now
        beats[process] = beat, since
        if now - since > timeout:
            leave(
                LOST,
                f"process {process} is silent for {timeout} s: it was killed, stopped or cut off, "
                f"or {BUSY}; run the same command again.",
            )


@contextlib.contextmanager
def _at_most(seconds, code, line):
    """Ends the process with `code` and `line` if the context takes longer, even inside C++."""
    done = threading.Event()

    def expire():
        if not done.wait(PERIOD):  # a pause, because this whole process may have stood still
            _end(code, line)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        done.set()
        timer.cancel()


def _end(code, line):
    """Ends this process, from any thread or signal handler; the first call prints its line."""
    if not _ENDING.acquire(blocking=False):
        time.sleep(10 * PERIOD)
    process = coordination.global_state.process_id
    several = coordination.global_state.num_processes > 1
    if several:
        line = f"process {process}: {line}"
    os.write(sys.stderr.fileno(), f"{line}\n".encode())
    with contextlib.suppress(RuntimeError):  # the signal may have interrupted a write
        sys.stdout.flush()
    if several and process == 0:
        time.sleep(2 * PERIOD)  # the others still have to ask process 0 for the failure
    os._exit(code)
