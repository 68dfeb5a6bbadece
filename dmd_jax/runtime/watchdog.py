"""Ends a process in which nothing happens any more, such as one that waits for a lost device.

Its launcher then starts the run again, from the last checkpoint.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from dmd_jax.runtime import distributed


@contextlib.contextmanager
def watching(seconds: float, name: str) -> Iterator[Callable[[], None]]:
    """Yields `alive`, to be called whenever something has happened.

    The process, and all that run with it, end with `distributed.LOST` if it is not called for
    `seconds` inside this context; 0 for never.
    """
    last = [time.monotonic()]
    ended = threading.Event()

    def watch():
        while not ended.wait(min(seconds / 4, 10)):
            if time.monotonic() > last[0] + seconds:
                distributed.leave(
                    distributed.LOST,
                    f"{name}: nothing has happened for {seconds:.0f} s; run the same command "
                    "again, or give config.step_timeout more seconds.",
                )

    def alive():
        last[0] = time.monotonic()

    if seconds:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield alive
    finally:
        ended.set()
