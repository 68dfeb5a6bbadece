"""Several processes that run one program: how they find one another, wait for one another, and end together.

The one that fails ends all others, and each says whose error it was. One that is killed, stopped or cut off ends them too: process 0 keeps
the list of who is alive, and jax's own watch stands behind ours in case process 0 hangs as well.
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
from jax._src import (
    distributed as coordination,  # jax has no public way to the service behind jax.distributed
)
from jax.experimental import multihost_utils

from dmd_jax import sharding

PERIOD = 1.0  # seconds between two looks at the others
MARGIN = 10  # seconds by which jax's own watch is slower, as it ends a process without saying why
LOST = 134  # the exit code where another process was lost, as of jax's own watch, which aborts
ALIVE, FAILED = "dmd_jax/alive/", "dmd_jax/failed"
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
    """The processes of a run are connected within this context, whose end they reach together; nothing of jax may have run before.

    Args:
      coordinator_address: host:port of process 0; None, with the next two, for what Cloud TPU, SLURM (inside srun), Open MPI or Kubernetes
        say, and for one process where none of them is found.
      num_processes: of the run.
      process_id: of this one, from 0.
      heartbeat_timeout: seconds after which a silent process is given up, and the run with it.
      initialization_timeout: seconds to wait for the others at the start.

    Raises:
      ValueError: only some of the first three are given.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise ValueError(
                f"{', '.join(given)} belong together, but {', '.join(missing)} is not given; give all of them, or none."
            )
    elif not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id is {process_id}; expected 0 to {num_processes - 1}, as num_processes is {num_processes}."
        )
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # it takes SIGTERM away from dmd_jax/preemption.py
    where = coordinator_address or "process 0"
    with _at_most(initialization_timeout, 1, f"error: {where} and all processes did not meet within {initialization_timeout} s; check that "
                  "it can be reached, and that each process was started with an id of its own."):  # fmt: skip
        _initialize(given, int(heartbeat_timeout) + MARGIN, int(initialization_timeout) + MARGIN)
    if jax.process_count() == 1:
        yield
        return
    if jax.process_index() > 0:  # process 0 tells for all
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
    """Waits, for as long as it takes, until all processes are here."""
    if jax.process_count() > 1:
        coordination.global_state.client.wait_at_barrier(f"dmd_jax/{name}", FOREVER)


def gather(value) -> np.ndarray:
    """The number `value` of every process, [P], at every process."""
    barrier("gather")  # the collective that follows may have a time limit
    return np.reshape(multihost_utils.process_allgather(np.asarray(value)), [jax.process_count()])


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Those devices of `mesh` that are this process's own."""
    return sharding.make_mesh(
        devices=[d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    )


def leave(code: int, line: str):
    """Ends this process with `code`, and the others with it, who say `line` too. Waits for nothing that they do."""
    client = coordination.global_state.client
    with contextlib.suppress(
        jax.errors.JaxRuntimeError
    ):  # another one was first, or process 0 is gone
        if client:
            client.key_value_set(
                FAILED,
                json.dumps(
                    {"code": code, "line": line, "process": coordination.global_state.process_id}
                ),
            )
    _end(code, line)


def _initialize(given, heartbeat_timeout, initialization_timeout):
    timeouts = dict(
        heartbeat_timeout_seconds=heartbeat_timeout, initialization_timeout=initialization_timeout
    )
    if given["coordinator_address"] is not None:
        jax.distributed.initialize(**given, **timeouts, cluster_detection_method="deactivate")
        return
    try:
        jax.distributed.initialize(**timeouts)
    except ValueError as error:
        if (
            str(error) != "coordinator_address should be defined."
        ):  # what it says on a machine of its own
            raise


def _watch(ended, timeout):
    """Tells process 0 that this one lives, and ends it when another has failed, has ended or is silent."""
    client, heard = coordination.global_state.client, {}
    silence = f"process 0 has not answered for {timeout} s: it was stopped or cut off, or {BUSY}; run the same command again."
    while not ended.wait(PERIOD):
        try:
            with _at_most(timeout, LOST, silence):
                client.key_value_set(
                    f"{ALIVE}{jax.process_index()}", str(time.monotonic()), allow_overwrite=True
                )
                found = dict(client.key_value_dir_get("dmd_jax/"))
        except jax.errors.JaxRuntimeError:
            _end(LOST, "process 0 has ended, and this one with it; run the same command again.")
        if FAILED in found:
            said = json.loads(found[FAILED])
            _end(said["code"], f"ends because of process {said['process']}: {said['line']}")
        now = time.monotonic()
        for process in range(jax.process_count()) if jax.process_index() == 0 else ():
            beat = found.get(f"{ALIVE}{process}")
            before, since = heard.get(process, (None, now))
            heard[process] = beat, since if beat == before else now
            if now - heard[process][1] > timeout:
                cause = f"it was killed, stopped or cut off, or {BUSY}"
                leave(
                    LOST,
                    f"process {process} is silent for {timeout} s: {cause}; run the same command again.",
                )


@contextlib.contextmanager
def _at_most(seconds, code, line):
    """Ends the process with `code` and `line` if what it does within takes longer, be it inside C++."""
    done = threading.Event()

    def expire():
        if not done.wait(PERIOD):  # where this whole process had stood still
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
    """From any thread, and from within a handler of signals; the first to come speaks."""
    if not _ENDING.acquire(blocking=False):
        time.sleep(10 * PERIOD)
    process, several = (
        coordination.global_state.process_id,
        coordination.global_state.num_processes > 1,
    )
    os.write(sys.stderr.fileno(), (f"process {process}: " * several + line + "\n").encode())
    with contextlib.suppress(RuntimeError):  # it was about to be written to
        sys.stdout.flush()
    if several and process == 0:
        time.sleep(2 * PERIOD)  # it answers the others, who have yet to hear of it
    os._exit(code)
