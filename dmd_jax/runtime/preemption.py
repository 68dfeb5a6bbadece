"""What happens when the machine is wanted back: by SIGTERM, or by a notice of Google Cloud.

While a network is trained, all processes agree on a step, save it and end; anywhere else there is nothing to save, as files are whole or
not there, and the process ends at once. Either way it ends with EXIT_CODE, and the same command goes on.
"""

import collections
import contextlib
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

from dmd_jax.runtime import distributed

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
LATE = 2  # steps after which the flags of a step are read, so that the host need not wait for the devices
METADATA = "metadata.google.internal"
NOTICES = {
    "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE",
    "preempted": "TRUE",
}  # keys of the metadata server
PERIOD = 5.0  # seconds between two looks at them


class Preempted(Exception):
    """A stage has saved a step and stopped there."""


def watch():
    """From now on SIGTERM and SIGINT end this process at once, and a notice of Google Cloud is as SIGTERM; `deferred` makes exceptions."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _interrupt)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    # The handler alone would not run before the main thread comes back from C++, where it may compile for minutes.
    threading.Thread(target=_leave_on_signal, args=(reading, writing), daemon=True).start()
    threading.Thread(target=_watch_google_cloud, daemon=True).start()


@contextlib.contextmanager
def deferred():
    """Within, a notice does no more than set the event that this yields; if nobody has raised `Preempted`, it takes effect afterwards."""
    notice = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: notice.set())
    try:
        yield notice
    finally:
        signal.signal(signal.SIGTERM, before)
    if notice.is_set():
        signal.raise_signal(signal.SIGTERM)


def make_agreement(mesh: jax.sharding.Mesh) -> Callable[[bool], bool]:
    """`whether there is a notice here -> whether to stop`, to be called once a step by all processes, which get the same answer.

    With several processes it is the answer to what they said LATE steps before.
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
    distributed.leave(128 + signal.SIGINT, "interrupted; run the same command again.")


def _leave_on_signal(reading, writing):
    """`writing` is here to stay open."""
    while number := reading.recv(1):
        if number[0] == signal.SIGINT:
            _interrupt()
        if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _leave:
            _leave()


def _watch_google_cloud():
    """Sends SIGTERM on the first notice; one that already stands at the start has been acted on by whoever ran before."""
    try:
        before = {key: _metadata(key, 1.0) for key in NOTICES}
    except OSError:
        return  # another machine than Google Cloud's
    while True:
        time.sleep(PERIOD)
        for key, notice in NOTICES.items():
            with contextlib.suppress(OSError):
                if _metadata(key, PERIOD) == notice != before[key]:
                    print(f"Google Cloud announces {key} {notice}.", flush=True)
                    signal.raise_signal(signal.SIGTERM)
                    return


def _metadata(key, timeout):
    """Raises OSError if there is no such server, or it has no such value."""
    host = os.environ.get("GCE_METADATA_HOST", METADATA)
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        request, timeout=timeout
    ) as answer:
        if answer.headers.get("Metadata-Flavor") != "Google":
            raise OSError(f"{host} is not a metadata server of Google Cloud.")
        return answer.read().decode().strip()
