"""Traces of some steps, for XProf: `pip install xprof`, then `xprof --logdir=DIRECTORY`."""

import contextlib
import os
import re
from typing import Any

import jax

from dmd_jax.runtime import storage


class Trace:
    """A trace of some steps of a run.

    Args:
      steps: "first:last", counted from 1 at the start of the run; None for no trace.
      directory: where the trace is written.

    Raises:
      ValueError: `steps` is something else.
    """

    def __init__(self, steps: str | None, directory: str | os.PathLike):
        self._first, self._last = (0, 0) if steps is None else parse(steps)
        self._directory = directory
        self._files: Any = None

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Returns a context for the dispatch of step `number`; starts the trace at the first."""
        if number == self._first:
            self._files = storage.Growing(self._directory)
            jax.profiler.start_trace(self._files.path)
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def finish(self, number: int, values):
        """Ends the trace after its last step, whose `values` it waits for."""
        if self._files and number >= self._last:
            jax.block_until_ready(values)
            jax.profiler.stop_trace()
            self._files.close()
            self._files = None


def parse(steps: str) -> tuple[int, int]:
    """Reads "10:20" as numbers.

    Raises:
      ValueError: `steps` is something else.
    """
    match = re.fullmatch(r"(\d+):(\d+)", steps)
    first, last = (int(n) for n in match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"profile is {steps!r}, expected the first and the last step to trace, such as 10:20."
        )
    return first, last
