"""A run ends when its machine is needed elsewhere: on SIGTERM, or a notice of Google Cloud.

While a network is trained, all processes agree on a step, save it and end. At any other time there
is nothing to save, because files are written atomically, and the process ends at once. Either way
the exit code is EXIT_CODE, and the same command continues the run. SIGINT (Ctrl-C) does the same,
but with INTERRUPTED, after which nobody starts the run again; a second one ends it at once.
"""

import collections
import contextlib
import http.client
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from dmd_jax.runtime import distributed, log

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 128 + signal.SIGINT
LATE = 2  # steps until the flags of a step are read, so that the host does not wait for the devices
DEADLINE = 600.0  # seconds from a notice to the end, whatever the process waits for
METADATA = "metadata.google.internal"
# keys of the metadata server, and their values on a notice
NOTICES = {
    "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE",
    "preempted": "TRUE",
}
PERIOD = 5.0  # seconds between two requests to the metadata server


class Preempted(Exception):
    """A stage has saved a step and stopped there.

    Attributes:
      code: with which the process ends.
    """

    code = EXIT_CODE


class Stopping(Exception):
    """Something that takes long was left because the run is to stop."""


def watch():
    """Makes SIGTERM and SIGINT end this process at once, except inside `deferred`.

    A notice of Google Cloud sends SIGTERM.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _interrupt)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    # The handler runs in the main thread, and only after C++ code, which may compile for minutes.
    # So a thread reads the signals, too.
    threading.Thread(target=_leave_on_signal, args=(reading, writing), daemon=True).start()
    threading.Thread(target=_watch_google_cloud, daemon=True).start()


@contextlib.contextmanager
def deferred():
    """Inside this context SIGTERM and the first SIGINT only set the yielded event.

    If the block ends without raising `Preempted`, the signal is sent again. If it does not end
    within DEADLINE, such as where it waits for a process that is gone, this process ends.
    """
    notice = threading.Event()
    seen = []
    deadline = threading.Timer(DEADLINE, _leave)
    deadline.daemon = True

    def handle(number, _):
        if signal.SIGINT in seen and number == signal.SIGINT:
            _interrupt()
        if not seen:
            deadline.start()
        seen.append(number)
        notice.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield notice
    except Preempted as error:
        error.code = INTERRUPTED if signal.SIGINT in seen else EXIT_CODE
        raise
    finally:
        deadline.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    if seen:
        signal.raise_signal(seen[0])


def make_agreement(mesh: jax.sharding.Mesh) -> Callable[[bool], bool]:
    """Makes `agree(notice) -> stop`: whether this process has a notice -> whether to stop.

    All processes call it once a step, and get the same answer. With several processes it is the
    answer to their notices LATE steps before.
    """
    if jax.process_count() == 1:
        return bool
    devices = jax.sharding.NamedSharding(mesh, P(mesh.axis_names))
    program = jax.jit(
        lambda flags: flags.max(), out_shardings=jax.sharding.NamedSharding(mesh, P())
    )
    pending = collections.deque()

    def agree(notice):
        flags = np.full(jax.local_device_count(), notice, np.int32)
        pending.append(program(jax.make_array_from_process_local_data(devices, flags)))
        return len(pending) > LATE and bool(pending.popleft())

    return agree


def _leave(*_):
    distributed.leave(EXIT_CODE, "stopped by SIGTERM; run the same command again.")


def _interrupt(*_):
    distributed.leave(INTERRUPTED, "interrupted; run the same command again.")


def _leave_on_signal(reading, writing):
    """Ends the process on a signal; `writing` is an argument so that it stays open."""
    while number := reading.recv(1):
        if number[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) is _interrupt:
            _interrupt()
        if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _leave:
            _leave()


def _watch_google_cloud():
    """Sends SIGTERM on the first new notice; an earlier run has reacted to an older one."""
    try:
        before = {key: _metadata(key, 1.0) for key in NOTICES}
    except (OSError, http.client.HTTPException):
        return  # the machine is not Google Cloud's
    while True:
        time.sleep(PERIOD)
        for key, notice in NOTICES.items():
            with contextlib.suppress(OSError, http.client.HTTPException):
                if _metadata(key, PERIOD) == notice != before[key]:
                    log.say(f"Google Cloud announces {key} {notice}.")
                    signal.raise_signal(signal.SIGTERM)
                    return


def _metadata(key, timeout):
    """Reads a value; raises OSError if there is no metadata server or no such value."""
    host = os.environ.get("GCE_METADATA_HOST", METADATA)
    url = f"http://{host}/computeMetadata/v1/instance/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as answer:
        if answer.headers.get("Metadata-Flavor") != "Google":
            raise OSError(f"{host} is not a metadata server of Google Cloud.")
        return answer.read().decode().strip()
